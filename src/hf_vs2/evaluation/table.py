"""What a terminal shows of a comparison: 80 columns wide, and first of all the rows that matter."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from ..data.images import one_line
from ..files.report import EvaluationResult, rows_of, thresholds
from ..methods import GATE, METHODS
from .few_shot import FEW_SHOT
from .methods import CLIP


WIDTH = 80
_COLUMNS = ("method", "top-1", "gain", "95 % interval", "steered", "FVU")


def headline_rows() -> set[str]:
    """Names of the rows that stand for the others: plain CLIP, the paper's method with and without gate, the controls
    without an SAE, and what is recommended without labels."""
    names = {CLIP.method}
    for method in METHODS.values():
        if method.headline:
            names |= {method.name, *([method.name + GATE] if method.compared_gated else [])}
    return names


def terminal_table(result: EvaluationResult, every_row: bool = False, others: str = "shown with --all") -> str:
    """
    A comparison as text of at most 80 columns, one table for each set of prompts.

    Args:
        result: the comparison.
        every_row (`bool`, *optional*, defaults to `False`): `False` shows the [`headline_rows`] alone, and says how
            many other methods there are.
        others (`str`): where these can be seen.
    """
    rows, headline = rows_of(result), headline_rows()
    shown = [row for row in rows if every_row or row["method"] in headline or "shots" in row]
    if len({row["method"] for row in shown}) < 2:  # none but plain CLIP: others were asked for
        shown = rows
    lines = wrapped(
        f"{rows[0]['n']:,} images. Top-1 in percent; gain over plain CLIP with the same prompts in points."
    )
    for prompts in dict.fromkeys(row["prompts"] for row in shown):
        lines += ["", f"Prompts: {one_line(prompts)}", *_aligned([row for row in shown if row["prompts"] == prompts])]
    lines.append("")
    lines += wrapped(
        "An interval that holds 0 shows no difference. FVU is what the SAE misses of an image: 0 nothing, 1 as much "
        "as the mean image would."
    )
    few = next((row for row in shown if "shots" in row), None)
    if few is not None:
        lines += wrapped(
            f"{', '.join(FEW_SHOT)} were given {few['labelled']:,} other labelled images, {few['shots']} of each "
            "class."
        )
    lines += [line for fact in _facts(shown) for line in wrapped(fact)]
    hidden = len({row["method"] for row in rows} - {row["method"] for row in shown})
    if hidden:
        lines += wrapped(f"Rows of other methods, {others}: {hidden}.")
    return "\n".join(lines)


def _aligned(rows: Sequence[dict[str, Any]]) -> list[str]:
    cells = [_COLUMNS, *map(_cells, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_COLUMNS))]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1))

    def line(row: Sequence[str]) -> str:
        name = row[0] if len(row[0]) <= widths[0] else f"{row[0][: widths[0] - 1]}…"
        others = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join([name.ljust(widths[0]), *others]).rstrip()

    return [line(row) for row in cells]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    plain = row["method"] == CLIP.method
    low, high = (0.0, 0.0) if plain else row["gain_ci"]
    coverage, fvu = row.get("coverage"), row.get("mean_fvu")
    return (
        one_line(row["method"]),
        f"{row['top1']:.2f}",
        "" if plain else f"{row['gain']:+.2f}",
        "" if plain else f"{low:+.2f} to {high:+.2f}",
        "" if plain or coverage is None else f"{coverage:.1%}",
        "" if fvu is None else f"{fvu:.3f}",
    )


def _facts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the settings were, each with its name."""
    settings = [
        f"{name} {', '.join(values)}"
        for name in ("gamma", "lambda", "coefficient")
        if (values := dict.fromkeys(f"{row[name]:.4g}" for row in rows if row.get(name) is not None))
    ]
    return [f"{fact}." for fact in (*([", ".join(settings)] if settings else []), *thresholds(rows))]


def wrapped(text: str) -> list[str]:
    """Lines of a terminal's width."""
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)
