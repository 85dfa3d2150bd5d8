"""What a steered CLIP returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.clip.modeling_clip import CLIPOutput
from transformers.utils import ModelOutput


@dataclass
class VS2ImageFeatures(ModelOutput):
    """
    What was done to a batch of images, and what came of it.

    Args:
        features (`torch.Tensor` of shape `(batch, projection_dim)`, *optional*): projected, not normalised; not of CLS
            rows alone.
        fvu (`torch.Tensor` of shape `(batch,)`, *optional*): per-sample FVU against the training mean, float32; `None`
            when steering is off, and from methods that do not read the SAE.
        steered (`torch.BoolTensor` of shape `(batch,)`): which rows were steered. Not those that the gate held back,
            nor those that overflow or hold NaN.
        latent_values, latent_indices (`torch.Tensor` of shape `(batch, top_k)`, *optional*): the active latents.
        distance (`torch.Tensor` of shape `(batch,)`, *optional*): float32, from methods that do not read the SAE:
            [`row_distance`] to the training rows.
        views (`tuple[torch.Tensor]`, *optional*): what the method's prototypes look at beside the embedding, `(batch,
            d_v)` each.
        plain_features (`torch.Tensor` of shape `(batch, projection_dim)`, *optional*): plain CLIP's, where asked for.
        rows (`torch.Tensor` of shape `(batch, hidden_size)`, *optional*): the CLS rows after steering, in the dtype
            they came in; those that were not steered are the input's own, bit for bit.
    """

    features: torch.Tensor | None = None
    fvu: torch.Tensor | None = None
    steered: torch.Tensor = None  # type: ignore[assignment]
    latent_values: torch.Tensor | None = None
    latent_indices: torch.Tensor | None = None
    distance: torch.Tensor | None = None
    views: tuple[torch.Tensor, ...] | None = None
    plain_features: torch.Tensor | None = None
    rows: torch.Tensor | None = None


@dataclass
class VS2CLIPOutput(CLIPOutput):
    """
    `CLIPOutput`'s fields, and for each image what steering did.

    Args:
        fvu (`torch.Tensor` of shape `(batch,)`, *optional*):
            Per-sample FVU. With several SAEs `(batch, num_saes)`, layers ascending. `None` when steering is off.
        steered (`torch.BoolTensor` of the same shape):
            Which images were steered; the others have exactly plain CLIP's result.
        latent_values (`torch.Tensor` of shape `(batch, top_k)`, *optional*), latent_indices (same shape, *optional*):
            The active latents. With several SAEs a tuple, one entry a layer.
        distance (`torch.Tensor` of shape `(batch,)`, *optional*):
            To the training rows, see [`row_distance`], from methods that do not read the SAE: those have no FVU and
            latents.
    """

    fvu: torch.Tensor | None = None
    steered: torch.Tensor | None = None
    latent_values: torch.Tensor | tuple[torch.Tensor, ...] | None = None
    latent_indices: torch.Tensor | tuple[torch.Tensor, ...] | None = None
    distance: torch.Tensor | None = None


def per_image(done: Mapping[int, VS2ImageFeatures]) -> dict[str, Any]:
    """The steering fields of the output: plain tensors for one SAE, stacked or tupled by layer for several."""
    layers = [done[index] for index in sorted(done)]
    names = ("fvu", "steered", "latent_values", "latent_indices", "distance")
    if len(layers) == 1:
        return {name: getattr(layers[0], name) for name in names}
    columns = {name: tuple(getattr(layer, name) for layer in layers) for name in names[:4]}
    return columns | {name: torch.stack(columns[name], dim=1) for name in ("fvu", "steered")}
