"""The parts that a VS2 or SAE checkpoint stands for, found and loaded: its CLIP and its SAEs."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel, PreTrainedConfig, PreTrainedModel

from ..config.checks import refuse_kernels
from ..config.sae import SAEConfig
from ..config.vs2_clip import VS2CLIPConfig
from ..encoders.base_model import check_base_model, loaded_revision, resolve_layer
from ..encoders.processing import load_processing
from ..files.checkpoint_folder import CORPUS_FOLDER
from ..files.weight_files import HUB_ARGUMENTS, WeightFiles, check_numbers, in_one_message, refuse_variant
from ..sae.modeling import SAEModel
from ..steering.corpus import RetrievalCorpus


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
    refuse_variant(kwargs)
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
    refuse_kernels(clip_dict, name)
    asked = {"revision": revision or "main", "output_loading_info": True, **access, **kwargs}
    model, loading = in_one_message(lambda: CLIPModel.from_pretrained(name, **asked), name)
    if loading["missing_keys"]:
        # transformers has filled them in at random.
        raise ValueError(
            f"{name} is damaged: it has no {min(loading['missing_keys'])}. Save or download that CLIP again."
        )
    _refuse_offloaded(model, name)
    check_numbers(model.named_parameters(), name)
    # Newer transformers forgets it, and what is saved again should name it again.
    model.config._commit_hash = revision or loaded_revision(model, access.get("cache_dir"))
    return model


def load_saes(
    name_or_path: str | os.PathLike, config: VS2CLIPConfig, place: dict[str, Any], kwargs: dict[str, Any]
) -> dict[int, SAEModel]:
    """The SAEs of a VS2 checkpoint, whose weights are named `saes.<layer>.<parameter>`."""
    files = WeightFiles.find(name_or_path, place)
    if config.holds_clip:  # whose weights are not wanted: another CLIP was given
        files = files.only("saes.")
    files.check(sae_tensors(config, files.source))
    state = files.read()
    saes = {}
    for sae_config in config.sae_configs:
        prefix = f"saes.{sae_config.layer}."
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        saes[sae_config.layer] = SAEModel.from_pretrained(
            None, config=sae_config, state_dict=own, **without_attention(kwargs)
        )
    return saes


def load_full(
    model_class: Any,
    name_or_path: str | os.PathLike,
    config: VS2CLIPConfig,
    place: dict[str, Any],
    kwargs: dict[str, Any],
) -> Any:
    """
    A VS2 checkpoint that holds its CLIP.

    Args:
        model_class: `PreTrainedModel.from_pretrained`, bound to the class.
    """
    refuse_variant(kwargs)
    files = WeightFiles.find(name_or_path, place)
    sizes = in_one_message(lambda: _sizes_of_clip(config, files), files.source)
    files.check(sae_tensors(config, files.source) | sizes)
    model, loading = in_one_message(
        lambda: model_class(None, config=config, state_dict=files.read(), output_loading_info=True, **kwargs),
        files.source,
    )
    if loading["missing_keys"] or loading["unexpected_keys"]:
        raise ValueError(f"{files.source} is not what this version writes: {loading}. Save the checkpoint again.")
    _refuse_offloaded(model, name_or_path)
    model.config.name_or_path = model.name_or_path = str(name_or_path)
    return model


def _refuse_offloaded(model: PreTrainedModel, name: str | os.PathLike) -> None:
    """Steering goes through parts of the CLIP that the hooks which bring offloaded weights back do not know of."""
    away = [parameter for parameter, tensor in model.named_parameters() if tensor.is_meta]
    if away:
        raise ValueError(
            f"{name} was loaded with weights left on the disk or in the host's memory ({away[0]} is one), which steering can't run "
            "from. Give a device_map that places all of them, such as device_map='cpu'."
        )


def _sizes_of_clip(config: VS2CLIPConfig, files: WeightFiles) -> dict[str, tuple[int, ...]]:
    """The tensors of the CLIP that the config describes, without making them."""
    clip_config: Any = config.clip_config
    for part in (clip_config.vision_config, clip_config.text_config):
        if part.num_hidden_layers > len(files.shapes):
            raise ValueError(
                f"by its config.json {files.source} has {part.num_hidden_layers} layers; it holds fewer tensors."
            )
    with torch.device("meta"):
        clip = CLIPModel(clip_config)
    return {f"clip.{name}": tuple(tensor.shape) for name, tensor in clip.state_dict().items()}


def sae_tensors(config: VS2CLIPConfig, source: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a VS2 checkpoint's SAEs, and their shapes."""
    layers = [sae.layer for sae in config.sae_configs]
    if not layers or len(set(layers)) < len(layers) or None in layers:
        raise ValueError(f"The config.json beside {source} must name one SAE a layer; it names layers {layers}.")
    return {
        f"saes.{sae.layer}.{name}": shape for sae in config.sae_configs for name, shape in sae.tensor_shapes.items()
    }


