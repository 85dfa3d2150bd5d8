"""The movement of a CLS row as a sum over latents, for every method: what edits change and explanations take apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..functional.equations import amplify, contrastive_change, edited_change, keep_norm
from ..functional.sparse_ops import sparse_decode


if TYPE_CHECKING:
    from ..config.latent_edits import EditTable
    from ..config.vs2_clip import Steering
    from .corpus import NeighborCodes


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
    latent_offset: torch.Tensor | None = None,
) -> LatentStep:
    """
    The step that the settings make.

    Args:
        x: `(batch, hidden_size)`.
        code ([`SAEOutput`]): of `x`.
        mean: of the training rows, for `"centroid"` and `"corrected"`.
        gamma: the settings' one as the equations take it.
        found: the neighbours' codes, for `"vs2++"`.
        edits: the settings' edits.
        latent_offset: `sum_i z_mean_i d_i`, `(hidden_size,)`, for `"corrected"`.
    """
    values, indices = code.latent_values, code.latent_indices
    start, change, latents = x, values[:, :0], indices[:, :0]
    step, alpha = settings.parts.step, settings.lambda_ * (settings.gamma_factors[0] - 1)
    if step == "vs2":
        change, latents = settings.lambda_ * (amplify(values, indices, gamma) - values), indices
    elif step == "vs2++":
        assert found is not None
        change, latents = contrastive_change(*found, gamma)
        change = settings.lambda_ * change
    elif step == "centroid":
        start = x + alpha * (x - mean)
    elif step == "corrected":
        assert latent_offset is not None
        start = x + alpha * (x - mean) - alpha / 2 * latent_offset.to(x.dtype)
        change, latents = alpha / 2 * values, indices
    elif step in ("reconstruct", "amplify"):
        start = code.reconstruction.to(x.dtype)
        if step == "amplify":
            change, latents = amplify(values, indices, gamma) - values, indices
    elif step != "none":
        raise ValueError(f"method={settings.method!r} makes a step {step!r} that there is not.")
    if edits is not None:
        change, latents = edited_change(values, indices, change, latents, edits)
    return LatentStep(start, change, latents, step not in ("reconstruct", "amplify"))


__all__ = ["LatentStep", "latent_step"]
