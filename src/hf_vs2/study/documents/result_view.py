"""A study's result as its document shows it: what cells are called, where they are, and the field of a table they
make."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ...files.markdown import escaped
from ..results.cells import CellResult, StudyResult
from ..results.view import StudyView
from . import published
from .markdown import mean, spread


class ResultView(StudyView):
    """A result for Markdown: names are escaped, and cells are found by their row of the table."""

    def __init__(self, result: StudyResult):
        super().__init__(result)
        self.table_cells = result.select("table")
        self._rows: dict[tuple[str, str, str, str], list[CellResult]] = {}
        for one in self.table_cells:
            key = (one.cell.encoder, one.cell.dataset, one.cell.prompts, one.cell.method)
            self._rows.setdefault(key, []).append(one)

    # Names

    def title(self, dataset: str) -> str:
        return escaped(super().title(dataset))

    def registry(self, dataset: str) -> str | None:
        """The data set's name in the registry, if it is used as published."""
        return self.about(dataset).get("registry")

    def encoder_id(self, encoder: str) -> str | None:
        return self.meta["encoders"][encoder].get("id")

    def label(self, method: str, mark: bool = True) -> str:
        """The name of a row, with a mark if it uses labels."""
        name, labels = escaped(super().label(method)), self.uses_labels(method)
        return f"{name} (uses labels: {labels})" if mark and labels else name

    def heading(self, encoder: str, prompts: str = "") -> str:
        identity = self.encoder_id(encoder)
        where = f"{encoder} (`{identity}`)" if identity and identity != encoder else encoder
        return f'{where}, prompts "{prompts}"' if prompts else where

    # Cells

    def seeds_of(self, encoder: str, dataset: str, prompts: str, method: str) -> list[CellResult]:
        """A row of the table on one data set, one cell a seed."""
        return self._rows.get((encoder, dataset, prompts, method), [])

    # Fields

    def field(
        self,
        cells: Sequence[CellResult],
        seeds: int | None = None,
        figure: str = "top1",
        bracket: str | None = None,
    ) -> str:
        """
        One field of a table.

        Args:
            cells: one a seed.
            seeds: their number if it is said above the table; another number is said in the field.
            figure: the accuracy to show.
            bracket: the paper's figure; `None`: that of its tables of accuracy, if the cell is the same.
        """
        if not cells:
            return ""
        first = cells[0].cell
        shown = spread([one.figures[figure] for one in cells])
        gains = self._gains(cells, figure)
        if first.method != "clip" and gains is not None:
            shown += f" ({mean(gains):+.2f})"
        if first.seed is not None and len(cells) != seeds:
            shown += f", n {len(cells)}"
        images = cells[0].figures.get("n")
        if images != self.meta["datasets"][first.dataset]["n"]:
            shown += f", {images} images"
        is_theirs = "trained_on" not in first.params and published.same_retrieval(first.params)
        if bracket is None and figure == "top1" and is_theirs:
            identity, registry = self.encoder_id(first.encoder), self.registry(first.dataset)
            theirs = published.accuracy(identity, registry, first.prompts, first.method)
            bracket = "" if theirs is None else f"{theirs:.2f}"
        return f"{shown} [{bracket}]" if bracket else shown

    def _gains(self, cells: Sequence[CellResult], figure: str) -> list[float] | None:
        """Gain of each cell over plain CLIP on its own images, points."""
        if figure == "top1":
            return [one.figures["gain"] for one in cells]
        first = cells[0].cell
        plain = self.result.plain(first.encoder, first.dataset, first.prompts)
        if plain is None or plain.figures["n"] != cells[0].figures["n"]:
            return None
        return [one.figures[figure] - plain.figures[figure] for one in cells]


def common_seeds(fields: Iterable[Sequence[CellResult]]) -> int | None:
    """The number of seeds in every field of a table that has any; `None` if it differs."""
    counts = {len(cells) for cells in fields if cells and cells[0].cell.seed is not None}
    return counts.pop() if len(counts) == 1 else None


def seeds_note(seeds: int | None) -> str:
    """The line above a table whose fields do not say their number of seeds."""
    return "" if seeds is None else f"n = {seeds} SAE seed{'s' if seeds > 1 else ''}.\n\n"


def gate_note(cells: Sequence[CellResult]) -> str:
    """Share that a gated model steered, and its quantile where the SAE's held-out rows are too few for the one asked
    for."""
    coverage = f"; {100 * mean(one.figures['coverage'] for one in cells):.1f} % steered"
    used = {one.figures["gate"] for one in cells if not gate_as_asked(one)}
    return coverage + (f" at q {', '.join(f'{quantile:g}' for quantile in sorted(used))}" if used else "")


def gate_as_asked(one: CellResult) -> bool:
    asked: Any = one.cell.params.get("gate")
    return one.figures.get("gate", asked) == asked
