"""The parts that a VS2 or SAE checkpoint stands for, found and loaded: its CLIP and its SAEs."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import CLIPModel, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from ..config.sae import SAEConfig
from ..config.vs2_clip import VS2CLIPConfig
from ..encoders.base_model import check_base_model, loaded_revision, resolve_layer
from ..encoders.families import FAMILIES, family_of, is_steerable, steerable, tower_of, vision_config_of
from ..encoders.loading import check_clip, load_clip, spread
from ..encoders.processing import holds, load_image_processor, load_tokenizer
from ..encoders.wrapped import is_quantised, unwrapped
from ..files.checkpoint_folder import CORPUS_FILES, CORPUS_FOLDER, PROCESSOR_FILES, TOKENIZER_FILES
from ..files.place import refuse_variant
from ..files.weight_files import WeightFiles, in_one_message
from ..methods import method_named
from ..sae.modeling import SAEModel
from ..steering.corpus import RetrievalCorpus


logger = logging.get_logger(__name__)

_TOWERS = ("vision_config", "text_config")


def options_of(part: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Loading arguments as one part of a checkpoint takes them, its CLIP (`"clip"`) or an SAE (`"saes.11"`), which is
    loaded by itself: its part of a `device_map` by names of modules, and what is said of the CLIP's attention. A
    `device_map` that names something else than the parts of this model is a `ValueError`."""
    own = {name: value for name, value in options.items() if part == "clip" or name != "attn_implementation"}
    attention, devices = own.get("attn_implementation"), own.get("device_map")
    if isinstance(attention, Mapping):
        of_all = attention.get("clip_config", {})
        of_all = dict.fromkeys(("", "vision_config", "text_config"), of_all) if isinstance(of_all, str) else of_all
        own["attn_implementation"] = {**of_all, **{key: attention[key] for key in _TOWERS if key in attention}}
    if isinstance(devices, Mapping):
        strange = [name for name in devices if name.partition(".")[0] not in ("", "clip", "saes")]
        if strange:
            raise ValueError(
                f"device_map names {strange[0]!r}; the parts of a steered CLIP are 'clip' (such as "
                "'clip.vision_model') and 'saes' (such as 'saes.11')."
            )
        around = {
            name: device for name, device in devices.items() if f"{part}.".startswith(f"{name}." if name else "")
        }
        inside = {name: device for name, device in devices.items() if name.startswith(f"{part}.")}
        if not around and not inside:
            raise ValueError(f"device_map says nothing of {part!r}. Give it a device there too.")
        whole = {"": around[max(around, key=len)]} if around else {}
        own["device_map"] = whole | {name.removeprefix(f"{part}."): device for name, device in inside.items()}
    return own


def clip_of(
    clip: nn.Module | str | os.PathLike | None,
    config: SAEConfig | VS2CLIPConfig,
    checkpoint: str | os.PathLike,
    place: dict[str, Any],
    kwargs: dict[str, Any],
) -> CLIPModel:
    """The CLIP given, or the one that the checkpoint's config names, at the revision it records."""
    refuse_variant(kwargs)
    if isinstance(clip, nn.Module):
        return cast(CLIPModel, unwrapped(clip))
    access = {name: value for name, value in place.items() if name not in ("revision", "subfolder", "_commit_hash")}
    name, revision = (clip, None) if clip is not None else (config.base_model_name_or_path, config.base_model_revision)
    give = "Give the CLIP itself: clip= (on the command line --clip)."
    if name is None:
        raise ValueError(f"{checkpoint} does not name the CLIP it belongs to. {give}")
    try:
        return load_clip(name, {**access, "revision": revision}, **options_of("clip", kwargs))
    except (OSError, ValueError) as error:
        if clip is not None:
            raise
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{checkpoint} names {name} as its CLIP, which can't be loaded. {error} {give}") from error


