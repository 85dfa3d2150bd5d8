"""What stands between a CLS row and its class scores in a CLIP: run, or folded into one affine map."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from transformers import CLIPModel


if TYPE_CHECKING:
    from ..clip.modeling import VS2CLIPForZeroShot


def clip_embeds(clip: CLIPModel, rows: torch.Tensor) -> torch.Tensor:
    """Plain CLIP's image features of CLS rows of its last layer: `(batch, projection_dim)`, float32, not normalised."""
    norm = clip.vision_model.post_layernorm
    rows = rows.to(device=norm.weight.device, dtype=norm.weight.dtype)
    return clip.visual_projection(norm(rows)).float()


def logits_of(clip: CLIPModel, scores: torch.Tensor) -> torch.Tensor:
    """Float32 cosines at the CLIP's temperature, `(batch, num_classes)`."""
    return scores * clip.logit_scale.float().exp().to(scores.device)


class Tail(NamedTuple):
    """`post_layernorm`, projection and class embeddings as one affine map of a centred, scaled row, in float64."""

    weight: torch.Tensor
    """`C W diag(g)`, `(num_classes, hidden_size)`."""
    bias: torch.Tensor
    """`C W b`, `(num_classes,)`."""
    eps: float


def fold_tail(model: VS2CLIPForZeroShot, class_embeds: torch.Tensor, device: torch.device | str | None = None) -> Tail:
    """The [`Tail`] of a model and class embeddings `(num_classes, projection_dim)`, by default on the model's device.

    Raises:
        ValueError: the tail is not the affine LayerNorm and the linear map without bias that every `CLIPModel` has, or the
            embeddings have another width.
    """
    norm, projection = model.clip.vision_model.post_layernorm, model.clip.visual_projection
    if (
        type(norm) is not nn.LayerNorm
        or norm.bias is None
        or type(projection) is not nn.Linear
        or projection.bias is not None
    ):
        raise ValueError(
            f"Scores are worked out from post_layernorm and visual_projection as CLIPModel has them; these are {norm} and "
            f"{projection}. Put the CLIP's own back."
        )
    if class_embeds.ndim != 2 or class_embeds.shape[1] != projection.out_features:
        raise ValueError(
            f"class_embeds must be (num_classes, {projection.out_features}); they are {tuple(class_embeds.shape)}."
        )
    device = projection.weight.device if device is None else device
    matrix = class_embeds.to(device).double() @ projection.weight.to(device).double()
    return Tail(matrix * norm.weight.to(device).double(), matrix @ norm.bias.to(device).double(), norm.eps)


__all__ = ["Tail", "clip_embeds", "fold_tail", "logits_of"]
