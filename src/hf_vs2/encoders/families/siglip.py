"""SigLIP, and SigLIP 2 of fixed resolution, which has the same layout: no CLS token, so the pooled row after the
attention head is steered; nothing follows it. Scores are sigmoids with a bias; prompts are padded to full length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import SiglipConfig, SiglipModel

from .base import Family, register


_NOTHING = nn.Identity()


def _unit(embeds: torch.Tensor) -> torch.Tensor:
    return embeds / embeds.norm(p=2, dim=-1, keepdim=True)  # as SiglipModel writes it


def _sigmoid_loss(logits_per_text: torch.Tensor) -> torch.Tensor:
    """Each pair by itself: the text of an image should score high, all others low."""
    sign = 2 * torch.eye(logits_per_text.shape[0], device=logits_per_text.device) - 1
    return -F.logsigmoid(sign * logits_per_text).sum(-1).mean()


register(
    Family(
        "siglip",
        "siglip_vision_model",
        SiglipModel,
        SiglipConfig,
        site="pooled",
        fingerprint=("post_layernorm.weight", "post_layernorm.bias", "head.layernorm.weight", "head.layernorm.bias"),
        parts=("embeddings", "encoder", "post_layernorm", "head"),
        row=lambda outputs: outputs.pooler_output,
        norm=lambda model: _NOTHING,
        projection=lambda model: _NOTHING,
        row_weight="head.layernorm.weight",
        unit=_unit,
        loss=_sigmoid_loss,
        padding="max_length",
        reads_mask=False,
    )
)
