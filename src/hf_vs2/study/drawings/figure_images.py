"""Figures of single images: accuracy by FVU, risk and coverage of the gate, gains by class."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...files.figure_style import GRID_LINES
from ..results.analysis import fvu_deciles, per_class, risk_coverage
from ..results.cells import CellResult, Outputs
from ..results.view import distinct
from .figure_sheets import GATED, PLAIN, VS2, StudyReader, file_word, in_sheets, sentence


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


ALL_CLASSES, BEST_AND_WORST = 40, 15
"""Up to so many classes are shown, else so many of the best and of the worst."""
FEW_IMAGES = 50
"""A risk among fewer images than this is noise, and left out."""
GATE_MARKERS = "ovsDP*X<>^"


# By FVU


class _Source:
    """An SAE's training data, and the cells that steered a data set with it."""

    def __init__(self, study: StudyReader, encoder: str, section: str, trained_on: list[str] | None):
        self.study, self.section, self.trained_on = study, section, trained_on
        wanted = {} if trained_on is None else {"trained_on": trained_on}
        self.steered = study.first_prompts(section, encoder, method="vs2", **wanted)
        self.gated = study.first_prompts(section, encoder, method="vs2+gate", **wanted)

    def headline(self, dataset: str) -> list[str]:
        """The data set, and below it what the SAE was trained on."""
        title = self.study.headline(dataset)
        if self.trained_on is None:
            return [title, "SAE of this data set"]
        names = [self.study.title(name) for name in self.trained_on]
        union = " + ".join(names) if len(names) <= 3 else f"{len(names)} data sets"
        return [title, f"SAE of {union}, {'seen' if dataset in self.trained_on else 'unseen'}"]

    def pairs(self, dataset: str) -> list[tuple[Outputs, Outputs]]:
        """Steered and plain outcomes, one pair a seed."""
        found = self.study.pairs(one for one in self.steered if one.cell.dataset == dataset)
        return [pair for pair in found if pair[0].fvu is not None]


def _sources(study: StudyReader, encoder: str) -> list[_Source]:
    unions = distinct(
        tuple(one.cell.params["trained_on"])
        for one in study.result.select("gate_shift", encoder=encoder, method="vs2")
        if "trained_on" in one.cell.params
    )
    sources = [_Source(study, encoder, "table", None)]
    sources += [_Source(study, encoder, "gate_shift", list(union)) for union in unions]
    return [source for source in sources if any(source.pairs(name) for name in study.datasets(source.steered))]


def deciles(study: StudyReader, encoder: str) -> Iterator[tuple[str, Figure]]:
    """Accuracy of tenths of the images, by how badly the SAE reconstructs them."""
    sources = _sources(study, encoder)
    cells = [one for source in sources for one in source.steered]
    notes = (
        "Test images in ten parts of equal size by how badly the SAE reconstructs them; the number below a part is "
        "its highest FVU. Accuracy of the same images with VS2 without a gate and with plain CLIP, mean over seeds; "
        "bars: 95 % binomial (Wilson) intervals of each. Seen: the SAE was trained on it. Hollow: the 95 % paired "
        "bootstrap interval of their difference holds 0 (its ends averaged over seeds). " + sentence(study.said(cells))
    )
    for suffix, datasets in in_sheets(study.datasets(cells)):
        shape = (len(sources), len(datasets))
        sheet = study.sheet(f"Accuracy by per-sample FVU: {encoder}", notes, shape, 1.9)
        for (row, column), axes in np.ndenumerate(sheet.axes):
            source, dataset = sources[row], datasets[column]
            pairs = source.pairs(dataset)
            if not pairs:
                axes.remove()
                continue
            _draw_deciles(axes, pairs)
            sheet.title(axes, *source.headline(dataset))
            axes.set_xlabel("tenth of the images, by FVU")
            if column == 0:
                axes.set_ylabel("accuracy, %")
        sheet.legend()
        yield suffix, sheet.figure


