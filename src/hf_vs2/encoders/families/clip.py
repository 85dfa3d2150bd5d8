"""CLIP, and MetaCLIP 2, which is a CLIP with another tokenizer: the CLS row, LayerNorm, a projection, a softmax."""

from __future__ import annotations

from typing import Any

from transformers import CLIPConfig, CLIPModel, MetaClip2Config, MetaClip2Model

from .base import Family, clip_unit, contrastive_loss, register


_AS_IN_CLIP: dict[str, Any] = {
    "site": "cls",
    "fingerprint": ("embeddings.class_embedding", "pre_layrnorm.weight", "post_layernorm.weight"),
    "parts": ("embeddings", "pre_layrnorm", "encoder", "post_layernorm"),
    "row": lambda outputs: outputs.last_hidden_state[:, 0],
    "norm": lambda model: model.vision_model.post_layernorm,
    "projection": lambda model: model.visual_projection,
    "row_weight": "post_layernorm.weight",
    "unit": clip_unit,
    "loss": contrastive_loss,
}

register(Family("clip", "clip_vision_model", CLIPModel, CLIPConfig, **_AS_IN_CLIP))
register(Family("metaclip_2", "metaclip_2_vision_model", MetaClip2Model, MetaClip2Config, **_AS_IN_CLIP))
