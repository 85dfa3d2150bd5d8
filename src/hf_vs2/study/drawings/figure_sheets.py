"""What the figures of a study share: what they ask of a result, the sheet they are drawn on, and curves over seeds."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...files.figure_style import COLUMN, GRID_LINES, PAGE, STYLES
from ..results.cells import CellResult, StudyResult
from ..results.view import StudyView, distinct


if TYPE_CHECKING:
    from matplotlib.axes import Axes


COLUMNS = 3
"""Panels side by side on one sheet, at most: more would need type too small to read on a page."""
# One method looks the same in every figure.
VS2, PLAIN, GATED, OTHER = STYLES
METHOD_STYLES = {"vs2": (VS2, "-"), "vs2+gate": (GATED, "-."), "centroid": (OTHER, "--")}


class StudyReader(StudyView):
    """What the figures ask of a result."""

    def __init__(self, result: StudyResult, notes: bool = True):
        super().__init__(result)
        self.notes = notes

    def headline(self, dataset: str) -> str:
        """Title of a panel: the data set, and below it its test images."""
        n = self.about(dataset).get("n")
        return self.title(dataset) if n is None else f"{self.title(dataset)}\n{n:,} images"

    def sheet(self, title: str, notes: str, shape: tuple[int, int], tall: float, **options: Any) -> Sheet:
        """A [`Sheet`], with a title and notes unless a caption is to say them."""
        return Sheet(*((title, notes) if self.notes else ("", "")), shape, tall, **options)

    def heat_maps(
        self, cells: Sequence[CellResult], title: str, notes: str, wide: float, tall: float
    ) -> Iterator[tuple[str, Sheet, list[tuple[Axes, str]]]]:
        """Sheets of panels of `wide` by `tall` inches, one a data set: what tells a sheet's name apart, the sheet, and
        its panels with their data sets."""
        columns = max(1, min(int(PAGE / wide), COLUMNS))
        for suffix, datasets in in_sheets(self.datasets(cells), 3 * columns):
            shape = math.ceil(len(datasets) / columns), min(columns, len(datasets))
            sheet = self.sheet(title, notes, shape, tall, wide=wide > COLUMN, foot=0.1)
            yield suffix, sheet, list(zip(sheet.panels(len(datasets)), datasets, strict=True))

    def said(self, cells: Sequence[CellResult]) -> str:
        """Seeds and prompts, for the line below a title."""
        seeds = sorted({one.cell.seed for one in cells if one.cell.seed is not None})
        prompts = distinct(one.cell.prompts for one in cells if one.cell.prompts)
        parts = []
        if seeds:
            parts.append(f"{'seed' if len(seeds) == 1 else f'{len(seeds)} seeds:'} {', '.join(map(str, seeds))}")
        if prompts:
            parts.append(f"prompts: {', '.join(prompts)}")
        return "; ".join(parts)


# Sheets


class Sheet:
    """
    A figure as wide as a page of a paper, or as a column where it has one panel: title and notes at its upper left,
    panels below, and one legend for all of them at the bottom.

    Args:
        title, notes: empty where a caption says them.
        shape: rows and columns of panels; tall: inches of each.
        margin: inches on the left that belong to no panel, such as names of rows.
        wide: whether a single panel takes the whole page.
    """

    def __init__(
        self,
        title: str,
        notes: str,
        shape: tuple[int, int],
        tall: float,
        margin: float = 0.0,
        wide: bool = False,
        foot: float = 0.35,
        **options: Any,
    ):
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        rows, columns = shape
        width = PAGE if columns > 1 or wide else COLUMN
        self.panel_width = (width - margin) / columns
        # About 16 characters of 8 points to an inch.
        heading = textwrap.wrap(title, int(14.5 * width))
        lines = textwrap.wrap(notes, int(17 * width))
        head = 0.17 * len(heading) + 0.135 * len(lines) + (0.15 if title else 0.0)
        height = rows * tall + head + foot
        layout = ConstrainedLayoutEngine(
            rect=(0.0, 0.0, 1.0, 1 - head / height), w_pad=0.04, h_pad=0.04, wspace=0.02, hspace=0.02
        )
        self.figure = Figure(figsize=(width, height), layout=layout)
        top = 1 - 0.05 / height
        under = top - 0.17 * len(heading) / height
        for text, at, look in (
            (heading, top, {"fontsize": 9, "fontweight": "bold"}),
            (lines, under, {"fontsize": 7.5, "color": "0.25"}),
        ):
            if text:
                joined: dict[str, Any] = {"va": "top", "linespacing": 1.2} | look
                self.figure.text(0.05 / width, at, "\n".join(text), **joined)
        self.axes = self.figure.subplots(rows, columns, squeeze=False, **options)

    def panels(self, count: int) -> list[Axes]:
        """The first `count` panels, row by row; the others go."""
        everyone = list(self.axes.flat)
        for axes in everyone[count:]:
            axes.remove()
        return everyone[:count]

    def title(self, axes: Axes, *lines: str, beside: float = 0.5) -> None:
        """A panel's own title, wrapped to its width less the inches of what stands `beside` it."""
        width = max(12, int(16 * (self.panel_width - beside)))
        parts = [part for line in lines for part in line.split("\n")]
        axes.set_title("\n".join(textwrap.fill(part, width) for part in parts), loc="left")

    def colour_bar(self, axes: Axes, mesh: Any, label: str, **options: Any) -> None:
        bar = self.figure.colorbar(mesh, ax=axes, pad=0.02, aspect=25, **options)
        bar.set_label(label)
        bar.outline.set_visible(False)

    def legend(self) -> None:
        """One entry a label, from all panels."""
        handles: dict[str, Any] = {}
        for axes in self.figure.axes:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        if handles:
            wide = max(len(label) for label in handles)
            columns = max(1, min(len(handles), int(self.figure.get_figwidth() * 15 / (wide + 6))))
            self.figure.legend(
                list(handles.values()), list(handles), loc="outside lower left", ncols=columns, frameon=False
            )


