"""VisionTextDualEncoder: a vision tower of any family here, any text tower, and projections of both."""

from __future__ import annotations

from dataclasses import replace

from transformers import VisionTextDualEncoderConfig, VisionTextDualEncoderModel

from .base import FAMILIES, norm_unit, register


_NAME = "vision-text-dual-encoder"

register(
    replace(
        FAMILIES["vit"],
        model_type=_NAME,
        model=VisionTextDualEncoderModel,
        config=VisionTextDualEncoderConfig,
        projection=lambda model: model.visual_projection,
        unit=norm_unit,
        has_texts=True,
        any_tower=True,
    )
)
