"""Vision towers that stand by themselves, such as DINOv2: what they give is the row that is steered; nothing follows
it, and there are no texts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ViTConfig,
    ViTModel,
)

from .base import Family, nothing, register


def _pooled(outputs: Any) -> torch.Tensor:
    """Its `pooler_output`; without a pooler the CLS token."""
    return outputs.last_hidden_state[:, 0] if outputs.pooler_output is None else outputs.pooler_output


for _model, _config, _norm in (
    (Dinov2Model, Dinov2Config, "layernorm"),
    (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, "layernorm"),
    (DINOv3ViTModel, DINOv3ViTConfig, "norm"),
    (ViTModel, ViTConfig, "layernorm"),
):
    register(
        Family(
            _config.model_type,
            _config.model_type,
            _model,
            _config,
            site="pooled",
            fingerprint=(f"{_norm}.weight", f"{_norm}.bias"),
            parts=("embeddings", _norm),
            row=_pooled,
            norm=nothing,
            projection=nothing,
            row_weight=f"{_norm}.weight",
            has_texts=False,
        )
    )
