"""The movement of a CLS row as a sum over latents, for every method: what edits change and explanations take apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .functional import amplify, contrastive_change, edited_change, keep_norm
from .sparse_ops import sparse_decode


if TYPE_CHECKING:
    from .configuration_vs2_clip import Steering
    from .corpus import NeighborCodes
    from .latent_edits import EditTable


class LatentStep(NamedTuple):
    """`x` becomes `start + sum_j change_j d_j`, then, where `keeps_norm`, as long as `x` was."""

    start: torch.Tensor
    """`(batch, hidden_size)`: `x` itself, or what the method puts in its place."""
    change: torch.Tensor
    """`(batch, m)`: what is added to the code, the step's size lambda included."""
    latents: torch.Tensor
    """`(batch, m)` int64. One may occur twice."""
    keeps_norm: bool

    def move(self, x: torch.Tensor, decoder: torch.Tensor) -> torch.Tensor:
        """The moved rows, `(batch, hidden_size)`."""
        moved = self.start + sparse_decode(self.change, self.latents, decoder).to(x.dtype)
        return keep_norm(moved, x) if self.keeps_norm else moved


def latent_step(
    settings: Steering,
    x: torch.Tensor,
    code: Any,
    mean: torch.Tensor,
    gamma: float | torch.Tensor,
    found: NeighborCodes | None,
    edits: EditTable | None,
) -> LatentStep:
    """
    The step that the settings make.

    Args:
        x: `(batch, hidden_size)`.
        code ([`SAEOutput`]): of `x`.
        mean: of the training rows, for `"centroid"`.
        gamma: the settings' one as the equations take it.
        found: the neighbours' codes, for `"vs2++"`.
        edits: the settings' edits.
    """
    values, indices = code.latent_values, code.latent_indices
    start, change, latents = x, values[:, :0], indices[:, :0]
    if settings.method == "vs2":
        change, latents = settings.lambda_ * (amplify(values, indices, gamma) - values), indices
    elif settings.method == "vs2++":
        assert found is not None
        change, latents = contrastive_change(*found, gamma)
        change = settings.lambda_ * change
    elif settings.method == "centroid":
        (factor,) = settings.gamma_factors
        start = x + settings.lambda_ * (factor - 1) * (x - mean)
    else:
        start = code.reconstruction.to(x.dtype)
        if settings.method == "amplify":
            change, latents = amplify(values, indices, gamma) - values, indices
    if edits is not None:
        change, latents = edited_change(values, indices, change, latents, edits)
    return LatentStep(start, change, latents, settings.method in ("vs2", "vs2++", "centroid"))


__all__ = ["LatentStep", "latent_step"]
