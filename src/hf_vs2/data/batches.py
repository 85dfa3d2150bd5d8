"""Rows of a data set to batches of resized, cropped uint8 images, in this process or in DataLoader workers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from .ahead import map_ahead, num_processors
from .images import UnreadableImageError, image_name, image_path, open_image
from .inputs import NamedImage
from .load import image_mode
from .pixels import pixels_needed, uint8_pixels


class Columns(NamedTuple):
    """Where a row has its image and, if wanted, its label; and what [`image_mode`] says of the images."""

    image: str
    label: str | None = None
    mode: str | None = None

    @classmethod
    def of(cls, dataset: Any, image: str, label: str | None = None) -> Columns:
        return cls(image, label, image_mode(dataset, image))

    def description(self) -> dict[str, str | None]:
        """What a store is keyed by: a mode only where there is one."""
        return {"image": self.image, "label": self.label} | ({} if self.mode is None else {"mode": self.mode})


class Span(NamedTuple):
    """Images `start` up to `stop` of the data set; `rows` holds them where they come from a stream."""

    start: int
    stop: int
    rows: list[dict[str, Any]] | None = None


@dataclass
class ImageBatch:
    """The readable images of a span."""

    start: int
    stop: int
    pixels: torch.Tensor | None = None
    """(n, channels, height, width) uint8; None when no image of the span could be read."""
    indices: list[int] = field(default_factory=list)
    """Their n places in the data set."""
    names: list[str] = field(default_factory=list)
    """How messages name them."""
    labels: list[int] = field(default_factory=list)
    unreadable: list[dict[str, Any]] = field(default_factory=list)
    """[{index, path, error}] of the others."""

    def pin_memory(self) -> ImageBatch:
        if self.pixels is not None:
            self.pixels = self.pixels.pin_memory()
        return self


class _Row(NamedTuple):
    """One image of a span."""

    place: int
    value: Any
    name: str
    label: Any


@dataclass
class ImageReader(TorchDataset):
    """`reader[span]` is the [`ImageBatch`] of a [`Span`]."""

    dataset: Any
    columns: Columns
    processor: Any
    of_part: str = ""
    """Of the data set, in the names of images."""

    def __getitem__(self, span: Span) -> ImageBatch:
        rows = self.rows(span)
        return self.batch(rows, [self.read(row) for row in rows])

    def rows(self, span: Span) -> list[_Row]:
        """What the data set holds of the span."""
        if span.rows is not None:
            values = [row[self.columns.image] for row in span.rows]
            labels = [row[self.columns.label] if self.columns.label else None for row in span.rows]
        else:
            columns = self.dataset[span.start : span.stop]
            values = columns[self.columns.image]
            labels = [None] * len(values) if self.columns.label is None else columns[self.columns.label]
        numbered = enumerate(zip(values, labels, strict=True), span.start)
        return [
            _Row(place, value, image_name(f"image {place}{self.of_part}", value), label)
            for place, (value, label) in numbered
        ]

    def read(self, row: _Row) -> torch.Tensor | UnreadableImageError:
        """The image's pixels, or why there are none."""
        try:
            image = open_image(row.value, row.name, mode=self.columns.mode, at_least=pixels_needed(self.processor))
            return uint8_pixels(image, self.processor, row.name)
        except UnreadableImageError as error:
            return error

    def batch(self, rows: Sequence[_Row], found: Sequence[torch.Tensor | UnreadableImageError]) -> ImageBatch:
        """What [`read`] gave for the rows of a span."""
        batch = ImageBatch(rows[0].place, rows[-1].place + 1)
        pixels = []
        for row, image in zip(rows, found, strict=True):
            if isinstance(image, UnreadableImageError):
                batch.unreadable.append({"index": row.place, "path": image_path(row.value), "error": str(image)})
                continue
            pixels.append(image)
            batch.indices.append(row.place)
            batch.names.append(row.name)
            batch.labels.append(_integer_label(row.label, row.name))
        if pixels:
            if any(image.shape != pixels[0].shape for image in pixels):
                sizes = sorted({tuple(image.shape[-2:]) for image in pixels})
                raise ValueError(f"The image processor gives images of several sizes ({sizes}): it must crop to one")
            batch.pixels = torch.stack(pixels)
        return batch


class Pixels(NamedTuple):
    """Images given to be classified or explained, read."""

    pixels: torch.Tensor
    """(n, channels, height, width) uint8."""
    images: list[NamedImage]
    """The n images."""
    unreadable: dict[int, UnreadableImageError]
    """Places, among those of the group, of the images that can't be read."""


