"""The one way by which a CLIP, or another vision model, comes from a folder or from the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.file_download import REGEX_COMMIT_HASH
from transformers import AutoConfig, AutoModel, CLIPConfig, CLIPModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME, logging

from ..config.checks import OF_OTHERS, CheckpointConfig, check_clip_config, read_config_dict, refuse_requests
from ..files.place import at_one_commit, commit_note, look_for, note_commit, one_dtype, refuse_variant
from ..files.progress import without_loading_bars
from ..files.weight_files import check_numbers, find_files, in_one_message, shapes_in, unpickled
from ..files.weight_state import weights_version
from .families import FAMILIES, family_of_config, refuse_family
from .tail import check_temperature


logger = logging.get_logger(__name__)

_LAYER = re.compile(r"(.*\.layers\.)(\d+)\.")
_CONVERTER, _CONVERSION = "SFconvertbot", "Adding `safetensors` variant of this model"
"""Who converts weights on the Hub, and the title of the pull request that holds them; transformers looks for the same
two."""
# CLIPs whose numbers were looked at, and a mark of their weights then.
_SOUND: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def clip_config(name_or_path: str | os.PathLike, place: Mapping[str, Any] | None = None) -> CLIPConfig:
    """The configuration of a CLIP, without its weights; refused as by [`load_clip`]."""
    pinned = in_one_message(lambda: at_one_commit(name_or_path, _given(place)), name_or_path)
    return in_one_message(lambda: _read_config(name_or_path, pinned), name_or_path)


def load_clip(name_or_path: str | os.PathLike, place: Mapping[str, Any] | None = None, **options: Any) -> CLIPModel:
    """
    A CLIP with the weights of its own repository or folder, all of them, in evaluation mode.

    Safetensors are read where there are any, on the Hub also those that its own bot has put into an open pull request;
    without them `pytorch_model.bin`, by torch's reader that runs no code. No code of the repository runs, and no
    kernel is fetched.

    Args:
        name_or_path (`str` or path): Hub id or folder.
        place (`dict`, *optional*): `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`,
            `force_download`.
        options: of `from_pretrained`: `dtype` (or `torch_dtype`), `device_map`, `attn_implementation` and others.

    Raises:
        `OSError`: if files are missing or can't be reached. `ValueError`: if it is no CLIP, lacks weights, holds NaN
            or other numbers that no weight is, does not fit its configuration, or asks for other files or code. The
            message names the CLIP.
    """

    def load() -> CLIPModel:
        pinned = at_one_commit(name_or_path, _given(place))
        config = _read_config(name_or_path, pinned)
        model = _load(FAMILIES[config.model_type].model, config, name_or_path, pinned, options)
        check_clip(model, str(name_or_path))
        return model

    return in_one_message(load, name_or_path)


def load_vision_model(name_or_path: str | os.PathLike, place: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Any vision model of transformers, with the same care."""

    def load() -> PreTrainedModel:
        pinned = at_one_commit(name_or_path, _given(place))
        described, _ = read_config_dict(PreTrainedConfig.get_config_dict, name_or_path, **pinned)
        refuse_requests(described, OF_OTHERS)
        # Said outright, since by default transformers asks on the terminal, and `yes |` would answer.
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, **pinned)
        if isinstance(config, CheckpointConfig):  # ours, which see to themselves
            return AutoModel.from_pretrained(name_or_path, trust_remote_code=False, **pinned)
        model = _load(AutoModel, config, name_or_path, pinned, {"trust_remote_code": False})
        check_numbers(model.named_parameters(), name_or_path)
        return model

    return in_one_message(load, name_or_path)


def check_clip(clip: PreTrainedModel, where: str | None = None, *, read: bool = True) -> None:
    """Refuse a CLIP, or a part of one, whose weights can't be used (NaN, infinity and other numbers that no weight is,
    or a temperature by which all scores would be infinite, or all the same), by a `ValueError` with `where` and the
    weight. One that was looked at before is not read again, unless its weights have changed; nor, without `read`, one
    whose weights somebody else has gone through."""
    where = where or clip.config._name_or_path or "The CLIP given"
    mark = weights_version(clip.parameters())
    if _SOUND.get(clip) == mark:
        return
    if read:
        check_numbers(clip.named_parameters(), where)
    check_temperature(clip, where)
    _SOUND[clip] = mark


