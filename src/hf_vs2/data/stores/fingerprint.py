"""What makes two extractions of one model the same: a fingerprint of a data set's images."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..images import local_path


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# Images of at most this many bytes in all are hashed whole; of larger sets, this many bytes.
CONTENT_BUDGET = 64 * 2**20


def dataset_fingerprint(dataset: Dataset | IterableDataset, image_column: str, label_column: str | None) -> str:
    """
    16 hexadecimal digits that stand for the images (and labels) of a data set in their order; nothing is decoded.

    Map-style data sets: the encoded images themselves when they take at most 64 MiB, so neither the place, the dates
    nor the cache of the data matter. Beyond that: the byte length of every image and 64 MiB of them, evenly spread,
    where images are embedded in Arrow; the relative path, size and modification time of every file where they are not.
    With an on-the-fly transform, or images stored as nested lists, it is the fingerprint that `datasets` keeps.

    Streams: a hash of the chain of sources and operations (file lists with their dates or commit, `skip`, `take`,
    `shuffle` seeds, code and arguments of generators and mapped functions). Data that a generator reads by itself are
    not seen: give `dataset_fingerprint=` to `extract_activations` and change it whenever they change.
    """
    import datasets

    digest = hashlib.sha256()
    if isinstance(dataset, datasets.IterableDataset):
        _update_with_stream(digest, dataset, image_column)
    elif dataset.format["type"] == "custom" or not _update_with_images(digest, dataset, image_column):
        digest.update(dataset._fingerprint.encode())
    if label_column is not None:
        feature = (dataset.features or {}).get(label_column)
        digest.update(json.dumps([label_column, getattr(feature, "names", None)]).encode())
        if isinstance(dataset, datasets.Dataset):
            labels = np.array([-1 if label is None else label for label in dataset.with_format(None)[label_column][:]])
            digest.update(labels.astype(np.int64).tobytes())
    return digest.hexdigest()[:16]


# Map-style data sets


def _encoded_and_paths(values: Any) -> tuple[Any, Any]:
    """The encoded images of an Arrow column and their paths, on the same memory; `None` for what it does not hold."""
    import pyarrow as pa

    kind = values.type
    if pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}:
        encoded, paths = (
            pa.chunked_array([chunk.field(name) for chunk in values.chunks], kind.field(name).type)
            for name in ("bytes", "path")
        )
        return encoded, paths
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return values, None
    return None, values if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None


def _update_with_images(digest: Any, dataset: Dataset, column: str) -> bool:
    """False where the column is not one of encoded images or paths."""
    import pyarrow.compute as pc

    encoded, named = _encoded_and_paths(dataset.data.column(column))
    if encoded is None and named is None:
        return False
    rows = np.arange(len(dataset))
    if dataset._indices is not None:  # rows chosen or reordered by `select`, `shuffle`, `sort`, ...
        rows = dataset._indices.column(0).to_numpy()
    sizes = np.full(len(rows), -1, dtype=np.int64)  # bytes of every embedded image, -1 where there are none
    if encoded is not None:
        sizes = pc.fill_null(pc.binary_length(encoded), -1).to_numpy().astype(np.int64)[rows]
    without = np.flatnonzero(sizes < 0).tolist()
    paths = {place: (None if named is None else named[int(rows[place])].as_py()) or "" for place in without}
    dates = {}
    for place, path in paths.items():
        sizes[place], dates[place] = _stat(path)
    digest.update(sizes.tobytes())
    whole = int(sizes.clip(min=0).sum()) <= CONTENT_BUDGET
    absolute = bool(paths) and all(map(os.path.isabs, paths.values()))
    root = os.path.commonpath(map(os.path.dirname, paths.values())) if absolute else ""
    for place in range(len(sizes)) if whole else sorted({*_spread(sizes), *paths}):
        if place not in paths:
            digest.update(encoded[int(rows[place])].as_buffer())
            continue
        content = _read(paths[place]) if whole and sizes[place] >= 0 else None
        if content is not None:
            digest.update(content)
        else:  # a file of a large set, one that may not be read, or none that is on this machine
            name = os.path.relpath(paths[place], root) if root else paths[place]
            digest.update(f"{name} {dates[place]}".encode())
    return True


def _stat(path: str) -> tuple[int, int]:
    """(size, modification time in ns), (-1, 0) where there is no file, or a pipe, say: reading it will say so."""
    try:
        status = os.stat(local_path(path))
    except (OSError, ValueError):
        return -1, 0
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (-1, 0)


def _read(path: str) -> bytes | None:
    """`None` for a file without permission: reading the images will say so."""
    try:
        return Path(local_path(path)).read_bytes()
    except OSError:
        return None


def _spread(sizes: np.ndarray) -> list[int]:
    """Places evenly spread over the rows, whose images take about `CONTENT_BUDGET` bytes."""
    count = max(1, int(CONTENT_BUDGET / sizes.clip(min=0).mean()))
    return np.linspace(0, len(sizes) - 1, min(count, len(sizes))).astype(np.int64).tolist()


# Streams


def _update_with_stream(digest: Any, dataset: IterableDataset, image_column: str) -> None:
    try:
        state = {name: getattr(dataset, name, None) for name in ("_shuffling", "_distributed", "_epoch")}
        digest.update(json.dumps(_describe([dataset._ex_iterable, state], image_column), sort_keys=True).encode())
    except Exception as error:  # anything may be inside a user's generator or mapped function
        raise ValueError(
            f"This stream has no fingerprint that can be worked out ({type(error).__name__}: {error}): "
            "give it one with dataset_fingerprint='...', and change that whenever the data change"
        ) from error


def _describe(value: Any, image_column: str) -> Any:
    """A stream's sources and operations as plain JSON; other objects become the hash that `datasets` gives them."""
    from datasets import Dataset, DatasetBuilder
    from datasets.fingerprint import Hasher
    from datasets.iterable_dataset import _BaseExamplesIterable
    from datasets.utils.track import TrackedIterableFromGenerator

    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_describe(item, image_column) for item in value]
    if isinstance(value, dict):
        return {str(key): _describe(item, image_column) for key, item in value.items()}
    if isinstance(value, _BaseExamplesIterable):
        own = {name: item for name, item in vars(value).items() if name != "_state_dict"}
        return [type(value).__name__, _describe(own, image_column)]
    if isinstance(value, TrackedIterableFromGenerator):  # files found below a path
        return [type(value).__name__, _describe(value.args[0], image_column)]
    if isinstance(value, Dataset):  # of `to_iterable_dataset`; its own fingerprint does not see files change
        digest = hashlib.sha256(value._fingerprint.encode())
        if image_column in value.column_names:
            _update_with_images(digest, value, image_column)
        return digest.hexdigest()
    owner = getattr(value, "__self__", None)
    if isinstance(owner, DatasetBuilder):  # config_id covers the data files and their dates or commits
        return [owner.name, owner.config_id, owner.hash, value.__name__]
    return Hasher.hash(value)
