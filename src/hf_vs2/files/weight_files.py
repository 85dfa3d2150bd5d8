"""The safetensors files of a checkpoint, looked at before they are believed. No other format is ever opened: a pickle is code."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.file_download import REGEX_COMMIT_HASH, repo_folder_name
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from .atomic import replace_file, replace_text
from .json_files import from_json, read_json, to_json


HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "_commit_hash")
"""Arguments of `from_pretrained` that say where a checkpoint is."""

LARGEST = 1e8
"""No weight and no activation of a CLIP or its SAE comes near it. Where one flipped bit of the exponent made a number larger, its
products and squares would overflow."""

_DTYPES = ("F64", "F32", "F16", "BF16")
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class WeightFiles:
    """
    The weights of a checkpoint, of which so far only the headers are read.

    Args:
        paths (`dict[str, str]`): tensor -> its file.
        shapes (`dict[str, tuple[int, ...]]`): tensor -> its shape.
        source (`str`): the file, or the list of files, for messages.
    """

    paths: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    source: str

    @classmethod
    def find(cls, name_or_path: str | os.PathLike, place: Mapping[str, Any]) -> WeightFiles:
        """
        Look for `model.safetensors` or its parts in a folder or on the Hub.

        Raises:
            `OSError`: if there is none, or it can't be reached. `ValueError`: if one is damaged, or holds anything else than floats.
        """
        source, files = _find(name_or_path, place)
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
        """Refuse other tensors than these, and other shapes.

        Raises:
            `ValueError`: naming the file, the tensor and both shapes.
        """
        missing, extra = sorted(expected.keys() - self.shapes), sorted(self.shapes.keys() - expected)
        if missing or extra:
            what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}"
            raise ValueError(
                f"{self.source} {what}, and {CONFIG_NAME} describes a model with{'' if missing else 'out'} it. Save or download the "
                "checkpoint again; if a newer version wrote it, upgrade hf_vs2."
            )
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise ValueError(
                    f"{self.paths[name]}: {name} is {self.shapes[name]}, by {CONFIG_NAME} it is {shape}. The two are not of one "
                    "checkpoint: save or download it again."
                )

    def read(self) -> dict[str, torch.Tensor]:
        """
        All tensors, in memory: nothing follows later changes of the files.

        Raises:
            `ValueError`: on NaN, infinity and other numbers that no weight is, naming file and tensor.
        """
        tensors = {}
        for path in dict.fromkeys(self.paths.values()):
            with opened(path) as weights:
                for name in (name for name, at in self.paths.items() if at == path):
                    tensors[name] = weights.get_tensor(name).clone()
                    check_numbers([(name, tensors[name])], path)
        return tensors


def check_numbers(tensors: Iterable[tuple[str, torch.Tensor]], where: str | os.PathLike) -> None:
    """Refuse tensors with NaN, infinity, or numbers so large that they would turn into it.

    Raises:
        `ValueError`: naming the place and the tensor.
    """
    for name, tensor in tensors:
        if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
            continue
        lowest, highest = (bound.item() for bound in tensor.aminmax())
        if not (lowest >= -LARGEST and highest <= LARGEST):
            found = f"numbers from {lowest:.3g} to {highest:.3g}" if lowest <= highest else "NaN"
            raise ValueError(
                f"{where} is damaged: {name} holds {found}, and no weight is larger than {LARGEST:g}. Save or download it again."
            )


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[Any]:
    """An open safetensors file.

    Raises:
        `ValueError`: if it is none, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as weights:
            yield weights
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}). Save or download it again.") from error


def write_described(
    path: Path, tensors: Mapping[str, torch.Tensor], kind: tuple[str, int], about: Mapping[str, Any]
) -> None:
    """Tensors in one file, and in its header as JSON what they are; `kind` is the format's name and version. It appears whole or not at
    all."""
    header = to_json({"format": kind[0], "format_version": kind[1], **about}, sort_keys=True)
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    replace_file(path, lambda temporary: save_file(content, temporary, metadata={"hf_vs2": header}))


