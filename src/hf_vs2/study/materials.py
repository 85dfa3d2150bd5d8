"""What the workbench of a study hands out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import CLIPModel


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoder(NamedTuple):
    """A CLIP and what reads text and images for it."""

    clip: CLIPModel
    tokenizer: PreTrainedTokenizerBase
    image_processor: Any


class Neighbors(NamedTuple):
    """Nearest rows of the corpus for each evaluated image, nearest first; each tensor is `(n, num_neighbors)`."""

    similarity: torch.Tensor
    indices: torch.Tensor


class DeepFeatures(NamedTuple):
    """Unit image embeddings `(n, projection_dim)` of a model with steered inner layers, and the last layer's FVU
    `(n,)`."""

    features: torch.Tensor
    fvu: torch.Tensor


@dataclass(frozen=True)
class SAESpec:
    """Which SAE of the study."""

    trained_on: tuple[str, ...]
    seed: int
    top_k: int
    expansion_factor: int
    layer: int = -1
    share: float = 1.0
    pass_weight: float = 0.0
