"""The parts that a VS2 or SAE checkpoint stands for, found and loaded: its CLIP and its SAEs."""

from __future__ import annotations

import os
from typing import Any

from safetensors import safe_open
from transformers import CLIPConfig, CLIPModel, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from .base_model import loaded_revision
from .checkpoint_folder import CORPUS_FOLDER
from .configuration_sae import SAEConfig
from .configuration_vs2_clip import VS2CLIPConfig
from .corpus import RetrievalCorpus
from .modeling_sae import SAEModel


HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "_commit_hash")
"""Arguments of `from_pretrained` that say where a checkpoint is."""


def without_attention(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Loading arguments that an SAE understands: it has no attention to choose."""
    return {name: value for name, value in kwargs.items() if name != "attn_implementation"}


def load_clip(
    clip: CLIPModel | str | os.PathLike | None,
    config: SAEConfig | VS2CLIPConfig,
    place: dict[str, Any],
    kwargs: dict[str, Any],
) -> CLIPModel:
    """The CLIP given, or the one that the checkpoint's config names, at the revision it records."""
    if isinstance(clip, CLIPModel):
        return clip
    access = {name: value for name, value in place.items() if name not in ("revision", "subfolder", "_commit_hash")}
    name, revision = (clip, None) if clip is not None else (config.base_model_name_or_path, config.base_model_revision)
    if name is None:
        raise ValueError(
            "This checkpoint does not name the CLIP it belongs to. Give it: from_pretrained(..., clip=...)."
        )
    clip_dict, _ = PreTrainedConfig.get_config_dict(name, revision=revision or "main", **access)
    if clip_dict.get("model_type") != CLIPConfig.model_type:
        # transformers would load it as a CLIP with random weights.
        raise ValueError(f"{name} holds a model of type {clip_dict.get('model_type')!r}; expected a CLIP ('clip').")
    model = CLIPModel.from_pretrained(name, revision=revision or "main", **access, **kwargs)
    # Newer transformers forgets it, and what is saved again should name it again.
    model.config._commit_hash = revision or loaded_revision(model, access.get("cache_dir"))
    return model


def load_saes(
    name_or_path: str | os.PathLike, config: VS2CLIPConfig, place: dict[str, Any], kwargs: dict[str, Any]
) -> dict[int, SAEModel]:
    """The SAEs of a VS2 checkpoint, whose weights are named `saes.<layer>.<parameter>`."""
    path = cached_file(name_or_path, SAFE_WEIGHTS_NAME, **place)
    saes = {}
    with safe_open(path, framework="pt") as weights:
        for sae_config in config.sae_configs:
            layer = sae_config.layer
            prefix = f"saes.{layer}."
            names = [name for name in weights.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a dict)
            state = {name.removeprefix(prefix): weights.get_tensor(name) for name in names}
            if not state:
                raise ValueError(f"{path} holds no weights for the SAE of layer {layer} that its config.json names.")
            saes[layer] = SAEModel.from_pretrained(
                None, config=sae_config, state_dict=state, **without_attention(kwargs)
            )
    return saes


def load_corpus(name_or_path: str | os.PathLike, place: dict[str, Any]) -> RetrievalCorpus:
    """The corpus that a VS2 checkpoint holds beside its weights."""
    subfolder = "/".join(part for part in (place.get("subfolder"), CORPUS_FOLDER) if part)
    return RetrievalCorpus.from_pretrained(name_or_path, **{**place, "subfolder": subfolder})


__all__ = ["HUB_ARGUMENTS", "load_clip", "load_corpus", "load_saes", "without_attention"]
