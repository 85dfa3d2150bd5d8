"""What the outcomes of single images say, as data: by FVU, by class, by confusion and from seed to seed; see
[`analysis`]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..results.analysis import agreement, fixed_confusions, fvu_deciles, per_class, risk_coverage
from ..results.cells import CellResult, Outputs, StudyResult
from ..results.view import StudyView


REPORTS_NAME = "reports.json"


def reports(result: StudyResult) -> list[dict[str, Any]]:
    """
    One entry for each row of VS2 in the table and under shift, and one for its seeds together, as plain JSON.

    Each names its cell (`encoder`, `dataset`, `prompts`, `seed` or `seeds`, `trained_on`) and holds `fvu_deciles`,
    `risk_coverage`, `per_class` and `confusions`, or `agreement` of the seeds.
    """
    view, found = StudyView(result), []
    for cell in result.select(method="vs2"):
        if "table" in cell.sections or "gate_shift" in cell.sections:
            names = view.about(cell.cell.dataset)["class_names"]
            about = _place(cell) | {"seed": cell.cell.seed}
            found += [about | _of_one(outputs, plain, names) for outputs, plain in view.pairs([cell])]
    groups: dict[tuple[str, str, str], list[CellResult]] = {}
    for cell in result.select("table", method="vs2"):
        groups.setdefault((cell.cell.encoder, cell.cell.dataset, cell.cell.prompts), []).append(cell)
    for cells in groups.values():
        pairs = view.pairs(cells)
        if len(pairs) > 1:
            alike = agreement([outputs for outputs, _ in pairs], pairs[0][1])
            found.append(_place(cells[0]) | {"seeds": [cell.cell.seed for cell in cells], "agreement": alike})
    return found


def _of_one(outputs: Outputs, plain: Outputs, names: Sequence[str]) -> dict[str, Any]:
    bins = min(10, len(outputs.labels))
    return {
        "fvu_deciles": [_finite(one) for one in fvu_deciles(outputs.fvu, outputs.right, plain.right, bins)],
        "risk_coverage": _finite(risk_coverage(outputs.fvu, outputs.right, plain.right)),
        "per_class": per_class(outputs, plain, names),
        "confusions": fixed_confusions(outputs, plain, names),
    }


def _place(cell: CellResult) -> dict[str, Any]:
    one = cell.cell
    place = {"encoder": one.encoder, "dataset": one.dataset, "prompts": one.prompts, "method": one.method}
    return place | {"trained_on": one.params.get("trained_on", [one.dataset])}


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: the FVU of an image on the mean, and the risk where nothing is covered, are
    null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
