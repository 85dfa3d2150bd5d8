"""Augmented views of images, for the test-time-augmentation rows of the paper's table (Ens+Aug)."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageOps


SCALE = (0.5, 1.0)
"""Share of an image's area that a random crop keeps."""


class AugmentedView:
    """
    An image processor that sees a random crop of each image, mirrored half of the time; everything else is the
    processor's own.

    The crop is drawn from a generator seeded with the image's pixels and the number of the view, so that it depends
    neither on the order of the images nor on the number of workers. Give it to
    [`~hf_vs2.extract_activations`] as `image_processor=`: the store's key then tells the view.

    Args:
        processor: a CLIP image processor.
        number (`int`): which view.
    """

    def __init__(self, processor: Any, number: int):
        self.processor, self.number = processor, number

    def __getattr__(self, name: str) -> Any:
        if name == "processor":  # while a worker process unpickles it, before there is one
            raise AttributeError(name)
        return getattr(self.processor, name)

    def __call__(self, image: Image.Image, **kwargs: Any) -> Any:
        return self.processor(self.crop(image), **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The processor's settings and the view, which a store is keyed by."""
        return self.processor.to_dict() | {"augmentation": {"crop_scale": SCALE, "mirror": 0.5, "view": self.number}}

    def crop(self, image: Image.Image) -> Image.Image:
        """The crop of this view: of the image's own shape, mirrored half of the time."""
        random = np.random.default_rng([zlib.crc32(image.tobytes()), self.number])
        side = random.uniform(*SCALE) ** 0.5
        width, height = (max(1, round(length * side)) for length in image.size)
        left, top = random.integers(image.width - width + 1), random.integers(image.height - height + 1)
        view = image.crop((left, top, left + width, top + height))
        return ImageOps.mirror(view) if random.random() < 0.5 else view
