"""Figures of what cells measured: gains, the grid, settings varied one at a time, PASS and the agreement of SAEs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...files.figure_style import GRID_LINES, STYLES, draw_cells, frame_cell
from ..results.catalog import GROUPS
from ..results.cells import CellResult
from ..results.view import distinct
from .figure_sheets import StudyReader, in_sheets, sentence


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Gains


def gains(study: StudyReader, encoder: str) -> Iterator[tuple[str, Figure]]:
    """Every method's gain over plain CLIP, by group."""
    cells = [one for one in study.result.select("table", encoder=encoder) if one.cell.method != "clip"]
    prompts = distinct(one.cell.prompts for one in cells)
    rows: list[tuple[str, str]] = []  # (group, "") is the line that names a group
    methods = distinct(one.cell.method for one in cells)
    for group in GROUPS:
        members = [name for name in methods if study.group(name) == group]
        rows += [(group, "")] * bool(members) + [(group, name) for name in members]
    sampled = {one.cell.method for one in cells if one.figures["n"] != study.about(one.cell.dataset).get("n")}
    notes = (
        "Points of top-1 accuracy above plain CLIP with the same prompts on the same images. Large marker: mean over "
        "seeds; small dots: each seed; bar: 95 % paired bootstrap interval over images (its ends averaged over seeds; "
        "it does not cover the choice of seed). An arrow stands for a mean beyond the "
        "axis, and each panel has its own. " + sentence(study.said(cells))
    )
    if sampled:
        sizes = sorted({one.figures["n"] for one in cells if one.cell.method in sampled})
        notes += f" * on {' or '.join(f'{n:,}' for n in sizes)} images drawn at random."
    for suffix, datasets in in_sheets(study.datasets(cells)):
        sheet = study.sheet(
            f"Gain over plain CLIP: {encoder}",
            notes,
            (1, len(datasets)),
            len(rows) * (0.1 + 0.05 * len(prompts)) + 0.8,
            margin=2.1,
            wide=True,
            sharey=True,
        )
        for axes, dataset in zip(sheet.panels(len(datasets)), datasets, strict=True):
            here = [one for one in cells if one.cell.dataset == dataset]
            _draw_gain_panel(axes, here, rows, prompts)
            plain = [study.result.plain(encoder, dataset, name) for name in prompts]
            shown = " / ".join(f"{one.figures['top1']:.1f}" for one in plain if one is not None)
            sheet.title(axes, study.headline(dataset), *([f"CLIP {shown} %"] if shown else []), beside=0.1)
        first = sheet.axes[0, 0]
        first.set_yticks(range(len(rows)), [_row_label(study, *row, row[1] in sampled) for row in rows])
        for label, (_, method) in zip(first.get_yticklabels(), rows, strict=True):
            label.set_fontweight("normal" if method else "bold")
        first.set_ylim(len(rows) - 0.4, -0.6)
        sheet.legend()
        yield suffix, sheet.figure


def _row_label(study: StudyReader, group: str, method: str, sampled: bool) -> str:
    if not method:
        return group
    uses = study.uses_labels(method)
    return study.label(method) + (f" ({uses} labels)" if uses else "") + ("*" if sampled else "")


def _draw_gain_panel(
    axes: Axes, cells: Sequence[CellResult], rows: Sequence[tuple[str, str]], prompts: Sequence[str]
) -> None:
    means, bars, seeds, places = [], [], [], []
    for index, name in enumerate(prompts):
        shift = (index - (len(prompts) - 1) / 2) * 0.3 / max(1, len(prompts) - 1) if len(prompts) > 1 else 0.0
        for row, (_, method) in enumerate(rows):
            chosen = [one for one in cells if method and (one.cell.method, one.cell.prompts) == (method, name)]
            if chosen:
                gains = [one.figures["gain"] for one in chosen]
                means.append(float(np.mean(gains)))
                bars.append(np.mean([one.figures["gain_ci"] for one in chosen], axis=0))
                seeds.append(gains)
                places.append((row + shift, index))
    intervals = np.array(bars).reshape(-1, 2)
    ends = np.concatenate([intervals.ravel(), *seeds, [-1.0, 3.0]])
    # Controls that destroy the embedding, and oracles, move so far that on a common axis all others would fall
    # together.
    usual = max(3.0, 2 * float(np.quantile(np.abs(ends), 0.75)))
    floor, top = max(float(ends.min()), -usual), min(float(ends.max()), usual)
    room = 0.06 * (top - floor)
    apart = 1.8  # numbers need more room than markers
    for (place, index), mean, (low, high), gains in zip(places, means, intervals, seeds, strict=True):
        colour, marker = STYLES[index % len(STYLES)]
        label = f"prompts: {prompts[index]}"
        if not floor <= mean <= top:
            place = round(place) + apart * (place - round(place))
            edge, inward, arrow, side = (floor, room, "<", "left") if mean < floor else (top, -room, ">", "right")
            axes.plot(edge, place, arrow, color=colour, markersize=4, clip_on=False)
            text = f"{mean:+.1f}".replace("-", "−")
            axes.text(edge + inward, place, text, va="center", ha=side, fontsize=7, color=colour)
            continue
        axes.plot([max(low, floor - room), min(high, top + room)], [place, place], "-", color=colour, linewidth=1.1)
        axes.plot(mean, place, marker, color=colour, markersize=3.5, linestyle="none", label=label)
        if len(gains) > 1:
            axes.scatter(gains, [place + 0.1] * len(gains), s=2, color=colour, alpha=0.8, linewidths=0)
    for row, (_, method) in enumerate(rows):
        if not method:
            axes.axhline(row - 0.5, color="0.75", linewidth=0.8)
        elif row % 2:  # bands keep the markers of a method together
            axes.axhspan(row - 0.5, row + 0.5, color="0.96", zorder=0, linewidth=0)
    axes.axvline(0, color="0.35", linewidth=1)
    axes.set_xlim(floor - room, top + room)
    axes.set_xlabel("gain, points")
    axes.grid(axis="x", color=GRID_LINES)
    axes.tick_params(axis="y", length=0)