def _draw_deciles(axes: Axes, pairs: Sequence[tuple[Outputs, Outputs]]) -> None:
    tables = [
        fvu_deciles(steered.fvu, steered.right, plain.right, min(10, len(steered.labels))) for steered, plain in pairs
    ]
    x = np.arange(1, len(tables[0]) + 1)
    n = np.array([one["n"] for one in tables[0]])
    for (colour, marker), line, key, label, shift in (
        (PLAIN, "--", "plain", "plain CLIP", -0.12),
        (VS2, "-", "steered", "VS2 on every image", 0.12),
    ):
        mean = np.mean([[one[key] for one in table] for table in tables], axis=0)
        low, high = _wilson(mean, n)
        lengths = np.stack([mean - low, high - mean]).clip(min=0)
        axes.errorbar(
            x + shift,
            mean,
            yerr=lengths,
            fmt=line,
            marker=marker,
            color=colour,
            markersize=4,
            elinewidth=1,
            label=label,
        )
    ends = np.mean([[one["gain_ci"] for one in table] for table in tables], axis=0)
    open_ = (ends[:, 0] <= 0) & (ends[:, 1] >= 0)
    hollow: dict[str, Any] = {
        "color": VS2[0],
        "marker": VS2[1],
        "markerfacecolor": "white",
        "markersize": 4,
        "linestyle": "none",
    }
    axes.plot(x[open_] + 0.12, mean[open_], **hollow, zorder=4, label="VS2, difference within noise")
    edges = np.mean([[one["high"] for one in table] for table in tables], axis=0)
    shown = [at for at in x if (at - 1) % 3 == 0]
    axes.set_xticks(shown, [f"{at}\n≤ {edges[at - 1]:.2f}" for at in shown])
    axes.set_xticks(x, minor=True)
    axes.grid(color=GRID_LINES, linewidth=0.8)