def load_saes(
    name_or_path: str | os.PathLike, config: VS2CLIPConfig, place: dict[str, Any], kwargs: dict[str, Any]
) -> dict[int, SAEModel]:
    """The SAEs of a VS2 checkpoint, whose weights are named `saes.<layer>.<parameter>`."""
    files = WeightFiles.find(name_or_path, place)
    if config.holds_clip:  # whose weights are not wanted: another CLIP was given
        files = files.only("saes.")
    files.check(sae_tensors(config, files.source))
    state = files.read(config.digests)
    saes = {}
    for sae_config in config.sae_configs:
        prefix = f"saes.{sae_config.layer}."
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        saes[sae_config.layer] = SAEModel.from_pretrained(
            None, config=sae_config, state_dict=own, **options_of(prefix.rstrip("."), kwargs)
        )
    return saes


def load_full(
    from_pretrained: Any,
    name_or_path: str | os.PathLike,
    config: VS2CLIPConfig,
    place: dict[str, Any],
    kwargs: dict[str, Any],
) -> Any:
    """A VS2 checkpoint that holds its CLIP, by `PreTrainedModel.from_pretrained` bound to the class."""
    refuse_variant(kwargs)
    files = WeightFiles.find(name_or_path, place)
    sizes = in_one_message(lambda: _sizes_of_clip(config, files), files.source)
    files.check(sae_tensors(config, files.source) | sizes)
    own = dict(kwargs) | ({"device_map": spread(kwargs["device_map"], files.shapes)} if "device_map" in kwargs else {})
    if isinstance(own.get("attn_implementation"), dict):
        own["attn_implementation"] = {"clip_config": options_of("clip", own)["attn_implementation"]}
    model, loading = in_one_message(
        lambda: from_pretrained(
            None, config=config, state_dict=files.read(config.digests), output_loading_info=True, **own
        ),
        files.source,
    )
    if loading["missing_keys"] or loading["unexpected_keys"]:
        raise ValueError(f"{files.source} is not what this version writes: {loading}. Save the checkpoint again.")
    check_clip(model.clip, files.source, read=False)
    model.config.name_or_path = model.name_or_path = str(name_or_path)
    return model


def _sizes_of_clip(config: VS2CLIPConfig, files: WeightFiles) -> dict[str, tuple[int, ...]]:
    """The tensors of the CLIP that the config describes, without making them."""
    clip_config: Any = config.clip_config
    for part in (vision_config_of(clip_config), getattr(clip_config, "text_config", clip_config)):
        if part.num_hidden_layers > len(files.shapes):
            raise ValueError(
                f"by its config.json {files.source} has {part.num_hidden_layers} layers; it holds fewer tensors."
            )
    return _clip_tensors(clip_config, as_saved=True)


def _clip_tensors(clip_config: Any, as_saved: bool = False) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights by their names in the model, or in files, where transformers keeps the names that a
    family's first checkpoints had."""
    with torch.device("meta"):
        clip = FAMILIES[clip_config.model_type].model(clip_config)
    state = clip.state_dict()
    state = revert_weight_conversion(clip, state) if as_saved else state
    return {f"clip.{name}": tuple(tensor.shape) for name, tensor in state.items()}


