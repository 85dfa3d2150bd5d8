"""One extraction on its way to a finished store: what is missing, making it, agreeing with other processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers.utils import logging

from ...encoders.vision_tower import VisionTower, best_device
from ..batches import ImageBatch, ImageReader, Span, StreamSpans, read_batches, spans_of_dataset
from ..images import UnreadableImageError
from ..pixels import Normalizer
from .parts import PARTS, Parts, num_parts, part_folder
from .sharing import Claims, WholeJob
from .store import ActivationStore
from .store_format import (
    INDEX_NAME,
    ROW_DTYPES,
    Shard,
    StoreError,
    differences,
    read_index,
    read_shard_header,
    request_of,
    write_index,
    write_shard,
)


logger = logging.get_logger(__name__)

SHARDS_A_PROCESS = 8  # at least so many where there are enough batches: a slow process leaves the others its share


@dataclass
class Extraction:
    """One request on its way to a finished store.

    Processes share the shards: each takes the next that is missing and that nobody has taken, until none is left.
    """

    tower: VisionTower
    reader: ImageReader
    index: dict[str, Any]
    folder: Path
    batch_size: int
    num_workers: int | None
    skip_unreadable: bool
    progress: bool
    is_part: bool = False
    """Of a stream that several processes read: one of them makes a store of its rows, on its way to the whole."""

    def __post_init__(self) -> None:
        together = not self.is_part and distributed.is_available() and distributed.is_initialized()
        self.rank, self.world_size = (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)
        self.normalize = Normalizer(self.reader.processor, self.tower.device)
        self.num_images = len(self.reader.dataset) if hasattr(self.reader.dataset, "__len__") else None  # a stream
        self.spans: Iterable[Span] = ()
        self.total: int | None = None
        self.claims = Claims(self.folder)
        self.store: ActivationStore | None = None

    def run(self) -> ActivationStore:
        """The finished store, from the disk where it is there, else made now."""
        with self._lock():
            self._together(lambda: None)  # nobody looks before the main process holds the lock
            return self._made()

    def _made(self, job: WholeJob | None = None) -> ActivationStore:
        self._together(self._look)
        if self.store is None:
            self._together(self._begin, main_only=True)
            self.index |= _layout(read_index(self.folder))
            self._together(self._plan)  # everybody counts what is missing before anybody adds to it
            shown = self.progress and self.rank == 0
            with contextlib.nullcontext(job) if job else WholeJob(self.folder, self.total, shown=shown) as self.job:
                self._together(self._extract_parts if PARTS in self.index else self._extract)
            if PARTS in self.index:
                self._together(self._join)
            self._together(self._finish, main_only=True)
            self.store = ActivationStore.open(self.folder, request_of(self.index))
        return self.store

    # Agreement between processes

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Held by the main process: others that want the same store wait. The system drops it when a process dies."""
        if self.rank != 0:
            yield
            return
        from huggingface_hub.utils import WeakFileLock

        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(self.folder.with_name(f".{self.folder.name}.lock")):
            yield

    def _together(self, step: Callable[[], None], main_only: bool = False) -> None:
        """Runs a step on every process (or the main one) and waits for all; if one fails, all raise."""
        failure: Exception | None = None
        if self.rank == 0 or not main_only:
            try:
                step()
            except Exception as error:
                failure = error
        if self.world_size > 1:
            device = "cpu" if distributed.get_backend() == "gloo" else best_device()
            failed = torch.tensor([failure is not None], dtype=torch.int32, device=device)
            try:
                with naming_lost_partners():
                    distributed.all_reduce(failed)
            except OSError as lost:
                raise failure or lost from None
            if failure is None and failed.item():
                raise StoreError("The extraction failed on another process: see its message")
        if failure is not None:
            raise failure

    # Steps

    def _look(self) -> None:
        """Opens the store, if it is there and whole."""
        if not (self.folder / INDEX_NAME).exists():
            return
        there = read_index(self.folder)
        if lines := differences(request_of(self.index), request_of(there)):
            raise StoreError(f"{self.folder} holds another store than its name says: {'; '.join(lines)}")
        if there["complete"]:
            try:
                self.store = ActivationStore.open(self.folder)
            except StoreError as error:
                logger.warning(f"{error}: the missing rows are extracted now.")

    def _begin(self) -> None:
        if self.num_images == 0:
            raise ValueError("The data set is empty: there is nothing to extract")
        self.folder.mkdir(exist_ok=True)
        if (self.folder / INDEX_NAME).exists():
            self.index |= _layout(read_index(self.folder))
        else:
            if self.num_images is None:
                parts, files = num_parts(self.reader.dataset, self.world_size), self.reader.dataset.num_shards
                self.index |= {PARTS: [parts, files]} if parts > 1 else {}
            else:
                self.index["shard_size"] = even_shard_size(
                    self.num_images, self.index["shard_size"], self.batch_size, self.world_size
                )
        write_index(self.folder, self.index)
        self.claims.begin()

    def _plan(self) -> None:
        """The batches of what is missing, as this process takes them, and how many images all lack where that is
        known."""
        size = self.index["shard_size"]
        if PARTS in self.index and self.index[PARTS][1] != getattr(self.reader.dataset, "num_shards", None):
            raise StoreError(
                f"{self.folder} was begun with a stream of {self.index[PARTS][1]} files, which this data set isn't: "
                "give that stream, or remove the folder to begin again"
            )

        def takes(number: int) -> bool:
            return self._is_missing(number) and self.claims.take(number)

        if self.num_images is None:  # the last, shorter shard is then always made again
            self.stream, self.reader.dataset = self.reader.dataset, None  # its rows travel with the spans
            self.spans = StreamSpans(self.stream, self.reader.columns, self.batch_size, size, takes)
        else:
            self.spans = spans_of_dataset(self.num_images, self.batch_size, size, takes)
            missing = filter(self._is_missing, range(-(-self.num_images // size)))
            self.total = sum(min(size, self.num_images - number * size) for number in missing)

    def _is_missing(self, number: int) -> bool:
        start, size = number * self.index["shard_size"], self.index["shard_size"]
        stop = start + size if self.num_images is None else min(start + size, self.num_images)
        header = read_shard_header(self.folder, number)
        return header is None or (header["start"], header["stop"], header["store"]) != (start, stop, self.folder.name)

    def _extract(self) -> None:
        shard: Shard | None = None
        batches = read_batches(self.reader, self.spans, self.num_workers, self.tower.device)
        with self.claims.given_up_on_error(), self.tower.inference(), contextlib.closing(batches):
            for batch in batches:
                number = batch.start // self.index["shard_size"]
                if shard is not None and shard.number != number:
                    self._write(shard)
                    shard = None
                shard = shard or Shard(number)
                self._add(shard, batch)
                self.job.add(batch.stop - batch.start)
            if shard is not None:
                self._write(shard)
        if isinstance(self.spans, StreamSpans):
            self.num_images = self.spans.num_images

    def _extract_parts(self) -> None:
        """Takes the parts of a stream that nobody has taken."""
        with self.claims.given_up_on_error():
            for number in range(self.index[PARTS][0]):
                if not self.claims.take(number):
                    continue
                stream = self.stream.shard(num_shards=self.index[PARTS][0], index=number, contiguous=True)
                reader = ImageReader(stream, self.reader.columns, self.reader.processor, f" of part {number}")
                index = {name: value for name, value in self.index.items() if name != PARTS}
                folder = part_folder(self.folder, number)
                folder.parent.mkdir(parents=True, exist_ok=True)
                replace(self, reader=reader, index=index, folder=folder, is_part=True)._made(self.job)

    def _join(self) -> None:
        """The shards, of the parts' rows: only now is known at which image each part begins."""
        parts, size = Parts(self.folder, self.index[PARTS][0]), self.index["shard_size"]
        self.num_images = parts.num_images
        for number in range(self.rank, -(-self.num_images // size), self.world_size):
            if self._is_missing(number):
                shard = Shard(number)
                shard.stop = min((number + 1) * size, self.num_images)
                parts.fill(shard, number * size, ROW_DTYPES[self.index["dtype"]])
                self._write(shard)

    def _add(self, shard: Shard, batch: ImageBatch) -> None:
        for item in batch.unreadable:
            if not self.skip_unreadable:
                raise UnreadableImageError(
                    f"{item['error']}. Mend or remove it, or leave such images out with on_error='skip'"
                )
            logger.warning(f"Skipped: {item['error']}")
        if batch.pixels is not None:
            rows = self.tower.cls_rows(self.normalize(batch.pixels), self.index["layers"])
            for layer, values in rows.items():
                shard.rows[layer].append(_checked(values, ROW_DTYPES[self.index["dtype"]], layer, batch.names))
        shard.indices += batch.indices
        shard.labels += batch.labels
        shard.skipped += batch.unreadable
        shard.stop = batch.stop

    def _write(self, shard: Shard) -> None:
        empty = torch.empty(0, self.tower.hidden_size, dtype=ROW_DTYPES[self.index["dtype"]])
        tensors = {f"layer_{layer}": torch.cat([empty, *shard.rows[layer]]) for layer in self.index["layers"]}
        tensors["image_index"] = torch.tensor(shard.indices, dtype=torch.int64)
        if self.index["columns"]["label"] is not None:
            tensors["label"] = torch.tensor(shard.labels, dtype=torch.int64)
        start = shard.number * self.index["shard_size"]
        header = {"store": self.folder.name, "start": start, "stop": shard.stop, "skipped": shard.skipped}
        write_shard(self.folder, shard.number, tensors, header)
        self.job.count()

    def _finish(self) -> None:
        """Gathers what the shards say and declares the store complete."""
        if not self.num_images and not self.is_part:
            raise ValueError("The data set is empty: there is nothing to extract")
        numbers = range(-(-(self.num_images or 0) // self.index["shard_size"]))
        headers = [header for number in numbers if (header := read_shard_header(self.folder, number)) is not None]
        if len(headers) < len(numbers):
            raise StoreError(f"A shard of {self.folder} disappeared during the extraction: run it again")
        skipped = [item for header in headers for item in header["skipped"]]
        num_rows = sum(header["rows"] for header in headers)
        if num_rows == 0 and not self.is_part:
            raise ValueError(f"None of the {self.num_images} images can be read; the first: {skipped[0]['error']}")
        if skipped and not self.is_part:
            logger.warning(f"{len(skipped)} of {self.num_images} images could not be read and were skipped.")
        self.claims.end()
        if self.index.pop(PARTS, None):
            write_index(self.folder, self.index)  # from here on it is a store like others, without its last line
            Parts.remove(self.folder)
        self.index |= {
            "num_images": self.num_images,
            "num_rows": num_rows,
            "skipped": skipped,
            "shards": [{"rows": header["rows"], "bytes": header["bytes"]} for header in headers],
            "complete": True,
        }
        write_index(self.folder, self.index)


@contextlib.contextmanager
def naming_lost_partners() -> Iterator[None]:
    """Says that another process has died or hangs where torch says which socket was closed."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain ones; their text begins with the place in its source.
        if not (isinstance(error, distributed.DistError) or "gloo" in str(error)):
            raise
        raise OSError(
            "Another process of this job has died or does not answer: see its message, then start the job again; it "
            f"goes on from what was saved. ({error})"
        ) from error


def even_shard_size(num_images: int, shard_size: int, batch_size: int, world_size: int) -> int:
    """Images per shard, at most `shard_size`; so few that each process gets `SHARDS_A_PROCESS` where there are enough
    images, and as many as the others where all are equally fast.

    Whole batches where `shard_size` is: every image then is in the batch that it is in when one process does all.
    """
    if world_size == 1:
        return shard_size
    num_shards = max(-(-num_images // shard_size), SHARDS_A_PROCESS * world_size)
    num_shards += -num_shards % world_size
    size = -(-num_images // num_shards)
    return min(shard_size, size + -size % batch_size)


def _checked(values: torch.Tensor, dtype: torch.dtype, layer: int, names: Sequence[str]) -> torch.Tensor:
    """`values` (n, hidden) on the CPU in the store's dtype; raises where a row is not finite, naming its image."""
    rows = values.to(dtype)
    finite = rows.isfinite().all(dim=1)
    if not finite.all():
        bad = int((~finite).nonzero()[0])
        if values[bad].isfinite().all():
            reason = f"does not fit into {dtype}: store it with dtype='float32'"
        else:
            reason = "is not finite: weights of the model, or image_mean and image_std of its processor, are damaged"
            if values.dtype != torch.float32:
                reason = f"is not finite: the model overflows in {values.dtype}, load it with dtype=torch.float32"
        raise ValueError(f"The CLS activation of {names[bad]} after layer {layer} {reason}")
    return rows.cpu()


def _layout(index: dict[str, Any]) -> dict[str, Any]:
    """How the rows of an unfinished store are cut into files, whoever began it."""
    return {name: index[name] for name in ("shard_size", PARTS) if name in index}
