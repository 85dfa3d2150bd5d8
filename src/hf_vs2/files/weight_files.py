"""The files of weights of a checkpoint, looked at before they are believed. Of ours none but safetensors is ever
opened: a pickle is code."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from .atomic import replace_file
from .digests import check_digest, is_of_digest
from .json_files import from_json, read_json, to_json
from .place import look_for


LARGEST = 1e8
"""No weight and no activation of a CLIP or its SAE comes near it. Where one flipped bit of the exponent made a number
larger, its products and squares would overflow."""

_DTYPES = ("F64", "F32", "F16", "BF16")
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class WeightFiles:
    """The weights of a checkpoint, of which so far only the headers are read."""

    paths: dict[str, str]
    """Tensor -> its file."""
    shapes: dict[str, tuple[int, ...]]
    """Tensor -> its shape."""
    source: str
    """The file, or the list of files, for messages."""

    @classmethod
    def find(cls, name_or_path: str | os.PathLike, place: Mapping[str, Any]) -> WeightFiles:
        """
        Look for `model.safetensors` or its parts in a folder or on the Hub.

        Raises:
            `OSError`: if there is none, or it can't be reached. `ValueError`: if one is damaged, or holds anything
                else than floats.
        """
        located = find_files(name_or_path, place, SAFE_WEIGHTS_NAME)
        if located is None:
            raise OSError(
                f"{name_or_path} has no {SAFE_WEIGHTS_NAME}. Other formats, pickled ones above all "
                "(pytorch_model.bin, *.pt), are not opened, since they can hold code: save the model again with "
                "save_pretrained."
            )
        source, files = located
        paths: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with opened(path) as weights:
                for name in weights.keys():  # noqa: SIM118 (not a dict)
                    part = weights.get_slice(name)
                    if part.get_dtype() not in _DTYPES:
                        raise ValueError(
                            f"{path}: {name} is of type {part.get_dtype()}; weights are one of {_DTYPES}."
                        )
                    if name in paths:
                        raise ValueError(f"{path}: {name} is in {paths[name]} too.")
                    paths[name], shapes[name] = path, tuple(part.get_shape())
        return cls(paths, shapes, source)

    def only(self, prefix: str) -> WeightFiles:
        """Those tensors whose name begins so."""
        paths = {name: path for name, path in self.paths.items() if name.startswith(prefix)}
        return WeightFiles(paths, {name: self.shapes[name] for name in paths}, self.source)

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse other tensors than these, and other shapes, by a `ValueError` with file, tensor and both shapes."""
        missing, extra = sorted(expected.keys() - self.shapes), sorted(self.shapes.keys() - expected)
        if missing or extra:
            what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}"
            raise ValueError(
                f"{self.source} {what}, and {CONFIG_NAME} describes a model with{'' if missing else 'out'} it. Save "
                "or download the checkpoint again; if a newer version wrote it, upgrade hf_vs2."
            )
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise ValueError(
                    f"{self.paths[name]}: {name} is {self.shapes[name]}, by {CONFIG_NAME} it is {shape}. The two are "
                    "not of one checkpoint: save or download it again."
                )

    def read(self, digests: Mapping[str, str] | None) -> dict[str, torch.Tensor]:
        """All tensors, in memory: nothing follows later changes of the files, whose `digests` the config has. For
        errors see [`check_content`]."""
        tensors: dict[str, torch.Tensor] = {}
        for path in dict.fromkeys(self.paths.values()):
            with opened(path) as weights:
                own = {name: weights.get_tensor(name).clone() for name, at in self.paths.items() if at == path}
            check_content(path, own, digests)
            tensors |= own
        return tensors


def check_content(
    path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], digests: Mapping[str, str] | None
) -> None:
    """Refuse, by a `ValueError` that names it, a file, of which these are the tensors, that is not the one that was
    saved. Without `digests`, as of earlier versions, numbers that no weight is tell of damage."""
    if not digests or not is_of_digest(path, digests.get(os.path.basename(path), "")):
        check_numbers(tensors.items(), path)
        check_digest(path, digests)


def check_numbers(
    tensors: Iterable[tuple[str, torch.Tensor]], where: str | os.PathLike, remedy: str = "Save or download it again."
) -> None:
    """Refuse tensors with NaN, infinity, or numbers so large that they would turn into it, by a `ValueError` with
    `where` and the tensor."""
    for name, tensor in tensors:
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)  # not quantised, not dealt out to several processes
        if not plain or tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
            continue
        lowest, highest = (bound.item() for bound in tensor.aminmax())
        if not (lowest >= -LARGEST and highest <= LARGEST):
            numbers = f"numbers from {lowest:.3g} to {highest:.3g}" if lowest <= highest else "NaN"
            raise ValueError(
                f"{where} is damaged: {name} holds {numbers}, and no weight is larger than {LARGEST:g}. {remedy}"
            )


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[Any]:
    """An open safetensors file; a `ValueError` if it is none, or damaged."""
    open(path, "rb").close()  # safetensors says of one that may not be read that there is none
    try:
        with safe_open(path, framework="pt") as weights:
            yield weights
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}). Save or download it again.") from error


