"""What the pipeline answers to images that can be counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from transformers import Pipeline
from transformers.utils import logging

from ..data.batches import read_groups
from ..data.images import image_name
from ..data.inputs import NamedImages
from .pipeline_options import OneCall


logger = logging.get_logger(__name__)


@dataclass
class Answers:
    """The answers in order, each time this is iterated over; images are read ahead by `num_threads`. The three
    mappings are the options of the pipeline's `preprocess`, `forward` and `postprocess`."""

    pipeline: Pipeline
    images: NamedImages
    batch_size: int
    num_threads: int
    reading: Mapping[str, Any]
    scoring: Mapping[str, Any]
    answering: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Any]:
        done, images = 0, self.images
        groups = (
            [images[place] for place in range(first, min(first + self.batch_size, len(images)))]
            for first in range(0, len(images), self.batch_size)
        )
        processor = self.pipeline.image_processor
        scoring = {**self.scoring, "call": OneCall()}
        options = {**self.reading, "num_threads": self.num_threads, "skip": images.skip}
        with closing(read_groups(groups, processor, **options)) as batches:
            for batch in batches:
                for place, error in batch.unreadable.items():
                    images.unreadable[done + place] = error
                    logger.warning(f"Skipped: {error}")
                done += len(batch.images) + len(batch.unreadable)
                if not batch.images:
                    continue
                names = [image_name(named.name, named.image) for named in batch.images]
                outputs = self.pipeline.forward({"pixel_values": batch.pixels, "name": names}, **scoring)
                for place in range(len(names)):
                    own = {name: None if rows is None else rows[place : place + 1] for name, rows in outputs.items()}
                    yield self.pipeline.postprocess(own, **self.answering)