def _wilson(percent: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the 95 % Wilson interval of a proportion, in %; see any text on binomial intervals."""
    share, z2 = percent / 100, 1.959964**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2) / (1 + z2 / n) * np.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return 100 * (centre - half), 100 * (centre + half)


def risk(study: StudyReader, encoder: str) -> Iterator[tuple[str, Figure]]:
    """Error among the images that a gate lets through, and accuracy over all, against coverage."""
    sources = _sources(study, encoder)
    cells = [one for source in sources for one in source.steered]
    quantiles = sorted({one.cell.params["gate"] for source in sources for one in source.gated})
    markers = {quantile: GATE_MARKERS[index % len(GATE_MARKERS)] for index, quantile in enumerate(quantiles)}
    notes = (
        "Images with an FVU below a threshold are steered. Upper row of each SAE: error among them, with VS2 and with "
        f"plain CLIP (from {FEW_IMAGES} images on). Lower row: accuracy over all images when the others are left to "
        "plain CLIP; markers: where the gate's thresholds lie, which are quantiles q of the FVU of held-out training "
        "images. Line: mean over seeds; band: their range. Seen: the SAE was trained on "
        "it. " + sentence(study.said(cells))
    )
    for suffix, datasets in in_sheets(study.datasets(cells)):
        sheet = study.sheet(
            f"Risk and coverage of the gate: {encoder}",
            notes,
            (2 * len(sources), len(datasets)),
            1.5,
            foot=0.6,
        )
        for quantile in quantiles:  # first, so that the legend has them in order
            sheet.axes[1, 0].plot([], [], **_gate_style(markers[quantile], quantile))
        for row, source in enumerate(sources):
            for column, dataset in enumerate(datasets):
                risk, accuracy = sheet.axes[2 * row : 2 * row + 2, column]
                pairs = source.pairs(dataset)
                if not pairs:
                    risk.remove()
                    accuracy.remove()
                    continue
                gated = [one for one in source.gated if one.cell.dataset == dataset]
                _draw_risk(risk, accuracy, pairs, gated, markers)
                sheet.title(risk, *source.headline(dataset))
                accuracy.set_xlabel("coverage: images steered, %")
                if column == 0:
                    risk.set_ylabel("error, %")
                    accuracy.set_ylabel("accuracy, %")
        sheet.legend()
        yield suffix, sheet.figure


def _draw_risk(
    risk: Axes,
    accuracy: Axes,
    pairs: Sequence[tuple[Outputs, Outputs]],
    gated: Sequence[CellResult],
    markers: Mapping[float, str],
) -> None:
    curves = [risk_coverage(steered.fvu, steered.right, plain.right) for steered, plain in pairs]
    n = len(pairs[0][0].labels)
    x = np.linspace(0, 1, 201)
    enough = x >= min(1.0, FEW_IMAGES / n)
    for axes, key, (colour, _), line, label in (
        (risk, "plain_risk", PLAIN, "--", "plain CLIP, images below the threshold"),
        (risk, "steered_risk", VS2, "-", "VS2, images below the threshold"),
        (accuracy, "gated_accuracy", GATED, "-.", "gated VS2, all images"),
    ):
        values = np.array([np.interp(x, curve["coverage"][1:], curve[key][1:]) for curve in curves])
        if key == "gated_accuracy":
            values = np.array([np.interp(x, curve["coverage"], curve[key]) for curve in curves])
        chosen = np.ones_like(enough) if key == "gated_accuracy" else enough
        axes.plot(100 * x[chosen], values.mean(0)[chosen], line, color=colour, label=label)
        if len(values) > 1:
            low, high = values.min(0)[chosen], values.max(0)[chosen]
            axes.fill_between(100 * x[chosen], low, high, color=colour, alpha=0.15, linewidth=0)
        axes.grid(color=GRID_LINES, linewidth=0.8)
        axes.set_xlim(-2, 102)
    plain = 100 * float(pairs[0][1].right.double().mean())
    accuracy.axhline(plain, color=PLAIN[0], linestyle=":", linewidth=1.4, label="plain CLIP, all images")
    accuracy.margins(y=0.12)
    for quantile in sorted({one.cell.params["gate"] for one in gated}):
        there = [one.figures for one in gated if one.cell.params["gate"] == quantile]
        place = [100 * np.mean([one["coverage"] for one in there])], [np.mean([one["top1"] for one in there])]
        accuracy.plot(*place, **_gate_style(markers[quantile], quantile))


def _gate_style(marker: str, quantile: float) -> dict[str, Any]:
    style = {"marker": marker, "color": "black", "markerfacecolor": "white", "markersize": 4.5, "linestyle": "none"}
    return style | {"label": f"gate at q = {quantile:g}"}


# Classes


def classes(study: StudyReader, encoder: str) -> Iterator[tuple[str, Figure]]:
    """Gain of each class."""
    cells = study.first_prompts("table", encoder, method="vs2")
    for dataset in study.datasets(cells):
        here = [one for one in cells if one.cell.dataset == dataset]
        pairs = study.pairs(here)
        if not pairs:
            continue
        tables = [per_class(steered, plain, study.about(dataset)["class_names"]) for steered, plain in pairs]
        yield f"-{file_word(dataset)}", _draw_classes(study, encoder, dataset, here, tables)


def _draw_classes(
    study: StudyReader, encoder: str, dataset: str, cells: Sequence[CellResult], tables: Sequence[list[dict[str, Any]]]
) -> Figure:
    present = [index for index, one in enumerate(tables[0]) if one["support"]]
    gains = {index: [table[index]["gain"] for table in tables] for index in present}
    order = sorted(present, key=lambda index: -float(np.mean(gains[index])))
    won, lost = (sum(sign * np.mean(gains[index]) > 1e-9 for index in order) for sign in (1, -1))
    supports = [tables[0][index]["support"] for index in present]
    few, many = min(supports), max(supports)
    notes = (
        f"VS2 over plain CLIP, points of accuracy on the images of each class. Of {len(order)} classes {won} gain, "
        f"{lost} lose, {len(order) - won - lost} stay. Each class has {few if few == many else f'{few} to {many}'} "
        f"test images, so one image is {100 / many:.2g}{'' if few == many else f' to {100 / few:.2g}'} points. Bar: "
        "mean over seeds; dots: each seed; on the right: accuracy before and after. " + sentence(study.said(cells))
    )
    shown: list[int | None] = list(order)
    between = 0
    if len(order) > ALL_CLASSES:
        best, worst = order[: min(won, BEST_AND_WORST)], order[len(order) - min(lost, BEST_AND_WORST) :]
        between = len(order) - len(best) - len(worst)
        shown = [*best, None, *worst]
        notes += f" Shown: the {len(best)} largest gains and the {len(worst)} largest losses, "
        notes += "which noise alone would spread too."
    sheet = study.sheet(
        f"Gain by class: {study.title(dataset)}, {encoder}",
        notes,
        (1, 1),
        0.15 * len(shown) + 0.5,
        wide=True,
        foot=0.1,
    )
    axes = sheet.axes[0, 0]
    for place, index in enumerate(shown):
        if index is None:
            axes.axhline(place, color="0.6", linestyle=":", linewidth=1)
            continue
        mean = float(np.mean(gains[index]))
        axes.barh(place, mean, height=0.7, color=VS2[0] if mean >= 0 else PLAIN[0], alpha=0.75)
        if len(tables) > 1:
            axes.scatter(gains[index], [place] * len(tables), s=9, color="black", linewidths=0, zorder=3)
        before, after = (np.mean([table[index][key] for table in tables]) for key in ("plain", "steered"))
        axes.annotate(
            f"{before:.0f} → {after:.0f} %",
            (1.01, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=7,
        )
    axes.set_yticks(
        range(len(shown)),
        [
            f"{between} classes between"
            if index is None
            else textwrap.shorten(tables[0][index]["name"].replace("_", " "), 34, placeholder=" …")
            for index in shown
        ],
    )
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.axvline(0, color="0.35", linewidth=1)
    axes.grid(axis="x", color=GRID_LINES)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("gain, points")
    return sheet.figure
