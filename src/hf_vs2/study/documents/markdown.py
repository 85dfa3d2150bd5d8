"""Small pieces of a Markdown document: a table, a figure over seeds."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Sequence

from ...evaluation.table import WIDTH


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def wrapped(document: str) -> str:
    """Paragraphs and items of lists in lines that fit a terminal and a diff; rows of tables stay whole."""
    lines = []
    for line in document.split("\n"):
        if len(line) > WIDTH and not line.startswith(("|", "#")):
            indent = "  " if line.startswith("- ") else ""
            line = textwrap.fill(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        lines.append(line)
    return "\n".join(lines)


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation (n - 1); the mean alone of one value."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"