def refuse_offloaded(model: PreTrainedModel, name: str | os.PathLike) -> None:
    """Raises `ValueError` on a CLIP whose weights are elsewhere, of which rows can't be extracted."""
    away = [parameter for parameter, tensor in model.named_parameters() if tensor.is_meta]
    if away:
        raise ValueError(
            f"{name} was loaded with weights left on the disk or in the host's memory ({away[0]} is one), which "
            "rows can't be extracted from. Give a device_map that places all of them, such as device_map='cpu'."
        )


def spread(devices: Any, names: Iterable[str]) -> Any:
    """A `device_map` whose `""` (all that is not named) is written out as modules and weights, of these `names`:
    accelerate can't keep parts of a model on the disk when the whole of it has a device. Anything else stays."""
    if not isinstance(devices, Mapping) or "" not in devices or len(devices) == 1:
        return devices
    named = {name: device for name, device in devices.items() if name}
    for name in names:
        parts = name.split(".")
        around = [".".join(parts[: count + 1]) for count in range(len(parts))]
        if not any(part in named for part in around):
            highest = next(part for part in around if not any(other.startswith(f"{part}.") for other in named))
            named[highest] = devices[""]
    return named


def _given(place: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"revision": "main"} | {name: value for name, value in (place or {}).items() if value is not None}


def _read_config(name_or_path: str | os.PathLike, place: Mapping[str, Any]) -> CLIPConfig:
    if look_for(name_or_path, "adapter_config.json", place):
        raise ValueError(
            f"{name_or_path} holds an adapter (adapter_config.json), such as a LoRA, which is not applied here. Load "
            "it with peft, take merge_and_unload() of it, and give that model or the folder you save it to."
        )
    config, _ = read_config_dict(PreTrainedConfig.get_config_dict, name_or_path, **place)
    refuse_family(config.get("model_type"), str(name_or_path))

    def make() -> CLIPConfig:
        check_clip_config(config)
        made = FAMILIES[config["model_type"]].config.from_dict(config)
        family_of_config(made, str(name_or_path))
        return made

    return in_one_message(make, f"{CONFIG_NAME} of {name_or_path}")


def _load(
    model_class: Any, config: PreTrainedConfig, name_or_path: str | os.PathLike, place: dict[str, Any], options: dict
) -> Any:
    refuse_variant(options)
    options = one_dtype(options)
    files, is_safe = _weights(name_or_path, place, options.pop("use_safetensors", None))
    shapes = _shapes(files, is_safe)
    if "device_map" in options:
        options["device_map"] = spread(options["device_map"], shapes)
    _check_layers(config, shapes, name_or_path)
    # From the folder of the files found: asked for by name, transformers would send the name of a repository without
    # safetensors, and the token, to a service that converts it.
    asked = {"config": config, "use_safetensors": is_safe, "output_loading_info": True, **options}
    folder = os.path.dirname(files[0])
    try:
        with without_loading_bars():
            model, loading = model_class.from_pretrained(folder, **asked)
    except RuntimeError as error:  # "size mismatch", which names no weight
        misfit = _misfit(model_class, config, shapes, name_or_path)
        if misfit is None:
            raise
        raise ValueError(misfit) from error
    if loading["missing_keys"]:
        # transformers has filled them in at random.
        lacking = min(loading["missing_keys"])
        if lacking == "visual_projection.weight":
            raise ValueError(
                f"{name_or_path} holds a vision tower without its projection. Give the whole CLIP; or load the tower "
                "by transformers' CLIPVisionModel and give that model, of which rows can be extracted."
            )
        raise ValueError(f"{name_or_path} is damaged: it has no {lacking}. Save or download that model again.")
    model.config._name_or_path = model.name_or_path = str(name_or_path)
    commit = place.get("revision", "")
    # Newer transformers forgets it, and what is saved again should name it again.
    model.config._commit_hash = commit if REGEX_COMMIT_HASH.fullmatch(commit) else None
    return model


