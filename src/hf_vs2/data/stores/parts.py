"""A stream in parts: each process reads files of its own, and the rows are put together once all lengths are known."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .store import ActivationStore
from .store_format import Shard


logger = logging.get_logger(__name__)

PARTS = "stream_parts"
"""Field of the index of an unfinished store: in how many parts its stream is read, and of how many files it is."""
_PARTS_A_PROCESS = 8  # where there are as many files: a slow process leaves the others its share


def num_parts(stream: Any, world_size: int) -> int:
    """In how many parts, each of whole files, processes can read a stream; 1 where each has to read all of it."""
    if world_size == 1:
        return 1
    if stream.num_shards >= world_size and _is_its_files_in_turn(stream):
        return min(stream.num_shards, _PARTS_A_PROCESS * world_size)
    logger.warning(
        f"Each of the {world_size} processes reads the whole stream, and decodes its own images: it is of "
        f"{stream.num_shards} file(s), fewer than processes, or is cut, shuffled, joined or mapped in batches."
    )
    return 1


def _is_its_files_in_turn(stream: Any) -> bool:
    """Whether its rows are those of its files, one after another, whoever reads a file. What isn't known isn't."""
    if any(getattr(stream, name, None) for name in ("_shuffling", "_distributed", "_epoch")):
        return False
    source = getattr(stream, "_ex_iterable", None)
    while type(source).__name__ in _ROW_BY_ROW:
        if getattr(source, "batched", False) or getattr(source, "with_indices", False):
            return False
        source = source.ex_iterable  # type: ignore[union-attr]
    return type(source).__name__ in ("ExamplesIterable", "ArrowExamplesIterable")


_ROW_BY_ROW = {
    "FilteredExamplesIterable",
    "FormattedExamplesIterable",
    "MappedExamplesIterable",
    "SelectColumnsIterable",
    "TypedExamplesIterable",
}


def _folder(store: Path) -> Path:
    return store / ".parts"


def part_folder(store: Path, number: int) -> Path:
    """Where the store of a part lies, under the same name, which its shards hold."""
    return _folder(store) / f"{number:05d}" / store.name


def shard_files(store: Path) -> Iterator[Path]:
    """Those of the store and of its parts, less any that a process is at."""
    return chain(store.glob("shard-*.safetensors"), _folder(store).glob("*/*/shard-*.safetensors"))


class Parts:
    """The finished parts of a stream, one after another."""

    def __init__(self, store: Path, number: int):
        self.stores = [ActivationStore.open(part_folder(store, part)) for part in range(number)]
        self.starts = list(accumulate((part.metadata["num_images"] for part in self.stores), initial=0))
        self.num_images = self.starts.pop()
        self.columns = [(part.image_indices, part.labels) if len(part) else None for part in self.stores]

    @staticmethod
    def remove(store: Path) -> None:
        shutil.rmtree(_folder(store))

    def fill(self, shard: Shard, start: int, dtype: torch.dtype) -> None:
        """Gives the shard the rows of images `start` up to its end."""
        for part, first, columns in zip(self.stores, self.starts, self.columns, strict=True):
            wanted = range(start - first, shard.stop - first)
            shard.skipped += [
                item | {"index": item["index"] + first} for item in part.metadata["skipped"] if item["index"] in wanted
            ]
            if columns is None:
                continue
            indices, labels = columns
            low, high = torch.searchsorted(indices, torch.tensor([wanted.start, wanted.stop])).tolist()
            if low < high:
                for layer in part.layers:
                    shard.rows[layer].append(part.take(torch.arange(low, high), layer).to(dtype))
                shard.indices += (indices[low:high] + first).tolist()
                shard.labels += [] if labels is None else labels[low:high].tolist()