def read_described(
    path: str | os.PathLike,
    kind: tuple[str, int],
    make: Callable[[Mapping[str, Any], dict[str, torch.Tensor]], _Made],
    remedy: str,
) -> _Made:
    """
    What `make(header, tensors)` makes of a file that [`write_described`] wrote.

    Raises:
        `ValueError`: naming the file, if it is damaged, of another kind, or refused by `make`.
    """
    with opened(path) as file:
        header = (file.metadata() or {}).get("hf_vs2", "null")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    check_numbers(tensors.items(), path)
    try:
        about = from_json(header)
        found = about["format"], about["format_version"]
        if found != kind:
            raise ValueError(f"it is of format {found[0]!r}, version {found[1]!r}; expected {kind[0]!r}, {kind[1]}")
        return make(about, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is not what this version of hf_vs2 reads ({error}). {remedy}") from error


def at_one_commit(
    name_or_path: str | os.PathLike, place: Mapping[str, Any], file: str = CONFIG_NAME
) -> dict[str, Any]:
    """
    `place` with the commit in it that the branch or tag stands for now, so that all files are of one commit. `file` is one that
    there should be.

    The commit is found before the first file is asked for: huggingface_hub takes the name of a commit and the content of a file
    from two requests, between which a branch can move.

    Raises:
        `ValueError`: on a token that is none, without showing it. `OSError`: if the repository can't be read.
    """
    check_token(place.get("token"))
    if os.path.isdir(name_or_path):
        return dict(place)
    name, branch = str(name_or_path), place.get("revision") or "main"
    commit = place.get("_commit_hash") or (branch if REGEX_COMMIT_HASH.fullmatch(branch) else None)
    if commit is not None:
        return {**place, "revision": commit}
    asked = {option: value for option, value in place.items() if option != "_commit_hash"}
    try:
        commit = hf_hub_download(name, file, **asked, dry_run=True).commit_hash
    except LocalEntryNotFoundError:
        # Not cached, and no answer. The next request must not have better luck than this one.
        return {**place, "local_files_only": True, "force_download": False}
    except EntryNotFoundError:
        return dict(place)
    except (HfHubHTTPError, ValueError):
        # Refused. transformers may still find it in the cache, or else says what to do.
        commit = extract_commit_hash(cached_file(name, file, **place), None)
        return {**place, "revision": commit}
    pinned = {**place, "revision": commit}
    if cached_file(name, file, **pinned, _raise_exceptions_for_missing_entries=False):
        _note_commit(name, branch, commit, place.get("cache_dir"))
    return pinned


def _note_commit(name: str, branch: str, commit: str, cache_dir: str | os.PathLike | None) -> None:
    """Which commit `branch` was last seen at, where huggingface_hub looks it up when there is no network. It notes it down itself
    only where a file is asked for by branch."""
    note = Path(cache_dir or HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "refs" / branch
    if not note.is_file() or note.read_text(encoding="utf-8") != commit:
        with contextlib.suppress(OSError):  # of a read-only cache: whoever fills it has noted a commit
            replace_text(note, commit)


def refuse_variant(options: Mapping[str, Any]) -> None:
    """Raises `ValueError` on `variant=`, which transformers takes for another file name: a checkpoint here has one."""
    if options.get("variant") is not None:
        raise ValueError(
            f"variant={options['variant']!r}: checkpoints of hf_vs2 have one file of weights, {SAFE_WEIGHTS_NAME}. Choose the "
            "precision with dtype=; give a variant of a CLIP as a loaded model, clip=."
        )


def save_mark(name_or_path: str | os.PathLike, place: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Which save of a local folder its config.json is of. Whoever saves anew takes that file away first and puts it back last."""
    try:
        found = os.stat(os.path.join(name_or_path, place.get("subfolder") or "", CONFIG_NAME))
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def refuse_another_save(
    name_or_path: str | os.PathLike, place: Mapping[str, Any], before: tuple[int, ...] | None
) -> None:
    """Raises `OSError` if the folder has been saved into since `before`: what was read may be the config of one checkpoint and the
    weights of another."""
    if save_mark(name_or_path, place) != before:
        raise OSError(f"{name_or_path} was saved anew while it was read. Load it again.")


def check_token(token: str | bool | None) -> None:
    """The HTTP library puts a header that can't be sent, token and all, into its message; this message does not show it."""
    if isinstance(token, str) and not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError(
            "token= holds a space, a line break or another character that no token has: take the token alone (of a line read from "
            "a file: .strip())."
        )


def in_one_message(load: Callable[[], Any], where: str | os.PathLike) -> Any:
    """`load()`; what transformers and torch raise on a damaged or foreign checkpoint becomes a `ValueError` that names it."""
    try:
        return load()
    except (torch.OutOfMemoryError, OSError, ValueError, ImportError):
        raise
    except Exception as error:
        raise ValueError(f"{where} can't be loaded: {' '.join(str(error).split())[:400]}") from error


def _find(name_or_path: str | os.PathLike, place: Mapping[str, Any]) -> tuple[str, list[str]]:
    def look(name: str) -> str | None:
        return cached_file(name_or_path, name, **place, _raise_exceptions_for_missing_entries=False)

    whole = look(SAFE_WEIGHTS_NAME)
    if whole is not None:
        return whole, [whole]
    index = look(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        raise OSError(
            f"{name_or_path} has no {SAFE_WEIGHTS_NAME}. Other formats, pickled ones above all (pytorch_model.bin, *.pt), are not "
            "opened, since they can hold code: save the model again with save_pretrained."
        )
    try:
        names = sorted(set(read_json(Path(index))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is damaged ({error!r}). Save or download it again.") from error
    strange = [name for name in names if os.path.basename(name) != name or not name.endswith(".safetensors")]
    if strange:
        raise ValueError(f"{index} names {strange[0]!r}, which is no .safetensors file beside it.")
    files = [(name, look(name)) for name in names]
    lost = [name for name, path in files if path is None]
    if lost:
        raise OSError(f"{name_or_path} has no {lost[0]}, which {index} names.")
    return index, [path for _, path in files if path is not None]


__all__ = [
    "HUB_ARGUMENTS",
    "LARGEST",
    "WeightFiles",
    "at_one_commit",
    "check_numbers",
    "check_token",
    "in_one_message",
    "opened",
    "read_described",
    "refuse_another_save",
    "refuse_variant",
    "save_mark",
    "write_described",
]