def _weights(name_or_path: str | os.PathLike, place: dict[str, Any], safe: bool | None) -> tuple[list[str], bool]:
    """The files of weights, and whether they are safetensors."""
    if safe is not False:
        files = find_files(name_or_path, place, SAFE_WEIGHTS_NAME)
        converted = None if files or os.path.isdir(name_or_path) else _converted(str(name_or_path), place)
        if converted is not None:
            files = find_files(name_or_path, {**place, "revision": converted}, SAFE_WEIGHTS_NAME)
        if files is not None:
            return files[1], True
    files = None if safe else find_files(name_or_path, place, WEIGHTS_NAME)
    if files is None:
        raise OSError(f"{name_or_path} has no {SAFE_WEIGHTS_NAME}{'' if safe else f' and no {WEIGHTS_NAME}'}.")
    logger.warning(
        f"{name_or_path} has no safetensors: its weights are read from {WEIGHTS_NAME}, a pickle, by torch's reader "
        "that runs no code."
    )
    return files[1], False


def _converted(name: str, place: Mapping[str, Any]) -> str | None:
    """The commit of the Hub's own bot that adds safetensors to the commit asked for, and changes nothing else."""
    commit, cache_dir = place["revision"], place.get("cache_dir")
    if not REGEX_COMMIT_HASH.fullmatch(commit) or place.get("subfolder"):
        return None
    branch = f"safetensors-of-{commit}"
    note = commit_note(name, branch, cache_dir)
    if note.is_file():
        return note.read_text(encoding="utf-8")
    if place.get("local_files_only") or is_offline_mode():
        return None
    try:
        proposed = in_one_message(lambda: _proposed(name, commit, place.get("token")), name)
    except (OSError, ValueError):  # a Hub that does not answer such questions: the repository's own weights will do
        return None
    if proposed is not None:
        note_commit(name, branch, proposed, cache_dir)
    return proposed


def _proposed(name: str, commit: str, token: str | bool | None) -> str | None:
    """The newest commit of the bot's open pull request, if it is the only one beyond `commit`."""
    hub = HfApi(token=token)
    for proposal in hub.get_repo_discussions(
        name, author=_CONVERTER, discussion_type="pull_request", discussion_status="open"
    ):
        if proposal.author == _CONVERTER and proposal.title == _CONVERSION:
            history = [commit.commit_id for commit in hub.list_repo_commits(name, revision=proposal.git_reference)]
            if history[1:2] == [commit]:
                return history[0]
    return None


def _shapes(files: list[str], is_safe: bool) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, of which nothing else is read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        if is_safe:
            shapes |= shapes_in(path)
        else:
            state = unpickled(path, "Load that model with transformers where you trust it, and save it again.", "meta")
            if not isinstance(state, Mapping) or not all(map(torch.is_tensor, state.values())):
                raise ValueError(f"{path} holds something else than tensors by name.")
            shapes |= {str(name): tuple(tensor.shape) for name, tensor in state.items()}
    return shapes


def _check_layers(config: Any, shapes: Mapping[str, Any], name_or_path: str | os.PathLike) -> None:
    """Refuse a configuration of other layers than there are weights for: building too many could take for ever, and of
    too few the rest would be left out."""
    held: dict[str, set[str]] = {}
    for match in filter(None, map(_LAYER.match, shapes)):
        held.setdefault(match[1], set()).add(match[2])
    towers = [(getattr(config, f"{name}_config", None), name) for name in ("vision", "text")]
    for part, prefix in ((config, None), *towers):
        layers = getattr(part, "num_hidden_layers", None)
        counts = {len(numbers) for stack, numbers in held.items() if prefix and stack.startswith(prefix)}
        if isinstance(layers, int) and (layers > len(shapes) or (counts and layers not in counts)):
            raise ValueError(
                f"{CONFIG_NAME} of {name_or_path} says num_hidden_layers={layers}; its weights are of "
                f"{max(counts) if counts else 'fewer'} layers. The two are not of one checkpoint: save or download it "
                "again."
            )


def _misfit(
    model_class: Any, config: PreTrainedConfig, shapes: Mapping[str, Any], name_or_path: str | os.PathLike
) -> str | None:
    """The first weight whose shape is not that of the configuration."""
    if model_class is AutoModel or hasattr(config, "quantization_config"):
        return None
    with torch.device("meta"):
        made = model_class(config)
    for name, tensor in made.state_dict().items():
        if name in shapes and shapes[name] != tuple(tensor.shape):
            return (
                f"{name_or_path}: {name} is {shapes[name]}, by {CONFIG_NAME} it is {tuple(tensor.shape)}. The two are "
                "not of one checkpoint: save or download it again."
            )
    return None
