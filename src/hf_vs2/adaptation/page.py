"""`report.html`: one file that a browser opens offline, without scripts. `report.html.jinja` escapes every word that
comes from outside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..atlas.writing import thumbnails
from ..data.images import one_line
from ..evaluation.evidence import SHOWN_EVIDENCE, evidence_text
from ..evaluation.metrics import gain_text
from ..files.atomic import replace_text
from .report import FEW_SHOT_TOLD, change_sentence, method_label


def write_page(
    path: Path, report: Mapping[str, Any], dataset: Any, image_column: str, image_indices: Sequence[int]
) -> None:
    """The page of a report.

    Args:
        dataset: with the images in `image_column`, of which those that the report shows are read.
        image_indices: the place in it of each row of the report.
    """
    checked = report["checked"] or {"methods": [], "few_shot": [], "fixed": [], "broken": []}
    shown = [*report["changes"]["clearest"], *checked["fixed"], *checked["broken"]]
    wanted = sorted({image_indices[one["row"]] for one in shown})
    jpegs = dict(thumbnails(dataset, image_column, wanted))
    evidence = report["chosen"]["evidence"]
    page = _template().render(
        report=report,
        pictures={one["row"]: _data_uri(jpegs[image_indices[one["row"]]]) for one in shown},
        evidence=[
            (evidence_text(name, evidence[name]), SHOWN_EVIDENCE[name]) for name in SHOWN_EVIDENCE if name in evidence
        ],
        pairs=[(f"{one['from']} → {one['to']}", f"{one['number']:,}") for one in report["changes"]["pairs"]],
        methods=[_method_row(one) for one in [*checked["methods"], *checked["few_shot"]]],
        change_sentence=change_sentence(report),
        few_shot_told=FEW_SHOT_TOLD,
        both_ways=_both_ways,
    )
    replace_text(path, page)


def _template() -> Any:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_vs2", "adaptation"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=True,
        finalize=lambda value: value if hasattr(value, "__html__") else one_line(value),
    )
    environment.filters["form"] = format
    style = files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    environment.globals["style"] = Markup(style)  # noqa: S704  our own
    return environment.get_template("report.html.jinja")


def _data_uri(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _method_row(one: Mapping[str, Any]) -> list[str]:
    gain = gain_text(one["gain"], one["gain_ci"]) if "gain" in one else "-"
    return [method_label(one["method"]), f"{one['top1']:.1f}", gain]


def _both_ways(examples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those between the same two labels side by side, one direction after the other."""
    pairs: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for one in examples:
        pairs.setdefault(tuple(sorted((one["plain"], one["adapted"]))), []).append(one)
    return [one for some in pairs.values() for one in sorted(some, key=lambda one: one["plain"])]