def shapes_in(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a safetensors file, of which nothing else is read."""
    with opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)


def write_described(
    path: Path, tensors: Mapping[str, torch.Tensor], kind: tuple[str, int], about: Mapping[str, Any]
) -> None:
    """Tensors in one file, and in its header as JSON what they are; `kind` is the format's name and version. It
    appears whole or not at all."""
    write_tensors(path, tensors, {"format": kind[0], "format_version": kind[1], **about})


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], about: Any = None) -> None:
    """A safetensors file, with `about` as JSON in its header, whole or not at all; then an `OSError` names it."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry only: safetensors writes several in random order, and equal content should make equal files.
    metadata = None if about is None else {"hf_vs2": to_json(about, sort_keys=True)}
    replace_file(path, lambda temporary: save_file(content, temporary, metadata=metadata))


def read_described(
    path: str | os.PathLike,
    kind: tuple[str, int],
    make: Callable[[Mapping[str, Any], dict[str, torch.Tensor]], _Made],
    remedy: str,
    digests: Mapping[str, str] | None,
) -> _Made:
    """What `make(header, tensors)` makes of a file that [`write_described`] wrote, of a checkpoint whose config has
    these `digests`. A `ValueError` names a file that is damaged, of another save or kind, or refused by `make`."""
    tensors, header = read_tensors(path)
    check_content(path, tensors, digests)
    try:
        about = from_json(header)
        name, version = about["format"], about["format_version"]
        if (name, version) != kind:
            raise ValueError(f"it is of format {name!r}, version {version!r}; expected {kind[0]!r}, {kind[1]}")
        return make(about, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is not what this version of hf_vs2 reads ({error}). {remedy}") from error


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], str]:
    """All tensors of a safetensors file, and the JSON that [`write_tensors`] put into its header (`"null"` without
    one)."""
    with opened(path) as file:
        header = (file.metadata() or {}).get("hf_vs2", "null")
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 (not a dict)


def in_one_message(load: Callable[[], _Made], where: str | os.PathLike) -> _Made:
    """`load()`; whatever transformers, torch and the HTTP library raise on a checkpoint that is damaged, foreign or
    out of reach becomes a `ValueError` or `OSError` that names it."""
    try:
        return load()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        for kind in (OSError, ValueError, ImportError):
            if isinstance(error, kind):
                if str(where) in text:
                    raise
                raise kind(f"{where}: {text}") from error
        if is_of_http(error):
            raise ConnectionError(f"{where} could not be reached, or the connection broke ({text}).") from error
        if isinstance(error, RuntimeError) and "meta device context" in text:
            raise  # the caller's doing, not the checkpoint's
        raise ValueError(f"{where} can't be loaded: {text[:400]}") from error


def is_of_http(error: Exception) -> bool:
    """Whether it is one of the errors that huggingface_hub lets through from its HTTP library, another one in each
    major version."""
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2")


def find_files(name_or_path: str | os.PathLike, place: Mapping[str, Any], whole: str) -> tuple[str, list[str]] | None:
    """The files of weights of a folder or of the Hub: the one called `whole` (`"model.safetensors"`), or those that
    `"model.safetensors.index.json"` lists. First comes the file or the list, for messages; `None` without either.

    Raises:
        `OSError`: if one of the files is missing, or can't be reached. `ValueError`: if the list is damaged.
    """
    single = look_for(name_or_path, whole, place)
    if single is not None:
        return single, [single]
    index = look_for(name_or_path, f"{whole}.index.json", place)
    if index is None:
        return None
    try:
        names = sorted(set(read_json(Path(index))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({error!r}). Save or download it again.") from error
    suffix = os.path.splitext(whole)[1]
    strange = [name for name in names if os.path.basename(name) != name or not name.endswith(suffix)]
    if strange:
        raise ValueError(f"{index} names {strange[0]!r}, which is no {suffix} file beside it.")
    files = [(name, look_for(name_or_path, name, place)) for name in names]
    lost = [name for name, path in files if path is None]
    if lost:
        raise OSError(f"{name_or_path} has no {lost[0]}, which {index} names.")
    return index, [path for _, path in files if path is not None]


def unpickled(path: str | os.PathLike, remedy: str, map_location: str = "cpu") -> Any:
    """What torch's reader that runs no code makes of a pickle. If there is more in it than tensors, or it is damaged,
    a `ValueError` says that, and `remedy` what to do."""
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path} is a pickle with more in it than tensors, which may be code, or damaged: it is not opened. "
            f"{remedy}"
        ) from error
