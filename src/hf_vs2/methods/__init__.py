"""One file a method, each of which registers itself; `base` says what a method is. The order here is the order of
tables."""

# ruff: noqa: F401, I001
from . import plain, centroid, reconstruct, vs2, vs2pp, corrected, distribution_norm, combined, anchored, prototypes
from .base import (
    BEFORE,
    GATE,
    METHODS,
    Batch,
    LatentStep,
    Method,
    NeighborCodes,
    UnlabelledRows,
    View,
    markdown_table,
    method_named,
    register,
    then,
)


__all__ = [
    "BEFORE",
    "GATE",
    "METHODS",
    "Batch",
    "LatentStep",
    "Method",
    "NeighborCodes",
    "UnlabelledRows",
    "View",
    "markdown_table",
    "method_named",
    "register",
    "then",
]
