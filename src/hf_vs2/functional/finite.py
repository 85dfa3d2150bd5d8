"""Which rows of a tensor are no numbers."""

from __future__ import annotations

import torch


def first_broken_row(rows: torch.Tensor) -> int | None:
    """Number of the first row of `(n,)` or `(n, ...)` that holds NaN or infinity; `None` where there is none, and
    under `torch.compile`, which
    can't look at numbers."""
    if torch.compiler.is_compiling():
        return None
    finite = rows.isfinite()
    finite = finite.flatten(1).all(-1) if finite.ndim > 1 else finite
    return None if finite.all() else int((~finite).nonzero()[0])


__all__ = ["first_broken_row"]
