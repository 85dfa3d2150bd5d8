"""What tables and figures ask of a study's result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from .catalog import GROUPS, group_of, label_of
from .cells import CellResult, Outputs, StudyResult


class StudyView:
    """Names and cells of one result. A data set that the study was not run for has its name alone."""

    def __init__(self, result: StudyResult):
        self.result, self.meta = result, result.meta
        self.defaults: Mapping[str, Any] = result.meta.get("defaults", {})
        self._read = lru_cache(maxsize=256)(CellResult.outputs)  # read again rather than held: a study has thousands

    def encoders(self) -> list[str]:
        return distinct(one.cell.encoder for one in self.result)

    def datasets(self, cells: Iterable[CellResult]) -> list[str]:
        """Those of the cells, in the study's order."""
        present = distinct(one.cell.dataset for one in cells)
        known = [name for name in self.meta["datasets"] if name in present]
        return known + [name for name in present if name not in known]

    def about(self, dataset: str) -> Mapping[str, Any]:
        return self.meta["datasets"].get(dataset, {})

    def title(self, dataset: str) -> str:
        return self.about(dataset).get("title") or dataset

    def label(self, method: str) -> str:
        return label_of(method, self.meta.get("methods", {}))

    def uses_labels(self, method: str) -> str:
        """Where a method's labels come from, beside scoring: `""`, `"training"`, `"test"`."""
        return self.meta.get("methods", {}).get(method, {}).get("uses_labels", "")

    def group(self, method: str) -> str:
        """The one of [`GROUPS`] that a method belongs to."""
        return GROUPS[-1] if self.uses_labels(method) else group_of(method)

    def outputs(self, one: CellResult | None) -> Outputs | None:
        """The outcomes of the images of a cell; `None` where they are gone."""
        try:
            return None if one is None else self._read(one)
        except FileNotFoundError:
            return None

    def pairs(self, cells: Iterable[CellResult]) -> list[tuple[Outputs, Outputs]]:
        """The outcomes of each cell with plain CLIP's; none at all when one of them is gone."""
        pairs = []
        for one in cells:
            plain = self.outputs(self.result.plain(one.cell.encoder, one.cell.dataset, one.cell.prompts))
            outputs = self.outputs(one)
            if outputs is None or plain is None:
                return []
            pairs.append((outputs, plain))
        return pairs

    def first_prompts(self, section: str, encoder: str, **wanted: Any) -> list[CellResult]:
        """Cells with the prompt set that comes first among them: one curve of a figure is about one prompt set."""
        cells = self.result.select(section, encoder=encoder, **wanted)
        return [one for one in cells if one.cell.prompts == cells[0].cell.prompts]


def distinct(values: Iterable[Any]) -> list[Any]:
    """Each value once, in the order of its first place."""
    return list(dict.fromkeys(values))
