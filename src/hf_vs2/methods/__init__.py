"""One file a method, each of which registers itself; `base` says what a method is. The order here is the order of
tables."""

# ruff: noqa: F401, I001
from . import plain, centroid, reconstruct, vs2, vs2pp, corrected, distribution_norm, combined, anchored, prototypes
from .base import (
    BEFORE,
    DICTIONARIES,
    GATE,
    METHODS,
    Batch,
    LatentStep,
    Method,
    NeighborCodes,
    Row,
    UnlabelledRows,
    View,
    find_method,
    markdown_table,
    method_named,
    register,
    row_label,
    rows_by_name,
    then,
)


__all__ = [
    "BEFORE",
    "DICTIONARIES",
    "GATE",
    "METHODS",
    "Batch",
    "LatentStep",
    "Method",
    "NeighborCodes",
    "Row",
    "UnlabelledRows",
    "View",
    "find_method",
    "markdown_table",
    "method_named",
    "register",
    "row_label",
    "rows_by_name",
    "then",
]
