"""What a family of encoders is, the registry of all that can be steered, and the refusal of all others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from ...files.json_files import read_object
from ...files.place import look_for


@dataclass(frozen=True)
class Family:
    """
    Encoders of images and texts that are steered in the same way. One file of this folder each.

    Args:
        model_type (`str`), tower_type (`str`): of the model's configuration, and of its vision tower's.
        model, config: the classes of transformers.
        site (`str`): which row is steered: `"cls"`, a token's, after any layer; or `"pooled"`, what the tower gives,
            after the last layer alone.
        fingerprint (`tuple[str, ...]`): weights of the vision tower, all vectors, by which a model is known again.
        parts (`tuple[str, ...]`): what its vision tower has.
        row (`(outputs) -> torch.Tensor`): the row `(batch, hidden_size)` of the last layer, in the tower's output.
        norm, projection (`(model) -> nn.Module`): the tail, from that row to the image features.
        row_weight (`str`): a weight of the vision tower whose device and dtype rows are given in.
        unit (`(embeds) -> torch.Tensor`): unit length as the model itself works it out, bit for bit.
        loss (`(logits_per_text) -> torch.Tensor`): the model's own.
        padding (`str` or `bool`): how prompts are padded.
        reads_mask (`bool`): whether the text tower is given their attention mask.
    """

    model_type: str
    tower_type: str
    model: type[PreTrainedModel]
    config: type[PreTrainedConfig]
    site: str
    fingerprint: tuple[str, ...]
    parts: tuple[str, ...]
    row: Callable[[Any], torch.Tensor]
    norm: Callable[[Any], nn.Module]
    projection: Callable[[Any], nn.Module]
    row_weight: str
    unit: Callable[[torch.Tensor], torch.Tensor]
    loss: Callable[[torch.Tensor], torch.Tensor]
    padding: str | bool = True
    reads_mask: bool = True

    @property
    def has_tokens(self) -> bool:
        """Whether rows of inner layers can be read and steered."""
        return self.site == "cls"


FAMILIES: dict[str, Family] = {}
"""By `model_type`, and by that of the vision tower."""


def register(family: Family) -> None:
    """Make a family known everywhere."""
    FAMILIES[family.model_type] = FAMILIES[family.tower_type] = family


def steerable() -> list[str]:
    """`model_type` of the models that can be steered."""
    return [name for name, family in FAMILIES.items() if name == family.model_type]


def family_of(model: Any) -> Family:
    """The family of a model, or of a vision tower.

    Raises:
        `ValueError`: it is of none.
    """
    config = getattr(model, "config", None) or model.vision_model.config
    refuse_family(config.model_type, config._name_or_path or type(model).__name__, tower=True)
    return FAMILIES[config.model_type]


def is_steerable(model: Any) -> bool:
    """Whether it is a model of a registered family, with texts."""
    return any(isinstance(model, family.model) for family in FAMILIES.values())


def embedding_width(clip: Any) -> int:
    """Width of its image and text features."""
    return getattr(clip.config, "projection_dim", None) or clip.vision_model.config.hidden_size


def clip_unit(embeds: torch.Tensor) -> torch.Tensor:
    """Written as CLIPModel writes it; `F.normalize` rounds differently in the last bit. Where that divides by 0, this
    gives 0."""
    length = embeds.pow(2).sum(dim=-1, keepdim=True).pow(0.5)
    return embeds / torch.where(length > 0, length, 1)


def contrastive_loss(logits_per_text: torch.Tensor) -> torch.Tensor:
    """CLIP's."""
    target = torch.arange(len(logits_per_text), device=logits_per_text.device)
    return (F.cross_entropy(logits_per_text, target) + F.cross_entropy(logits_per_text.t(), target)) / 2


def refuse_family(model_type: str | None, where: str, tower: bool = False) -> None:
    """
    Args:
        model_type: of a model's configuration.
        where: what the message names.
        tower: whether a vision tower alone will do.

    Raises:
        `ValueError`: if nothing can steer such a model yet.
    """
    family = FAMILIES.get(str(model_type))
    if family is None or (model_type == family.tower_type and not tower):
        raise ValueError(
            f"{where} holds a model of type {model_type!r}; expected a CLIP ({', '.join(map(repr, steerable()))}). No "
            "other family can be steered yet."
        )


def recorded_family(name: str, revision: str | None) -> str | None:
    """The `model_type` of a model that a file names, without asking the Hub; `None` where its configuration is not
    here."""
    try:
        path = look_for(name, CONFIG_NAME, {"revision": revision or "main", "local_files_only": True})
        return None if path is None else read_object(path).get("model_type")
    except (OSError, ValueError):
        return None
