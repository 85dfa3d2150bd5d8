"""The files of an activation store as they lie on disk; [`~hf_vs2.data.stores.store.ActivationStore`] reads them."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ...files.digests import tensor_digest
from ...files.json_files import read_format, write_json
from ...files.weight_files import write_tensors


FORMAT = "hf_vs2.activations"
FORMAT_VERSION = 1
INDEX_NAME = "index.json"
# The fields of the index that decide the rows; together they are the key of the store.
REQUEST_FIELDS = ("model", "layers", "site", "preprocessing", "dataset", "columns", "dtype")


ROW_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class StoreError(OSError):
    """A store that cannot be used: unfinished, damaged, or not the one that was asked for."""


def request_of(index: dict[str, Any]) -> dict[str, Any]:
    """The part of an index that decides its rows."""
    return {field: index[field] for field in REQUEST_FIELDS}


def request_key(request: dict[str, Any]) -> str:
    """16 hexadecimal digits that stand for a request."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]


def differences(ours: Any, theirs: Any, name: str = "") -> list[str]:
    """What two requests disagree on, one `field: ours != theirs` for each leaf."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            line
            for key in sorted(ours.keys() | theirs.keys())
            for line in differences(ours.get(key), theirs.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if ours == theirs else [f"{name}: {ours!r} != {theirs!r}"]


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def write_index(folder: Path, index: dict[str, Any]) -> None:
    write_json(folder / INDEX_NAME, index, sort_keys=True)


def read_index(folder: Path) -> dict[str, Any]:
    """The parsed index of `folder`; raises [`StoreError`] when it is none of ours."""
    path, remedy = folder / INDEX_NAME, "extract again into another folder"
    try:
        index = read_format(path, (FORMAT, FORMAT_VERSION), "the index of an activation store", remedy)
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder} can't be read as an activation store: {error}") from error
    _check_fields(path, index, _REQUEST_CHECKS)
    return index


def check_complete(folder: Path, index: dict[str, Any]) -> None:
    """Refuse the index of a finished store that contradicts itself: rows are counted and memory is taken by what it
    says."""
    path = folder / INDEX_NAME
    _check_fields(path, index, _COMPLETE_CHECKS)
    if index["num_rows"] != sum(shard["rows"] for shard in index["shards"]):
        raise StoreError(f"{path} is damaged: num_rows is not the sum of the shards' rows. {_AGAIN}")


def _check_fields(path: Path, index: dict[str, Any], checks: dict[str, Callable[[Any], bool]]) -> None:
    wrong = [name for name, is_right in checks.items() if name not in index or not is_right(index[name])]
    if wrong:
        raise StoreError(f"{path} is damaged: {wrong[0]} is missing or can't be {index.get(wrong[0])!r:.60}. {_AGAIN}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


_AGAIN = "Extract the activations again"
_REQUEST_CHECKS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(REQUEST_FIELDS, lambda value: value is not None),
    "model": lambda value: isinstance(value, dict) and {"id", "revision"} <= value.keys(),
    "dataset": lambda value: isinstance(value, dict) and "split" in value,
    "columns": lambda value: isinstance(value, dict) and "label" in value,
    "layers": lambda value: isinstance(value, list) and len(value) > 0 and all(map(_is_count, value)),
    "dtype": lambda value: isinstance(value, str) and value in ROW_DTYPES,
    "complete": lambda value: isinstance(value, bool),
}


_COMPLETE_CHECKS: dict[str, Callable[[Any], bool]] = {
    "hidden_size": _is_count,
    "num_layers": _is_count,
    "num_rows": _is_count,
    "class_names": lambda value: value is None or (isinstance(value, list) and all(isinstance(x, str) for x in value)),
    "shards": lambda value: (
        isinstance(value, list)
        and all(isinstance(x, dict) and _is_count(x.get("rows")) and _is_count(x.get("bytes")) for x in value)
    ),
}


@dataclass
class Shard:
    """The rows of a shard, by layer, while they come in."""

    number: int
    stop: int = 0
    rows: dict[int, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    indices: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)


def write_shard(folder: Path, number: int, tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    write_tensors(folder / shard_name(number), tensors, {**header, "digests": digests})


def read_shard_header(folder: Path, number: int) -> dict[str, Any] | None:
    """What [`write_shard`] noted in a shard, with its `rows` and `bytes`; None when it is missing or damaged."""
    path = folder / shard_name(number)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as shard:
            header = json.loads((shard.metadata() or {})["hf_vs2"])
            header["rows"] = shard.get_slice("image_index").get_shape()[0]
    except (SafetensorError, KeyError, ValueError, OSError):
        return None
    header["bytes"] = path.stat().st_size
    return header
