"""What a steered CLIP returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from transformers.models.clip.modeling_clip import CLIPOutput
from transformers.utils import ModelOutput


class SteeredRows(NamedTuple):
    """CLS rows after steering, and what was decided for each."""

    rows: torch.Tensor
    """`(batch, hidden_size)`, in the dtype they came in; rows that were not steered are the input's own, bit for bit."""
    fvu: torch.Tensor | None
    """`(batch,)` float32: per-sample FVU against the training mean; `None` from methods that do not read the SAE."""
    steered: torch.Tensor
    """`(batch,)` bool: which rows were steered. Not those that the gate held back, nor those that overflow or hold NaN."""
    latent_values: torch.Tensor | None = None
    """`(batch, top_k)`."""
    latent_indices: torch.Tensor | None = None
    """`(batch, top_k)`."""
    distance: torch.Tensor | None = None
    """`(batch,)` float32, from methods that do not read the SAE: [`row_distance`] to the training rows."""
    views: tuple[torch.Tensor, ...] | None = None
    """What the method's prototypes look at beside the embedding, `(batch, d_v)` each."""


@dataclass
class VS2ImageFeatures(ModelOutput):
    """
    Image features, and for each image what steering did.

    Args:
        features (`torch.Tensor` of shape `(batch, projection_dim)`): projected, not normalised.
        fvu (`torch.Tensor` of shape `(batch,)`, *optional*): per-sample FVU; `None` when steering is off.
        steered (`torch.BoolTensor` of shape `(batch,)`): which rows were steered.
        latent_values, latent_indices (`torch.Tensor` of shape `(batch, top_k)`, *optional*): the active latents.
        distance (`torch.Tensor` of shape `(batch,)`, *optional*): to the training rows, from methods that do not read the SAE.
        views (`tuple[torch.Tensor]`, *optional*): what prototypes look at beside the embedding.
        plain_features (`torch.Tensor` of shape `(batch, projection_dim)`, *optional*): plain CLIP's, where asked for.
    """

    features: torch.Tensor | None = None
    fvu: torch.Tensor | None = None
    steered: torch.Tensor | None = None
    latent_values: torch.Tensor | None = None
    latent_indices: torch.Tensor | None = None
    distance: torch.Tensor | None = None
    views: tuple[torch.Tensor, ...] | None = None
    plain_features: torch.Tensor | None = None


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
            To the training rows, see [`row_distance`], from methods that do not read the SAE: those have no FVU and latents.
    """

    fvu: torch.Tensor | None = None
    steered: torch.Tensor | None = None
    latent_values: torch.Tensor | tuple[torch.Tensor, ...] | None = None
    latent_indices: torch.Tensor | tuple[torch.Tensor, ...] | None = None
    distance: torch.Tensor | None = None


def per_image(done: dict[int, SteeredRows]) -> dict[str, Any]:
    """The steering fields of the output: plain tensors for one SAE, stacked or tupled by layer for several."""
    layers = [done[index] for index in sorted(done)]
    if len(layers) == 1:
        found = layers[0]._asdict()
        return {name: found[name] for name in ("fvu", "steered", "latent_values", "latent_indices", "distance")}
    return {
        "fvu": torch.stack([cast(torch.Tensor, layer.fvu) for layer in layers], dim=1),
        "steered": torch.stack([layer.steered for layer in layers], dim=1),
        "latent_values": tuple(layer.latent_values for layer in layers),
        "latent_indices": tuple(layer.latent_indices for layer in layers),
    }


__all__ = ["SteeredRows", "VS2CLIPOutput", "VS2ImageFeatures", "per_image"]
