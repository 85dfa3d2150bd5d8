"""What a family of encoders is, the registry of all that can be steered, and the refusal of all others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from ...files.json_files import read_object
from ...files.place import look_for


_NOTHING = nn.Identity()


def nothing(model: Any) -> nn.Module:
    """The norm or projection of a family that has none."""
    return _NOTHING


def clip_unit(embeds: torch.Tensor) -> torch.Tensor:
    """Written as CLIPModel writes it; `F.normalize` rounds differently in the last bit. Where that divides by 0, this
    gives 0."""
    length = embeds.pow(2).sum(dim=-1, keepdim=True).pow(0.5)
    return embeds / torch.where(length > 0, length, 1)


def norm_unit(embeds: torch.Tensor) -> torch.Tensor:
    """Written as SiglipModel and VisionTextDualEncoderModel write it."""
    return embeds / embeds.norm(p=2, dim=-1, keepdim=True)


def contrastive_loss(logits_per_text: torch.Tensor) -> torch.Tensor:
    """CLIP's."""
    target = torch.arange(len(logits_per_text), device=logits_per_text.device)
    return (F.cross_entropy(logits_per_text, target) + F.cross_entropy(logits_per_text.t(), target)) / 2


@dataclass(frozen=True)
class Family:
    """
    Encoders that are steered in the same way. One file of this folder each, or one for several that differ in names.

    The model itself must have, as transformers' CLIP has: `vision_model`; with texts `text_model` (with a position
    embedding), `get_text_features(...).pooler_output` and `logit_scale`, and `logit_bias` if its scores are sigmoids.
    For rows of inner layers its tower must have `embeddings`, `pre_layrnorm` and `encoder.layers` with `self_attn`.

    Args:
        model_type (`str`), tower_type (`str`): of the model's configuration, and of its vision tower's.
        model, config: the classes of transformers.
        site (`str`): which row is steered: `"cls"`, a token's, after any layer; or `"pooled"`, what the tower gives,
            after the last layer alone.
        fingerprint (`tuple[str, ...]`): weights of the vision tower, all vectors, by which a model is known again.
        parts (`tuple[str, ...]`): attributes that its vision tower must have, or it is refused by name.
        row (`(outputs) -> torch.Tensor`): the row `(batch, hidden_size)` of the last layer, in the tower's output.
        norm, projection (`(model) -> nn.Module`): the tail, from that row to the image features.
        row_weight (`str`): a weight of the vision tower whose device and dtype rows are given in.
        unit (`(embeds) -> torch.Tensor`): unit length as the model itself works it out, bit for bit.
        loss (`(logits_per_text) -> torch.Tensor`): the model's own.
        padding (`str` or `bool`): how prompts are padded.
        reads_mask (`bool`): whether the text tower is given their attention mask.
        reads_to_end (`bool`): whether it sees nothing of a text behind the first end token, as CLIP's.
        has_texts (`bool`): whether there is a text tower. Without, embeddings of labels have to be given.
        any_tower (`bool`): whether the vision tower may be of any family, whose site and row are then taken.
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
    unit: Callable[[torch.Tensor], torch.Tensor] = clip_unit
    loss: Callable[[torch.Tensor], torch.Tensor] = contrastive_loss
    padding: str | bool = True
    reads_mask: bool = True
    reads_to_end: bool = False
    has_texts: bool = True
    any_tower: bool = False

    @property
    def has_tokens(self) -> bool:
        """Whether rows of inner layers can be read and steered."""
        return self.site == "cls"

    def around(self, tower: Family) -> Family:
        """This family with the vision tower of another one."""
        own = ("site", "fingerprint", "parts", "row", "norm", "row_weight", "tower_type")
        return replace(self, **{name: getattr(tower, name) for name in own})


FAMILIES: dict[str, Family] = {}
"""By `model_type`, and by that of the vision tower."""


def register(family: Family, exist_ok: bool = False) -> None:
    """
    Make a family known everywhere.

    Args:
        family ([`Family`]): the family.
        exist_ok (`bool`): let it take the place of another of its `model_type`.

    Raises:
        `ValueError`: there is one of that `model_type`.
    """
    if FAMILIES.get(family.model_type, family) is not family and not exist_ok:
        raise ValueError(f"There is a family {family.model_type!r} already; exist_ok=True puts yours in its place.")
    FAMILIES[family.model_type] = family
    FAMILIES.setdefault(family.tower_type, family)


def steerable() -> list[str]:
    """`model_type` of the models with texts that can be steered."""
    return [name for name, family in FAMILIES.items() if name == family.model_type and family.has_texts]


def family_of(model: Any) -> Family:
    """The family of a model, or of a vision tower; a `ValueError` if it is of none."""
    config = getattr(model, "config", None) or model.vision_model.config
    return family_of_config(config, config._name_or_path or type(model).__name__)


def family_of_config(config: Any, where: str) -> Family:
    """The same by the configuration; `where` is what a message names."""
    refuse_family(config.model_type, where, tower=True)
    family = FAMILIES[config.model_type]
    if family.any_tower:
        return family.around(family_of_config(config.vision_config, f"The vision tower of {where}"))
    return family


def is_steerable(model: Any) -> bool:
    """Whether it is a model of a registered family."""
    return any(isinstance(model, family.model) for family in FAMILIES.values())


def tower_of(model: Any) -> Any:
    """The vision tower of a model; one that stands by itself is its own."""
    while hasattr(model, "vision_model"):
        model = model.vision_model
    return model


def vision_config_of(config: Any) -> Any:
    """The part of a model's configuration that is its vision tower's."""
    return getattr(config, "vision_config", config)


def embedding_width(clip: Any) -> int:
    """Width of its image and text features."""
    projection = family_of(clip).projection(clip)
    return getattr(projection, "out_features", None) or tower_of(clip).config.hidden_size


def refuse_family(model_type: str | None, where: str, tower: bool = False) -> None:
    """Raises a `ValueError` that names `where` if nothing can steer a model of this type yet. `tower`: whether the
    vision tower of a family will do."""
    family = FAMILIES.get(str(model_type))
    if family is not None and (tower or family.model_type == model_type):
        return
    if model_type == "siglip2":
        raise ValueError(
            f"{where} is a SigLIP 2 of flexible resolution, whose images are lists of patches of their own shape: it "
            "can't be steered yet. Take one of fixed resolution, such as google/siglip2-base-patch16-224."
        )
    raise ValueError(
        f"{where} holds a model of type {model_type!r}; expected a CLIP ({', '.join(map(repr, steerable()))}). No "
        "other family can be steered yet."
    )


def refuse_without_texts(clip: Any) -> None:
    """Raises `ValueError` on a model to which labels say nothing."""
    if not family_of(clip).has_texts:
        raise ValueError(
            f"A {type(clip).__name__} has no text tower, so it can't read labels. Give the embeddings of the labels "
            "themselves in the place of the tokenizer: a dict of label -> embedding."
        )


def recorded_family(name: str, revision: str | None) -> str | None:
    """The `model_type` of a model that a file names, without asking the Hub; `None` where its configuration is not
    here."""
    try:
        path = look_for(name, CONFIG_NAME, {"revision": revision or "main", "local_files_only": True})
        return None if path is None else read_object(path).get("model_type")
    except (OSError, ValueError):
        return None
