"""What the outcomes of single images say, as data: by FVU, by class, by confusion and from seed to seed; see
[`analysis`]."""

from __future__ import annotations

import math
from typing import Any

from ..results.analysis import agreement, fixed_confusions, fvu_deciles, per_class, risk_coverage
from ..results.cells import CellResult, Outputs, StudyResult


REPORTS_NAME = "reports.json"


def reports(result: StudyResult) -> list[dict[str, Any]]:
    """
    One entry for each row of VS2 in the table and under shift, and one for its seeds together, as plain JSON.

    Each names its cell (`encoder`, `dataset`, `prompts`, `seed` or `seeds`, `trained_on`) and holds `fvu_deciles`,
    `risk_coverage`, `per_class` and `confusions`, or `agreement` of the seeds.
    """
    found = []
    for cell in result.select(method="vs2"):
        if "table" in cell.sections or "gate_shift" in cell.sections:
            plain = _plain(result, cell)
            if plain is not None:
                found.append(_place(cell) | {"seed": cell.cell.seed} | _of_one(result, cell, plain))
    groups: dict[tuple[str, str, str], list[CellResult]] = {}
    for cell in result.select("table", method="vs2"):
        groups.setdefault((cell.cell.encoder, cell.cell.dataset, cell.cell.prompts), []).append(cell)
    for cells in groups.values():
        plain = _plain(result, cells[0])
        if plain is not None and len(cells) > 1:
            alike = agreement([cell.outputs() for cell in cells], plain)
            found.append(_place(cells[0]) | {"seeds": [cell.cell.seed for cell in cells], "agreement": alike})
    return found


def _of_one(result: StudyResult, cell: CellResult, plain: Outputs) -> dict[str, Any]:
    outputs = cell.outputs()
    names = result.meta["datasets"][cell.cell.dataset]["class_names"]
    bins = min(10, len(outputs.labels))
    return {
        "fvu_deciles": [_finite(one) for one in fvu_deciles(outputs.fvu, outputs.right, plain.right, bins)],
        "risk_coverage": _finite(risk_coverage(outputs.fvu, outputs.right, plain.right)),
        "per_class": per_class(outputs, plain, names),
        "confusions": fixed_confusions(outputs, plain, names),
    }


def _plain(result: StudyResult, cell: CellResult) -> Outputs | None:
    plain = result.plain(cell.cell.encoder, cell.cell.dataset, cell.cell.prompts)
    return None if plain is None else plain.outputs()


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
