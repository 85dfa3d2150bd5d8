"""CLIP and the families that share its vision tower: the CLS row, LayerNorm, a projection, a softmax. MetaCLIP 2 is a
CLIP with another tokenizer, CLIPSeg's CLIP has a decoder beside it, and AltCLIP and ChineseCLIP have another text
tower. A vision tower with its projection is a CLIP without texts."""

from __future__ import annotations

from typing import Any

from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPModel,
    CLIPSegConfig,
    CLIPSegModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    MetaClip2Config,
    MetaClip2Model,
)

from .base import Family, register, tower_of


_TOWER: dict[str, Any] = {
    "site": "cls",
    "fingerprint": ("embeddings.class_embedding", "pre_layrnorm.weight", "post_layernorm.weight"),
    "parts": ("embeddings", "pre_layrnorm", "encoder", "post_layernorm"),
    "row": lambda outputs: outputs.last_hidden_state[:, 0],
    "norm": lambda model: tower_of(model).post_layernorm,
    "projection": lambda model: model.visual_projection,
    "row_weight": "post_layernorm.weight",
}
_CAUSAL: dict[str, Any] = {**_TOWER, "reads_to_end": True}

register(
    Family(
        "clip_vision_model",
        "clip_vision_model",
        CLIPVisionModelWithProjection,
        CLIPVisionConfig,
        **_TOWER,
        has_texts=False,
    )
)
register(Family("clip", "clip_vision_model", CLIPModel, CLIPConfig, **_CAUSAL))
register(Family("metaclip_2", "metaclip_2_vision_model", MetaClip2Model, MetaClip2Config, **_CAUSAL))
register(Family("clipseg", "clipseg_vision_model", CLIPSegModel, CLIPSegConfig, **_CAUSAL))
register(Family("altclip", "altclip_vision_model", AltCLIPModel, AltCLIPConfig, **_TOWER))
register(Family("chinese_clip", "chinese_clip_vision_model", ChineseCLIPModel, ChineseCLIPConfig, **_TOWER))