def sae_tensors(config: VS2CLIPConfig, source: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a VS2 checkpoint's SAEs, and their shapes."""
    layers = [sae.layer for sae in config.sae_configs]
    if not layers or len(set(layers)) < len(layers) or None in layers:
        raise ValueError(f"The config.json beside {source} must name one SAE a layer; it names layers {layers}.")
    return {
        f"saes.{sae.layer}.{name}": shape for sae in config.sae_configs for name, shape in sae.tensor_shapes.items()
    }


def refuse_adapters(state: Mapping[str, torch.Tensor], config: VS2CLIPConfig) -> None:
    """Raises `ValueError` on tensors to be saved that no checkpoint has a place for: nothing would be lost now, but it
    could not be loaded."""
    known = _clip_tensors(config.clip_config)
    strange = sorted(name for name in state if name not in known and not re.fullmatch(r"saes\.\d+\.\w+", name))
    if strange:
        raise ValueError(
            f"{strange[0]} is no weight of a CLIP or an SAE, so a checkpoint can't hold it. Merge an adapter such as "
            "a LoRA into the weights first (merge_and_unload() of peft), and take other wrappers off; or save the "
            "adapter by itself."
        )
    away = next((name for name, weight in state.items() if weight.is_meta), None)
    if away is not None:
        raise ValueError(
            f"{away} is not in memory (it is offloaded), so it can't be saved: load the model whole first."
        )


def refuse_quantised(state: Mapping[str, torch.Tensor]) -> None:
    """Raises `ValueError` on weights of the CLIP that a full checkpoint can't hold."""
    name = next((name for name, weight in state.items() if is_quantised(weight)), None)
    if name is not None:
        raise ValueError(
            f"{name} is quantised ({type(state[name]).__name__}), which a full checkpoint can't hold. Save it with "
            "full=False, and quantise the model that is loaded again; or save it before it is quantised."
        )


def saved_full(
    state: Mapping[str, torch.Tensor], config: VS2CLIPConfig, full: bool | None, cache_dir: Any = None
) -> bool:
    """Whether a checkpoint of these tensors is to hold the CLIP's weights, where `full` was asked for. A `ValueError`
    if it is not to hold them, and would lose them."""
    name = config.base_model_name_or_path
    if full or (full is None and name is None):
        return True
    if name is None:
        raise ValueError(
            "A light checkpoint names its CLIP, but this CLIP was not loaded from a Hub id or a path. "
            "Save it with full=True, or load the CLIP by from_pretrained first."
        )
    try:
        place = {"local_files_only": True, "revision": config.base_model_revision, "cache_dir": cache_dir}
        named = load_clip(name, place, dtype="auto")
    except (OSError, ValueError) as error:
        if full is None:
            logger.warning(
                f"{name}, which the checkpoint names, can't be read here ({error}), so nobody knows whether the "
                "CLIP's weights are still its own: they are saved too. full=False leaves them out."
            )
        return full is None
    others = [key for key, weight in named.state_dict().items() if not _is_same(state.get(f"clip.{key}"), weight)]
    others += _other_settings(config.clip_config, named.config)
    if not others:
        return False
    differs = (
        f"The CLIP's weights and settings are not those of {name}, which the checkpoint names ({others[0]} is one): "
        "it was fine-tuned."
    )
    if full is False:
        raise ValueError(f"{differs} A light checkpoint would lose them: save it with full=True.")
    logger.warning(f"{differs} They are saved too (full=True).")
    return True


def _other_settings(ours: Any, named: Any) -> Iterator[str]:
    """What two configurations of CLIPs with the same weights differ in that changes what they compute."""
    for part in ("text_config", "vision_config"):
        for name in ("hidden_act", "layer_norm_eps", "eos_token_id"):
            left, right = (getattr(getattr(config, part, None), name, None) for config in (ours, named))
            if left != right:
                yield f"{part}.{name}"


def _is_same(weight: torch.Tensor | None, named: torch.Tensor) -> bool:
    """Whether a weight is that of the CLIP as it lies on the disk, be it that it has been in half precision since."""
    if weight is None or weight.shape != named.shape:
        return False
    if is_quantised(weight):  # what is left in full precision tells of a fine-tuning
        return True
    weight = weight.detach().cpu()
    kinds = (weight.dtype, torch.bfloat16, torch.float16)
    return any(torch.equal(weight, named.to(kind).to(weight.dtype)) for kind in kinds)


def load_corpus(
    name_or_path: str | os.PathLike, place: dict[str, Any], digests: Mapping[str, str] | None
) -> RetrievalCorpus:
    """The corpus that a VS2 checkpoint holds beside its weights."""
    subfolder = "/".join(part for part in (place.get("subfolder"), CORPUS_FOLDER) if part)
    digest = (digests or {}).get(CORPUS_FILES[1])
    return RetrievalCorpus.from_pretrained(name_or_path, **{**place, "subfolder": subfolder, "digest": digest})


def find_processing(model: PreTrainedModel, source: str | None, place: dict[str, Any]) -> tuple[Any, Any]:
    """Tokenizer (`None` of a model without texts) and image processor of a model: of the checkpoint that it was loaded
    from (`source`, at `place`) where that has files of them, else of the CLIP that it names. An `OSError` if neither
    has them; a `ValueError` if files are damaged, or the model does not say where it comes from."""
    clip: Any = getattr(model, "clip", model)
    name = clip.config._name_or_path
    access = {key: value for key, value in place.items() if key not in ("revision", "subfolder")}

    def find(files: tuple[str, ...], load: Callable[..., Any]) -> Any:
        if source is not None and (name in (None, "", source) or holds(source, files, place)):
            return load(source, place)
        if name:
            return load(name, {**access, "revision": loaded_revision(clip, access.get("cache_dir")) or "main"})
        raise ValueError("This model does not say where its CLIP came from: give tokenizer= and image_processor= too.")

    tokenizer = find(TOKENIZER_FILES, load_tokenizer) if family_of(clip).has_texts else None
    return tokenizer, find(PROCESSOR_FILES, load_image_processor)


def processing_of(model: PreTrainedModel, processor: Any) -> tuple[Any, Any]:
    """Tokenizer and image processor: those given, or those of where the model was loaded from."""
    if processor is None:
        return find_processing(model, model.config._name_or_path or None, getattr(model, "loaded_from", {}))
    if isinstance(processor, (tuple, list)) and len(processor) == 2:
        return processor[0], processor[1]
    if hasattr(processor, "tokenizer") and hasattr(processor, "image_processor"):
        return processor.tokenizer, processor.image_processor
    raise TypeError(
        "processor must be a CLIPProcessor or a pair of tokenizer and image processor, not a "
        f"{type(processor).__name__}."
    )


def at_layer(config: SAEConfig, layer: int) -> SAEConfig:
    config = copy.deepcopy(config)
    config.layer = layer
    config.holds_statistics, config.digests = False, None  # those of the whole checkpoint lie beside it
    return config


def layer_of(config: SAEConfig, clip: CLIPModel) -> int:
    return resolve_layer(-1 if config.layer is None else config.layer, tower_of(clip).config.num_hidden_layers)


def check_widths(saes: Mapping[int, SAEModel], clip: CLIPModel) -> None:
    width = tower_of(clip).config.hidden_size
    for layer, sae in saes.items():
        if sae.config.hidden_size != width:
            raise ValueError(
                f"The SAE of layer {layer} reads {sae.config.hidden_size} features, the vision tower gives {width}: "
                "they do not belong together."
            )


def saes_by_layer(clip: Any, sae: SAEModel | Mapping[int, SAEModel] | None) -> dict[int, SAEModel]:
    if not is_steerable(clip):
        raise TypeError(
            f"clip must be a transformers CLIPModel, not {type(clip).__name__}. (Or another family's model with "
            f"texts: {', '.join(steerable())}.)"
        )
    check_clip(clip)
    given = {layer_of(sae.config, clip): sae} if isinstance(sae, SAEModel) else sae
    if not isinstance(given, Mapping) or not given or not all(isinstance(each, SAEModel) for each in given.values()):
        raise TypeError("sae must be an SAEModel, or a dict of layer index -> SAEModel with at least one entry.")
    num_layers = tower_of(clip).config.num_hidden_layers
    inner = [layer for layer in given if resolve_layer(layer, num_layers) < num_layers - 1]
    if inner and not family_of(clip).has_tokens:
        raise ValueError(
            f"A {type(clip).__name__} has no CLS token: it is steered at its last layer alone, not {inner}."
        )
    saes = {}
    for layer, each in given.items():
        check_base_model(clip, each.config)
        index = resolve_layer(layer, num_layers)
        if index in saes:
            raise ValueError(f"Two SAEs for layer {index}: give one a layer.")
        if each.config.layer not in (None, index):
            raise ValueError(f"The SAE given for layer {index} was trained on layer {each.config.layer}.")
        saes[index] = each
    return saes


def default_gate(sae: SAEModel) -> float | None:
    """That of an SAE checkpoint for its method, where there are held-out rows to take its threshold from."""
    known = sae.domain_statistics
    by_fvu = method_named(sae.config.method).reads_latents
    return sae.config.gate if (sae.config.fvu_quantiles if by_fvu else known and known.distance_quantiles) else None
