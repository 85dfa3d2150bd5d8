"""SigLIP, and SigLIP 2 of fixed resolution, which has the same layout: no CLS token, so the pooled row after the
attention head is steered; nothing follows it. Scores are sigmoids with a bias; prompts are padded to full length."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from .base import Family, norm_unit, nothing, register


def _sigmoid_loss(logits_per_text: torch.Tensor) -> torch.Tensor:
    """Each pair by itself: the text of an image should score high, all others low."""
    sign = 2 * torch.eye(logits_per_text.shape[0], device=logits_per_text.device) - 1
    return -F.logsigmoid(sign * logits_per_text).sum(-1).mean()


_TOWER: dict[str, Any] = {
    "site": "pooled",
    "fingerprint": ("post_layernorm.weight", "post_layernorm.bias", "head.layernorm.weight", "head.layernorm.bias"),
    "parts": ("embeddings", "encoder", "post_layernorm", "head"),
    "row": lambda outputs: outputs.pooler_output,
    "norm": nothing,
    "projection": nothing,
    "row_weight": "head.layernorm.weight",
}
_TYPE = "siglip_vision_model"

register(Family(_TYPE, _TYPE, SiglipVisionModel, SiglipVisionConfig, **_TOWER, has_texts=False))
register(
    Family(
        "siglip",
        _TYPE,
        SiglipModel,
        SiglipConfig,
        **_TOWER,
        unit=norm_unit,
        loss=_sigmoid_loss,
        padding="max_length",
        reads_mask=False,
    )
)
