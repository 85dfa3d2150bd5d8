"""Which rows of a tensor are no numbers."""

from __future__ import annotations

import torch


def first_broken_row(*parts: torch.Tensor) -> int | None:
    """Number of the first row that holds NaN or infinity in a part, `(n,)` or `(n, ...)`; `None` where there is none,
    and under `torch.compile`, which can't look at numbers. A GPU is waited for once."""
    if torch.compiler.is_compiling():
        return None
    flat = [(part.unsqueeze(-1) if part.ndim == 1 else part.flatten(1)).isfinite() for part in parts]
    finite = torch.stack([part.all(-1).to(parts[0].device) for part in flat]).all(0)
    return None if finite.all() else int((~finite).nonzero()[0])


__all__ = ["first_broken_row"]