def read_pixels(images: Sequence[NamedImage], processor: Any, timeout: float | None = None) -> torch.Tensor:
    """[`read_groups`] of one group, read by several threads: (n, channels, height, width) uint8."""
    num_threads = num_processors() if len(images) > 1 else 0
    (batch,) = read_groups([images], processor, timeout, num_threads=num_threads)
    return batch.pixels


def read_groups(
    groups: Iterable[Sequence[NamedImage]],
    processor: Any,
    timeout: float | None = None,
    *,
    num_threads: int = 0,
    skip: bool = False,
) -> Generator[Pixels, None, None]:
    """
    Each group of images as `processor` resizes and crops them, read ahead by `num_threads`; with `skip` without those
    that can't be read, and no group without images.

    Raises:
        UnreadableImageError: an image can't be read. TypeError: it is none, or the processor gives other than uint8.
    """

    def read(named: NamedImage) -> torch.Tensor | UnreadableImageError:
        try:
            return uint8_pixels(named.read(timeout, pixels_needed(processor)), processor, named.name)
        except UnreadableImageError as error:
            if not skip:
                raise
            return error

    def gather(images: Sequence[NamedImage], found: list[torch.Tensor | UnreadableImageError]) -> Pixels:
        read = [(image, pixels) for image, pixels in zip(images, found, strict=True) if torch.is_tensor(pixels)]
        unreadable = {place: error for place, error in enumerate(found) if isinstance(error, UnreadableImageError)}
        pixels = torch.stack([pixels for _, pixels in read]) if read else torch.empty(0)
        return Pixels(pixels, [image for image, _ in read], unreadable)

    return map_ahead(read, groups, gather, num_threads=num_threads)


def spans_of_dataset(
    num_images: int, batch_size: int, shard_size: int, wanted: Callable[[int], bool]
) -> Iterator[Span]:
    """Batches of the wanted shards; none crosses the end of a shard, so a shard's batches are always the same."""
    for first in range(0, num_images, shard_size):
        if wanted(first // shard_size):
            end = min(first + shard_size, num_images)
            for start in range(first, end, batch_size):
                yield Span(start, min(start + batch_size, end))


@dataclass
class StreamSpans:
    """The same for a stream, whose rows travel with the batches: read here, in order, and decoded in the workers."""

    stream: Any
    columns: Columns
    batch_size: int
    shard_size: int
    wanted: Callable[[int], bool]
    num_images: int | None = None
    """Length of the stream, known once it has been read to its end."""

    def __iter__(self) -> Iterator[Span]:
        names = {name for name in (self.columns.image, self.columns.label) if name is not None}
        rows: list[dict[str, Any]] = []
        seen = 0
        for index, row in enumerate(self.stream):
            if index % self.shard_size == 0:
                take = self.wanted(index // self.shard_size)
            seen = index + 1
            if not take:
                continue
            if missing := names - row.keys():
                raise ValueError(f"Row {index} has no column {', '.join(sorted(missing))}; it has {', '.join(row)}")
            rows.append({name: row[name] for name in names})
            if len(rows) == self.batch_size or seen % self.shard_size == 0:
                yield Span(seen - len(rows), seen, rows)
                rows = []
        if rows:
            yield Span(seen - len(rows), seen, rows)
        self.num_images = seen


def read_batches(
    reader: ImageReader, spans: Iterable[Span], num_workers: int | None, device: torch.device
) -> Generator[ImageBatch, None, None]:
    """
    The spans' batches in order. Close it (`contextlib.closing`) where its end may not be reached.

    Args:
        num_workers (`int`, *optional*): processes that read the next batches meanwhile; 0 reads each when it is asked
            for. By default threads read ahead, as many as there are processors to have.
    """
    if num_workers:
        yield from DataLoader(
            reader,
            sampler=spans,
            batch_size=None,
            collate_fn=_unchanged,  # type: ignore[arg-type]
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            # The default draws from the global generator: extracting must not change what a seeded run does next.
            generator=torch.Generator(),
        )
        return

    def gather(rows: Sequence[_Row], found: list[torch.Tensor | UnreadableImageError]) -> ImageBatch:
        batch = reader.batch(rows, found)
        if device.type != "cuda":
            return batch
        with torch.cuda.device(device):  # a thread starts on the first GPU
            return batch.pin_memory()

    num_threads = num_processors() if num_workers is None else 0
    yield from map_ahead(reader.read, map(reader.rows, spans), gather, num_threads=num_threads)


def _unchanged(batch: ImageBatch) -> ImageBatch:
    return batch


def _integer_label(label: Any, name: str) -> int:
    if label is None:
        return -1
    if isinstance(label, str) or int(label) != label:
        raise ValueError(
            f"{name} has label {label!r}, expected an integer: turn names into numbers with "
            "`dataset.class_encode_column(...)`"
        )
    return int(label)
