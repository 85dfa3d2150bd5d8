"""
The on-disk store of CLS activations.

A store is a folder with `index.json` and `shard-00000.safetensors`, `shard-00001.safetensors`, ... Shard `s` holds the
rows of images `s * shard_size` up to `(s + 1) * shard_size` of the data set, less the ones that were skipped:
`layer_<i>` (rows, hidden) for every layer, `image_index` (rows,) int64 and, with labels, `label` (rows,) int64. Every
file is written beside its place and moved there, so a file that exists is whole; `index.json` says `"complete": true`
only after the last shard.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from ...config.schema import COUNT
from ...files.digests import tensor_digest
from .store_format import (
    INDEX_NAME,
    ROW_DTYPES,
    StoreError,
    check_complete,
    differences,
    read_index,
    request_key,
    request_of,
    shard_name,
)


if TYPE_CHECKING:
    from datasets import Dataset


_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def _first_byte(file: io.FileIO, name: str) -> int:
    """Where a tensor begins in a whole safetensors file, which safetensors itself does not tell: after 8 bytes,
    little-endian, with the length of the header, and the header, JSON, from whose end `data_offsets` count."""
    length = int.from_bytes(file.read(8), "little")
    return 8 + length + json.loads(file.read(length))[name]["data_offsets"][0]


def _fill(file: io.FileIO, buffer: memoryview) -> None:
    """Reads until `buffer` is full: one read may bring less, on macOS and Windows never more than 2 GB."""
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise ValueError("it ends too early")
        buffer = buffer[count:]


class ActivationStore:
    """
    CLS rows on disk, of which only those asked for are read. Made by [`~hf_vs2.extract_activations`].

    Attributes:
        path (`Path`): the folder.
        metadata (`dict`): the index: `model` {id, revision, fingerprint, dtype}, `layers`, `site`, `preprocessing`,
            `dataset` {split, fingerprint}, `columns` {image, label}, `dtype`, and what came out: `dataset_id`,
            `num_images`, `num_rows`, `hidden_size`, `num_layers`, `class_names`, `skipped`
            [{index, path, error}, ...], `shards`, `made_with`.
    """

    def __init__(self, path: Path, metadata: dict[str, Any]):
        self.path = path
        self.metadata = metadata
        rows = torch.tensor([shard["rows"] for shard in metadata["shards"]], dtype=torch.int64)
        self._ends = rows.cumsum(0)  # shard s holds rows _starts[s] up to _ends[s]
        self._starts = self._ends - rows
        width = metadata["hidden_size"] * ROW_DTYPES[metadata["dtype"]].itemsize * len(metadata["layers"])
        self._holds_its_rows = all(shard["rows"] * width <= shard["bytes"] for shard in metadata["shards"])
        self._offsets: dict[tuple[int, str], int] = {}  # byte at which a layer begins in a shard, of those read so far
        self._checked: set[tuple[int, str]] = set()

    @classmethod
    def open(cls, path: str | os.PathLike, request: dict[str, Any] | None = None) -> ActivationStore:
        """
        Opens a finished store.

        Args:
            path: the store's folder, or a folder that holds exactly one store (an `output_dir` of
                `extract_activations`).
            request (`dict`, *optional*): what the store must have been made from (see `REQUEST_FIELDS`).

        Raises:
            StoreError: (an `OSError`) when there is no store, it is unfinished, a shard is missing or truncated, or it
                does not match `request` (the message names every difference).
        """
        folder = _find_store(Path(os.path.abspath(Path(path).expanduser())))  # the working directory may change
        index = read_index(folder)
        if request is not None and (lines := differences(request, request_of(index))):
            raise StoreError(
                f"The store {folder} was not made from this request (asked != stored): {'; '.join(lines)}"
            )
        if not index["complete"]:
            raise StoreError(
                f"The store {folder} is unfinished: call `extract_activations` with the same arguments to continue it"
            )
        check_complete(folder, index)
        for number, shard in enumerate(index["shards"]):
            file = folder / shard_name(number)
            size = file.stat().st_size if file.is_file() else None
            if size != shard["bytes"]:
                state = "is missing" if size is None else f"has {size} bytes instead of {shard['bytes']}"
                raise StoreError(
                    f"The store {folder} is damaged: {file.name} {state}. Call `extract_activations` with the same "
                    "arguments to make it again"
                )
        return cls(folder, index)

    def __len__(self) -> int:
        return self.metadata["num_rows"]

    def __repr__(self) -> str:
        return (
            f"ActivationStore({str(self.path)!r}, num_rows={len(self)}, hidden_size={self.hidden_size}, "
            f"layers={self.layers}, dtype={self.metadata['dtype']!r})"
        )

    @property
    def hidden_size(self) -> int:
        return self.metadata["hidden_size"]

    @property
    def layers(self) -> list[int]:
        """Layer indices from 0, in ascending order; the last layer of the tower is `num_layers - 1`."""
        return self.metadata["layers"]

    @property
    def class_names(self) -> list[str] | None:
        return self.metadata["class_names"]

    @property
    def labels(self) -> torch.Tensor | None:
        """(len(self),) int64, -1 where the data set has no label; None when labels were not asked for."""
        if self.metadata["columns"]["label"] is None:
            return None
        labels = self._column("label")
        most = len(self.class_names) if self.class_names else torch.iinfo(torch.int64).max
        return self._within(labels, -1, most, "label")

    @property
    def image_indices(self) -> torch.Tensor:
        """(len(self),) int64: row of the data set that each row was made from."""
        most = self.metadata.get("num_images", torch.iinfo(torch.int64).max)
        return self._within(self._column("image_index"), 0, most, "image_index")

    def take(self, indices: torch.Tensor | Sequence[int], layer: int | None = None) -> torch.Tensor:
        """
        Rows by number, in the order asked for; only these are read.

        Args:
            indices: integers in [-len, len), any order, repeats allowed.
            layer (`int`, *optional*): needed only when the store has several; negative counts from the last.

        Returns:
            (len(indices), hidden) float32.
        """
        name = self._layer_name(layer)
        given = torch.as_tensor(indices)
        if given.dtype == torch.bool or (given.is_floating_point() and given.numel()):
            raise TypeError(f"indices must be row numbers, not {given.dtype}; of a mask: mask.nonzero().squeeze(-1).")
        wanted = given.long().flatten()
        wanted = torch.where(wanted < 0, wanted + len(self), wanted)
        if wanted.numel() and not (int(wanted.min()) >= 0 and int(wanted.max()) < len(self)):
            raise IndexError(f"Row numbers must lie in [{-len(self)}, {len(self)}), got {indices}")
        rows = torch.empty(len(wanted), self.hidden_size, dtype=ROW_DTYPES[self.metadata["dtype"]])
        buffer = rows.view(torch.uint8).flatten().numpy().data
        for number, runs in groupby(self._runs(wanted), key=itemgetter(0)):
            self._read(number, name, runs, buffer)
        return rows.float()

    def iter_batches(self, batch_size: int, layer: int | None = None) -> Iterator[torch.Tensor]:
        """All rows in order, `batch_size` at a time: (<= batch_size, hidden) float32."""
        for start in range(0, len(self), COUNT.read(batch_size, "batch_size")):
            yield self.take(torch.arange(start, min(start + batch_size, len(self))), layer)

    def tensor(self, layer: int | None = None) -> torch.Tensor:
        """All rows in memory: (len(self), hidden) float32."""
        name = self._layer_name(layer)
        out = torch.empty(len(self), self.hidden_size)
        for number in range(len(self._ends)):
            out[int(self._starts[number]) : int(self._ends[number])] = self._tensor(number, name)
        return out

    def to_dataset(self, layer: int | None = None) -> Dataset:
        """The rows of one layer as a `datasets.Dataset`: `activation`, `image_index` and, if stored, `label`."""
        import datasets
        import pyarrow as pa

        name = self._layer_name(layer)
        activation = datasets.List(datasets.Value("float32"), length=self.hidden_size)
        features = datasets.Features({"activation": activation, "image_index": datasets.Value("int64")})
        if self.metadata["columns"]["label"] is not None:
            names = self.class_names
            features["label"] = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
        tables = []
        for number in range(len(self._ends)):
            # Shares the mapped memory when rows are float32.
            flat = pa.array(self._tensor(number, name).float().flatten().numpy())
            columns = {"activation": pa.FixedSizeListArray.from_arrays(flat, self.hidden_size)}
            for key in features.keys() - columns.keys():
                columns[key] = pa.array(self._tensor(number, key).numpy())
            tables.append(pa.table(columns, schema=features.arrow_schema))
        fingerprint = f"{request_key(request_of(self.metadata))}-{name}"
        info = datasets.DatasetInfo(features=features)
        return datasets.Dataset(pa.concat_tables(tables), info=info, fingerprint=fingerprint)

    def _layer_name(self, layer: int | None) -> str:
        if not self._holds_its_rows:  # memory is taken by what the index says
            raise _damaged(self.path / INDEX_NAME, f"no shard can hold its rows of {self.hidden_size} numbers")
        return f"layer_{self.resolve(layer)}"

    def resolve(self, layer: int | None) -> int:
        """The index from 0 of a layer that is here; `None` stands for the only one, negative ones count from the
        last. Others are a `ValueError`."""
        if layer is None:
            if len(self.layers) > 1:
                raise ValueError(f"The store {self.path} holds layers {self.layers}: say which one to take (layer=).")
            return self.layers[0]
        index = layer + self.metadata["num_layers"] if layer < 0 else layer
        if index not in self.layers:
            raise ValueError(
                f"The store {self.path} holds layers {self.layers}, not {layer}: extract the images again with "
                f"layers=({layer},)."
            )
        return index

    def _runs(self, wanted: torch.Tensor) -> Iterator[tuple[int, int, int, int]]:
        """`wanted` as stretches that lie on disk as they are asked for: (shard, row in it, place in `wanted`, length),
        in the order of the disk."""
        shard = torch.bucketize(wanted, self._ends, right=True)
        begins = torch.ones_like(wanted, dtype=torch.bool)
        begins[1:] = (wanted.diff() != 1) | (shard.diff() != 0)
        places = begins.nonzero().squeeze(1)
        lengths = torch.cat([places, torch.tensor([len(wanted)])]).diff()
        order = wanted[places].argsort()
        places, lengths = places[order], lengths[order]
        shard = shard[places]
        columns = (shard, wanted[places] - self._starts[shard], places, lengths)
        return zip(*(column.tolist() for column in columns), strict=True)

    def _read(self, number: int, name: str, runs: Iterable[tuple[int, int, int, int]], buffer: memoryview) -> None:
        """Copies `runs` of one shard to their places in `buffer`, which holds all rows asked for.

        The file is not kept open, so that any number of shards, threads and processes will do. It is not mapped: every
        mapped page that was read counts as resident memory, in the end the whole store.
        """
        path = f"{self.path}{os.sep}{shard_name(number)}"
        width = self.hidden_size * ROW_DTYPES[self.metadata["dtype"]].itemsize
        try:
            with open(path, "rb", buffering=0) as file:
                offset = self._offset(number, name, file)
                for _, row, place, count in runs:
                    file.seek(offset + row * width)
                    _fill(file, buffer[place * width : (place + count) * width])
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(path, error) from error

    def _offset(self, number: int, name: str, file: io.FileIO) -> int:
        """Byte of an open shard at which the rows of a layer begin. Refuses a file of another size than the index says
        and, when it is first read, one that safetensors refuses or whose rows are of another dtype or shape."""
        shard, size = self.metadata["shards"][number], os.fstat(file.fileno()).st_size
        if size != shard["bytes"]:
            raise ValueError(f"it has {size} bytes instead of {shard['bytes']}")
        if (number, name) not in self._offsets:
            with safe_open(file.name, framework="pt") as whole:
                self._check_shard(number, whole, name)
            self._offsets[number, name] = _first_byte(file, name)
        return self._offsets[number, name]

    def _tensor(self, number: int, name: str) -> torch.Tensor:
        """A whole tensor of a shard, backed by the mapped file until the tensor is dropped."""
        path = self.path / shard_name(number)
        try:
            with safe_open(path, framework="pt") as shard:
                self._check_shard(number, shard, name)
                return shard.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(path, error) from error

    def _check_shard(self, number: int, shard: Any, name: str) -> None:
        """Refuses, when it is first read, a shard of another store or another place in this one, and a tensor of
        another type or shape or with other numbers than were written."""
        if (number, name) in self._checked:
            return
        header = json.loads((shard.metadata() or {}).get("hf_vs2", "{}"))
        place: dict[str, Any] = {"store": request_key(request_of(self.metadata))}
        if "shard_size" in self.metadata:
            place["start"] = number * self.metadata["shard_size"]
        if not isinstance(header, dict) or not isinstance(header.get("digests", {}), dict):
            raise ValueError("its header is not what was written")
        if any(header.get(name, value) != value for name, value in place.items()):
            raise ValueError(f"it is not shard {number} of this store")
        rows, part = self.metadata["shards"][number]["rows"], shard.get_slice(name)
        expected = ("I64", [rows])
        if name.startswith("layer_"):
            expected = (_SAFETENSORS_DTYPES[self.metadata["dtype"]], [rows, self.hidden_size])
        if (part.get_dtype(), part.get_shape()) != expected:
            raise ValueError(f"{name} is {(part.get_dtype(), part.get_shape())} instead of {expected}")
        if "digests" in header and header["digests"].get(name) != tensor_digest(shard.get_tensor(name)):
            raise ValueError(f"the numbers of {name} are not those that were written")
        self._checked.add((number, name))

    def _within(self, numbers: torch.Tensor, least: int, end: int, name: str) -> torch.Tensor:
        wrong = ((numbers < least) | (numbers >= end)).nonzero()
        if len(wrong):
            shard = int(torch.bucketize(wrong[0], self._ends, right=True))
            raise _damaged(
                self.path / shard_name(shard), f"{name} {int(numbers[wrong[0]])} is not in [{least}, {end})"
            )
        return numbers

    def _column(self, name: str) -> torch.Tensor:
        return torch.cat([self._tensor(number, name) for number in range(len(self._ends))])


def _damaged(path: str | Path, error: Exception | str) -> StoreError:
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):  # the disk, or a missing permission
        return StoreError(f"{path} can't be read: {error}")
    return StoreError(f"{path} is damaged ({error}): extract the activations again")


def _find_store(path: Path) -> Path:
    if (path / INDEX_NAME).is_file():
        return path
    inside = sorted(index.parent for index in path.glob(f"*/{INDEX_NAME}")) if path.is_dir() else []
    if len(inside) == 1:
        return inside[0]
    if inside:
        listed = "; ".join(f"{folder.name} ({_describe(folder)})" for folder in inside)
        raise StoreError(f"{path} holds {len(inside)} activation stores, open one of them: {listed}")
    raise StoreError(f"No activation store at {path}: it holds no {INDEX_NAME}")


def _describe(folder: Path) -> str:
    index = read_index(folder)
    source = " ".join(filter(None, (index.get("dataset_id"), index["dataset"]["split"]))) or "unnamed data"
    state = "" if index["complete"] else ", unfinished"
    return f"{index['model']['id']} on {source}, layers {index['layers']}{state}"
