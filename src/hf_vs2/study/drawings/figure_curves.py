"""Figures of one setting varied, of PASS, and of how far SAEs agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from ...files.figure_style import GRID_LINES
from ..results.cells import CellResult
from ..results.view import distinct
from .figure_sheets import (
    METHOD_STYLES,
    OTHER,
    PLAIN,
    VS2,
    StudyReader,
    by_setting,
    in_sheets,
    mark_default,
    seed_curve,
    sentence,
    set_log_ticks,
    wrapped_shape,
    zero_line,
)


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _panels(
    study: StudyReader,
    cells: Sequence[CellResult],
    title: str,
    notes: str,
    tall: float,
    axes_names: tuple[str, str],
    draw: Callable[[Axes, str], None],
) -> Iterator[tuple[str, Figure]]:
    """One sheet with a panel a data set, on which `draw(axes, dataset)` draws; nothing without cells."""
    datasets = study.datasets(cells)
    if not cells:
        return
    shape = wrapped_shape(len(datasets))
    sheet = study.sheet(title, notes + sentence(study.said(cells)), shape, tall)
    for number, (axes, dataset) in enumerate(zip(sheet.panels(len(datasets)), datasets, strict=True)):
        draw(axes, dataset)
        axes.set_xlabel(axes_names[0])
        if number % shape[1] == 0:
            axes.set_ylabel(axes_names[1])
        sheet.title(axes, study.headline(dataset))
    sheet.legend()
    yield "", sheet.figure


def share(study: StudyReader, encoder: str) -> Iterator[tuple[str, Figure]]:
    """Gain against the share of the unlabelled images that the SAE is trained on."""
    cells = study.first_prompts("share", encoder)
    notes = (
        "The SAE, the gate's threshold and the centroid are taken from a share of the unlabelled training images. "
        "Points of top-1 accuracy above plain CLIP on all test images; line: mean over seeds; dots and band: each "
        "seed, and their range. "
    )

    def draw(axes: Axes, dataset: str) -> None:
        shares: set[float] = set()
        for method in distinct(one.cell.method for one in cells):
            style, line = METHOD_STYLES.get(method, (PLAIN, ":"))
            here = [one for one in cells if (one.cell.dataset, one.cell.method) == (dataset, method)]
            points = by_setting(here, "share", "gain", missing=1.0)
            shares |= set(points)
            seed_curve(axes, points, style, study.label(method), line)
        zero_line(axes)
        set_log_ticks(axes, shares, lambda share: f"{100 * share:g}")
        total = study.about(dataset).get("n_train")
        if total:
            above = axes.secondary_xaxis("top")
            set_log_ticks(above, shares, lambda share: f"{round(share * total):,}")
            above.set_xlabel("training images", fontsize=7)
            above.spines["top"].set_visible(True)

    title = f"Gain against the share of unlabelled images: {encoder}"
    yield from _panels(study, cells, title, notes, 2.0, ("share of the training images, %", "gain, points"), draw)


def _two_rows(
    study: StudyReader, encoder: str, section: str, setting: str, title: str, axis: str, seen: str
) -> Iterator[tuple[str, Figure]]:
    """Gain above held-out FVU, against one setting of the SAE."""
    cells = study.first_prompts(section, encoder, method="vs2")
    notes = (
        f"VS2 with {seen}. Above: points of top-1 accuracy above plain CLIP; below: what of the variance of held-out "
        "training rows the SAE leaves unexplained. Line: mean over seeds; dots and band: each seed, and their range. "
        + sentence(study.said(cells))
    )
    for suffix, datasets in in_sheets(study.datasets(cells)):
        sheet = study.sheet(f"{title}: {encoder}", notes, (2, len(datasets)), 1.4, sharex="col")
        for column, dataset in enumerate(datasets):
            here = [one for one in cells if one.cell.dataset == dataset]
            gain, fvu = by_setting(here, setting, "gain"), by_setting(here, setting, "held_out_fvu")
            above, below = sheet.axes[:, column]
            seed_curve(above, gain, VS2, "VS2, gain over plain CLIP")
            zero_line(above)
            seed_curve(below, fvu, OTHER, "held-out FVU", "--")
            below.grid(color=GRID_LINES, linewidth=0.8)
            for axes in (above, below):
                mark_default(axes, study.defaults.get(setting), gain)
            set_log_ticks(below, gain)
            below.set_xlabel(axis)
            sheet.title(above, study.headline(dataset))
        sheet.axes[0, 0].set_ylabel("gain, points")
        sheet.axes[1, 0].set_ylabel("held-out FVU")
        sheet.legend()
        yield suffix, sheet.figure


def top_k(study: StudyReader, encoder: str) -> Iterator[tuple[str, Figure]]:
    """Gain and held-out FVU against the number of active latents."""
    yield from _two_rows(
        study, encoder, "top_k", "top_k", "Sparsity of the SAE", "top_k, active latents", "SAEs of different sparsity"
    )


def expansion(study: StudyReader, encoder: str) -> Iterator[tuple[str, Figure]]:
    """Gain and held-out FVU against the width of the SAE."""
    yield from _two_rows(
        study,
        encoder,
        "expansion",
        "expansion_factor",
        "Width of the SAE",
        "expansion factor",
        "SAEs of different width",
    )


def neighbors(study: StudyReader, encoder: str) -> Iterator[tuple[str, Figure]]:
    """Gain of VS2++ against the number of neighbours."""
    cells = study.first_prompts("neighbors", encoder, method="vs2++")
    notes = (
        "VS2++ steers towards the latents of those retrieved training images whose pseudo-label is the majority's, "
        "away from the others. Points of top-1 accuracy above plain CLIP; line: mean over seeds; dots and band: each "
        "seed, and their range; dashed: VS2, which retrieves nothing, mean over seeds. "
    )

    def draw(axes: Axes, dataset: str) -> None:
        points = by_setting([one for one in cells if one.cell.dataset == dataset], "num_neighbors", "gain")
        seed_curve(axes, points, OTHER, study.label("vs2++"))
        prompts = cells[0].cell.prompts
        without = study.result.select("table", encoder=encoder, dataset=dataset, method="vs2", prompts=prompts)
        if without:
            mean = np.mean([one.figures["gain"] for one in without])
            axes.axhline(float(mean), color=VS2[0], linestyle="--", linewidth=1.4, label=study.label("vs2"))
        zero_line(axes)
        mark_default(axes, study.defaults.get("num_neighbors"), points)
        set_log_ticks(axes, points)

    title = f"Gain of VS2++ against the number of neighbours: {encoder}"
    yield from _panels(study, cells, title, notes, 1.9, ("neighbours", "gain, points"), draw)


def pass_trade_off(study: StudyReader, encoder: str) -> Iterator[tuple[str, Figure]]:
    """Accuracy against held-out FVU for each weight of PASS."""
    cells = study.first_prompts("pass", encoder, method="vs2_pass")
    notes = (
        "VS2 with SAEs trained with PASS, whose prototype loss, weighted by w, uses the labels of training images; w "
        "= 0 is VS2. Numbers: w. Large marker: mean over seeds, joined in the order of w; dots: each seed. FVU: of "
        "held-out training rows. "
    )

    def draw(axes: Axes, dataset: str) -> None:
        here = [one for one in cells if one.cell.dataset == dataset]
        prompts = here[0].cell.prompts
        here += study.result.select("table", encoder=encoder, dataset=dataset, method="vs2", prompts=prompts)
        plain = study.result.plain(encoder, dataset, prompts)
        if plain is not None:
            axes.axhline(plain.figures["top1"], color=PLAIN[0], linestyle="--", linewidth=1.2, label="plain CLIP")
        _draw_pass(axes, here, study.defaults.get("pass_weight"))

    title = f"Trade-off of PASS: {encoder}"
    yield from _panels(study, cells, title, notes, 2.0, ("held-out FVU", "top-1 accuracy, %"), draw)


def _draw_pass(axes: Axes, cells: Sequence[CellResult], default: float | None) -> None:
    fvu = by_setting(cells, "pass_weight", "held_out_fvu", missing=0.0)
    top1 = by_setting(
        [one for one in cells if one.figures.get("held_out_fvu") is not None], "pass_weight", "top1", missing=0.0
    )
    weights = sorted(fvu)
    places = {weight: (float(np.mean(fvu[weight])), float(np.mean(top1[weight]))) for weight in weights}
    colour, marker = VS2
    axes.plot(*zip(*places.values(), strict=True), "-", color=colour, linewidth=1)
    for weight, place in places.items():
        is_default = default is not None and math.isclose(weight, default)
        label = "VS2 (w = 0)" if weight == 0 else "the study's default w" if is_default else "VS2 + PASS"
        shape = "*" if weight == 0 else "s" if is_default else marker
        size = 10 if weight == 0 else 7 if is_default else 5
        face = "white" if is_default else colour
        axes.plot(*place, shape, color=colour, markerfacecolor=face, markersize=size, linestyle="none", label=label)
        axes.scatter(fvu[weight], top1[weight], s=5, color=colour, alpha=0.6, linewidths=0)
    axes.grid(color=GRID_LINES, linewidth=0.8)
    _label_above(axes, {f"{weight:g}": place for weight, place in places.items()})


_LABELS_AT = 0.95


def _label_above(axes: Axes, places: Mapping[str, tuple[float, float]]) -> None:
    """A label for each point in one line at the top, each with a thin line to its point: points may lie close
    together. No two lines cross."""
    axes.margins(0.08, 0.1)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.3 * (high - low))
    left, right = axes.get_xlim()
    order = sorted(places, key=lambda label: places[label])
    gap = min(0.12, 0.94 / max(1, len(order) - 1))
    spots: list[float] = []
    for label in order:
        wanted = (places[label][0] - left) / (right - left)
        spots.append(max([wanted, *(spot + gap for spot in spots[-1:])]))
    for index in range(len(order) - 1, -1, -1):  # back from the right edge
        spots[index] = min(spots[index], 0.97 - gap * (len(order) - 1 - index))
    bottom, top = axes.get_ylim()
    chosen = dict(zip(order, spots, strict=True))

    def length(label: str, spot: float) -> float:
        x, y = places[label]
        return math.hypot((x - left) / (right - left) - spot, (y - bottom) / (top - bottom) - _LABELS_AT)

    # Of two lines that cross, the ends can be exchanged for shorter ones that don't.
    better = True
    while better:
        better = False
        for one, other in combinations(order, 2):
            mine, theirs = chosen[one], chosen[other]
            if length(one, theirs) + length(other, mine) < length(one, mine) + length(other, theirs) - 1e-9:
                chosen[one], chosen[other], better = theirs, mine, True
    for label, spot in chosen.items():
        axes.annotate(
            label,
            places[label],
            (spot, _LABELS_AT),
            textcoords="axes fraction",
            ha="center",
            va="center",
            fontsize=7,
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4},
        )


def agreement(study: StudyReader, encoder: str) -> Iterator[tuple[str, Figure]]:
    """Cosines between the steering vectors of SAEs of several seeds."""
    cells = study.result.select("agreement", encoder=encoder, method="steering_cosine")
    if not cells:
        return
    size = max(len(one.figures["names"]) for one in cells)
    wide, tall = 0.3 * size + 1.1, 0.22 * size + 1.0
    notes = (
        "Mean cosine, over the test images, between the steering vectors that two SAEs of the same data set give an "
        "image; centroid: the image minus the mean of the training images, without an SAE."
    )
    for suffix, sheet, panels in study.heat_maps(
        cells, f"Agreement of steering vectors: {encoder}", notes, wide, tall
    ):
        for axes, dataset in panels:
            figures = next(one.figures for one in cells if one.cell.dataset == dataset)
            names, cosine = figures["names"], np.array(figures["cosine"])
            low = min(0.0, float(cosine.min()))
            mesh = axes.pcolormesh(cosine, cmap="cividis", vmin=low, vmax=1, edgecolors="white", linewidth=0.5)
            for row, column in np.ndindex(*cosine.shape):
                value = cosine[row, column]
                colour = "black" if (value - low) / (1 - low) > 0.55 else "white"
                axes.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
            axes.set_xticks(np.arange(len(names)) + 0.5, names, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(np.arange(len(names)) + 0.5, names)
            axes.set_ylim(len(names), 0)
            axes.tick_params(length=0)
            sheet.title(axes, study.headline(dataset), beside=1.2)
            sheet.colour_bar(axes, mesh, "cosine")
        yield suffix, sheet.figure
