"""Tensors that FSDP has dealt out to several processes."""

from __future__ import annotations

import torch


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """The rows that this process holds, sharing memory: all of them, unless FSDP has dealt them out."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


__all__ = ["own_part"]
