"""What people give a pipeline as images, read as transformers reads it, and named when it can't be read."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset
from transformers.image_utils import load_image

from .images import UnreadableImageError, open_image


# transformers' own, so that a checkpoint scores the same in both pipelines.
DEFAULT_TEMPLATES = ("This is a photo of {}.",)

SINGLE_IMAGE = (str, os.PathLike, bytes, bytearray, memoryview, dict, Image.Image, np.ndarray, torch.Tensor)
"""The types of one image; everything else holds several."""


@dataclass(frozen=True)
class NamedImage:
    """An image as it was given, and how messages name it."""

    image: Any
    name: str

    def read(self, timeout: float | None) -> Image.Image:
        """RGB, as transformers' pipeline reads it."""
        name = self.name
        if isinstance(self.image, (str, os.PathLike)):
            name = f"{name} ({os.fspath(self.image)[:200]})"
        if not isinstance(self.image, SINGLE_IMAGE):
            raise TypeError(
                f"{name} is {describe_type(self.image)}: expected a path, URL, bytes, PIL image, array or tensor."
            )
        if isinstance(self.image, dict) and not self.image.keys() & {"bytes", "path"}:
            raise TypeError(
                f"{name} is a dict with {sorted(map(str, self.image))}, not one with 'bytes' or 'path'. To classify a column of "
                "a data set, give KeyDataset(dataset, 'image') (transformers.pipelines.pt_utils) or dataset['image']."
            )
        if isinstance(self.image, (np.ndarray, torch.Tensor)):
            return open_image(self.image, name)
        try:
            return load_image(_as_transformers_takes_it(self.image), timeout)
        # Pillow's decoders raise nearly every exception type on damaged files, and the web adds its own.
        except Exception as error:
            raise UnreadableImageError(f"{name} cannot be read ({type(error).__name__}: {error})") from error


def _as_transformers_takes_it(image: Any) -> Any:
    """A string or a PIL image."""
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(image, (bytes, bytearray, memoryview)):
        image = Image.open(io.BytesIO(image))
    if isinstance(image, os.PathLike):
        image = os.fspath(image)
    if isinstance(image, str) and "://" in image and not image.startswith(("http://", "https://")):
        return open_image(image)  # `datasets` knows other file systems and files inside archives
    if isinstance(image, str) and os.path.isfile(image):
        image = Image.open(image)
    if isinstance(image, Image.Image) and (image.mode.startswith("I") or image.mode == "F"):
        return open_image(image)  # transformers' conversion clips 16 bits to white
    return image


def describe_type(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


class NamedImages(Dataset):
    """Images that can be counted, each with its place in the order."""

    def __init__(self, images: Any):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> NamedImage:
        name = f"image {index}"
        if isinstance(self.images, (list, tuple)):
            return NamedImage(self.images[index], name)
        try:
            return NamedImage(self.images[index], name)
        # A data set that decodes images itself raises whatever Pillow does, and does not say where.
        except Exception as error:
            raise UnreadableImageError(f"{name} cannot be read ({type(error).__name__}: {error})") from error


class NamedStream(IterableDataset):
    """Images that come one after another. As a data set, so that no version of transformers turns it into a list."""

    def __init__(self, images: Iterable[Any]):
        self.images = images

    def __iter__(self) -> Iterator[NamedImage]:
        return (NamedImage(image, f"image {index}") for index, image in enumerate(self.images))


__all__ = ["DEFAULT_TEMPLATES", "SINGLE_IMAGE", "NamedImage", "NamedImages", "NamedStream", "describe_type"]