# Grid


def grid(study: StudyReader, encoder: str) -> Iterator[tuple[str, Figure]]:
    """Gain for each gamma and lambda."""
    cells = study.result.select("grid", encoder=encoder, method="grid")
    if not cells:
        return
    default = cells[0].figures["default"]
    named = f"gamma {default[0]:g}, lambda {default[1]:g}"
    notes = (
        f"VS2, points of top-1 accuracy above plain CLIP, mean over seeds. Framed: the study's default ({named}). The "
        "grid is shown, not chosen from: these are test images. Dashed outline: lambda times gamma from 2 to 3, the "
        "paper's good region. An arrow at a colour bar: some settings lie beyond it. " + sentence(study.said(cells))
    )
    wide = max(len(one.figures["lambda"]) for one in cells) * 0.3 + 0.9
    tall = max(len(one.figures["gamma"]) for one in cells) * 0.22 + 0.8
    title = f"Gain over plain CLIP for each gamma and lambda: {encoder}"
    for suffix, sheet, panels in study.heat_maps(cells, title, notes, wide, tall):
        for axes, dataset in panels:
            here = [one.figures for one in cells if one.cell.dataset == dataset]
            gammas, lambdas = here[0]["gamma"], here[0]["lambda"]
            gain = np.mean([np.array(one["top1"]) - one["plain"] for one in here], axis=0)
            # The corner of the largest steps can lose so much that all other settings would look alike.
            limit = max(min(1.5 * float(np.quantile(np.abs(gain), 0.9)), float(np.abs(gain).max())), 1e-9)
            mesh = draw_cells(axes, gain, gammas, lambdas, limit)
            _outline(axes, [[2 <= gamma * lambda_ <= 3 for lambda_ in lambdas] for gamma in gammas])
            framed = frame_cell(axes, gammas, lambdas, (default[0], default[1]))
            axes.set_xlabel("lambda")
            axes.set_ylabel("gamma")
            plain = np.mean([one["plain"] for one in here])
            headline = study.headline(dataset).replace("\n", ", ")
            lines = [f"{headline}; plain CLIP {plain:.1f} %"]
            lines += [f"the default, {named}, is not on this grid"] if not framed else []
            sheet.title(axes, *lines, beside=1.2)
            beyond = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
            ends = beyond[bool(gain.min() < -limit), bool(gain.max() > limit)]
            sheet.colour_bar(axes, mesh, "gain, points", extend=ends)
        yield suffix, sheet.figure


def _outline(axes: Axes, inside: Sequence[Sequence[bool]]) -> None:
    """A dashed line around cells of a heat map, along their edges, so that it crosses no number."""
    padded = np.pad(np.array(inside), 1)
    for row, column in np.argwhere(padded):
        x, y = column - 1, row - 1
        for (down, right), ends in (
            ((-1, 0), ((x, x + 1), (y, y))),
            ((1, 0), ((x, x + 1), (y + 1, y + 1))),
            ((0, -1), ((x, x), (y, y + 1))),
            ((0, 1), ((x + 1, x + 1), (y, y + 1))),
        ):
            if not padded[row + down, column + right]:
                axes.plot(*ends, color="black", linestyle=(0, (3, 1.5)), linewidth=1.3, clip_on=False)