def load_corpus(name_or_path: str | os.PathLike, place: dict[str, Any]) -> RetrievalCorpus:
    """The corpus that a VS2 checkpoint holds beside its weights."""
    subfolder = "/".join(part for part in (place.get("subfolder"), CORPUS_FOLDER) if part)
    return RetrievalCorpus.from_pretrained(name_or_path, **{**place, "subfolder": subfolder})


def find_processing(model: PreTrainedModel, source: str | None, place: dict[str, Any]) -> tuple[Any, Any]:
    """Tokenizer and image processor of a model: of the checkpoint that it was loaded from (`source`, at `place`) where that has them,
    else of the CLIP that it names."""
    missing: Exception = ValueError(
        "This model does not say where its CLIP came from: give tokenizer= and image_processor= too."
    )
    if source is not None:
        try:
            return load_processing(source, **place)
        except (OSError, ValueError) as error:
            missing = error
    clip: Any = getattr(model, "clip", model)
    name = clip.config._name_or_path
    if not name or name == source:
        raise missing
    access = {key: value for key, value in place.items() if key not in ("revision", "subfolder")}
    return load_processing(name, loaded_revision(clip, access.get("cache_dir")), **access)


def at_layer(config: SAEConfig, layer: int) -> SAEConfig:
    config = copy.deepcopy(config)
    config.layer = layer
    config.holds_statistics = False  # those of the whole checkpoint lie beside it
    return config


def layer_of(config: SAEConfig, clip: CLIPModel) -> int:
    return resolve_layer(-1 if config.layer is None else config.layer, clip.vision_model.config.num_hidden_layers)


def check_widths(saes: Mapping[int, SAEModel], clip: CLIPModel) -> None:
    width = clip.vision_model.config.hidden_size
    for layer, sae in saes.items():
        if sae.config.hidden_size != width:
            raise ValueError(
                f"The SAE of layer {layer} reads {sae.config.hidden_size} features, the vision tower gives {width}: they do not "
                "belong together."
            )


def saes_by_layer(clip: CLIPModel, sae: SAEModel | Mapping[int, SAEModel] | None) -> dict[int, SAEModel]:
    if not isinstance(clip, CLIPModel):
        raise TypeError(f"clip must be a transformers CLIPModel, not {type(clip).__name__}.")
    given = {layer_of(sae.config, clip): sae} if isinstance(sae, SAEModel) else sae
    if not isinstance(given, Mapping) or not given or not all(isinstance(one, SAEModel) for one in given.values()):
        raise TypeError("sae must be an SAEModel, or a dict of layer index -> SAEModel with at least one entry.")
    num_layers = clip.vision_model.config.num_hidden_layers
    saes = {}
    for layer, one in given.items():
        check_base_model(clip, one.config)
        index = resolve_layer(layer, num_layers)
        if index in saes:
            raise ValueError(f"Two SAEs for layer {index}: give one a layer.")
        if one.config.layer not in (None, index):
            raise ValueError(f"The SAE given for layer {index} was trained on layer {one.config.layer}.")
        saes[index] = one
    return saes


__all__ = [
    "HUB_ARGUMENTS",
    "at_layer",
    "check_widths",
    "find_processing",
    "layer_of",
    "load_clip",
    "load_corpus",
    "load_full",
    "load_saes",
    "saes_by_layer",
    "without_attention",
]