def wrapped_shape(count: int) -> tuple[int, int]:
    """Rows and columns for so many panels of the same kind."""
    rows = math.ceil(count / COLUMNS)
    return rows, math.ceil(count / rows)


def in_sheets(datasets: Sequence[str], most: int = COLUMNS) -> list[tuple[str, list[str]]]:
    """Data sets in sheets of at most `most`, of about the same size, and what tells the sheets' names apart."""
    count = math.ceil(len(datasets) / most)
    parts = [list(part) for part in np.array_split(np.array(datasets, dtype=object), count)] if count else []
    return [("" if count == 1 else f"-{number}", part) for number, part in enumerate(parts, 1)]


def zero_line(axes: Axes) -> None:
    axes.axhline(0, color="0.35", linewidth=1)
    axes.grid(color=GRID_LINES, linewidth=0.8)


def seed_curve(
    axes: Axes, points: Mapping[float, Sequence[float]], style: tuple[str, str], label: str, line: str = "-"
) -> None:
    """Mean over seeds against a setting, each seed's own value as a dot, and the band that holds them."""
    colour, marker = style
    x = sorted(points)
    # A dashed curve may lie on another: its hollow markers let that one be seen.
    look = {"markersize": 4} if line == "-" else {"markersize": 5.5, "markerfacecolor": "none"}
    axes.plot(x, [np.mean(points[at]) for at in x], line, color=colour, marker=marker, label=label, **look)
    if any(len(points[at]) > 1 for at in x):
        low, high = [min(points[at]) for at in x], [max(points[at]) for at in x]
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        for at in x:
            axes.scatter([at] * len(points[at]), points[at], s=5, color=colour, alpha=0.7, linewidths=0)


def by_setting(
    cells: Iterable[CellResult], setting: str, figure: str, missing: float | None = None
) -> dict[float, list[float]]:
    """A figure by the value of a setting, one value a seed."""
    points: dict[float, list[float]] = {}
    for one in cells:
        value = one.figures.get(figure)
        if value is not None:
            points.setdefault(one.cell.params.get(setting, missing), []).append(value)
    return points


def mark_default(axes: Axes, value: float | None, shown: Iterable[float]) -> None:
    """A vertical line at the study's setting, if the axis has it."""
    if value is not None and any(math.isclose(value, at) for at in shown):
        axes.axvline(value, color="0.35", linestyle=":", linewidth=1.2, label="the study's default")


def set_log_ticks(axes: Any, values: Iterable[float], text: Callable[[float], str] = "{:g}".format) -> None:
    """A logarithmic axis with a tick at each value measured, and no other; those that would touch lose their label."""
    values = sorted(values)
    axes.set_xscale("log")
    span = math.log(values[-1] / values[0]) or 1.0
    labels, last = [], -math.inf
    for value in values:
        place = math.log(value / values[0]) / span
        labels.append(text(value) if place - last > 0.12 else "")
        last = place if labels[-1] else last
    axes.set_xticks(values, labels)
    axes.set_xticks([], minor=True)
    if len(values) == 1:
        axes.set_xlim(values[0] / 2, values[0] * 2)


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""


def file_word(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._+-" else "_" for c in name)
