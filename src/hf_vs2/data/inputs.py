"""What people give to be classified or explained: one image or several, each with a name for messages."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from .images import UnreadableImageError, image_name, open_image
from .load import undecoded_column


# transformers' own, so that a checkpoint scores the same in both pipelines.
DEFAULT_TEMPLATES = ("This is a photo of {}.",)

SINGLE_IMAGE = (str, os.PathLike, bytes, bytearray, memoryview, dict, Image.Image, np.ndarray, torch.Tensor)
"""The types of one image; everything else holds several."""


@dataclass(frozen=True)
class NamedImage:
    """An image as it was given, how messages name it, and the mode of [`image_mode`] that its data set asks for."""

    image: Any
    name: str = "the image"
    mode: str | None = None

    def read(self, timeout: float | None = None, at_least: int | None = None) -> Image.Image:
        """RGB, by [`open_image`], which says what the arguments are.

        Raises:
            TypeError: it is no image. UnreadableImageError: it can't be read.
        """
        name = image_name(self.name, self.image)
        if not isinstance(self.image, SINGLE_IMAGE):
            raise TypeError(
                f"{name} is {describe_type(self.image)}: expected a path, URL, bytes, PIL image, array or tensor."
            )
        if isinstance(self.image, dict) and not self.image.keys() & {"bytes", "path"}:
            raise TypeError(
                f"{name} is a dict with {sorted(map(str, self.image))}, not one with 'bytes' or 'path'. To classify a "
                "column of a data set, give KeyDataset(dataset, 'image') (transformers.pipelines.pt_utils) or "
                "dataset['image']."
            )
        return open_image(self.image, name, mode=self.mode, timeout=timeout, at_least=at_least)


def describe_type(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


class NamedImages(Dataset):
    """
    Images that can be counted, each with its place in the order. Those of a column of a data set are opened here, not
    there.

    Attributes:
        skip (`bool`): leave out what can't be read.
        unreadable (`dict[int, UnreadableImageError]`): what was left out, by place, of the images up to the last
            answer.
    """

    def __init__(self, images: Any, skip: bool = False):
        self.images, self.mode = undecoded_column(images)
        self.skip = skip
        self.unreadable: dict[int, UnreadableImageError] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> NamedImage:
        name = f"image {index}"
        if isinstance(self.images, (list, tuple)):
            image = self.images[index]
            return image if isinstance(image, NamedImage) else NamedImage(image, name)
        try:
            return NamedImage(self.images[index], name, self.mode)
        # A data set that decodes images itself raises whatever Pillow does, and does not say where.
        except Exception as error:
            raise UnreadableImageError(f"{name} cannot be read ({type(error).__name__}: {error})") from error


class NamedStream(IterableDataset):
    """Images that come one after another, by their place in the order where they have no name. As a data set, so that
    no version of transformers turns it into a list."""

    def __init__(self, images: Iterable[Any]):
        self.images = images

    def __iter__(self) -> Iterator[NamedImage]:
        for index, image in enumerate(self.images):
            yield image if isinstance(image, NamedImage) else NamedImage(image, f"image {index}")


def named_images(images: Any) -> NamedImages | NamedStream:
    """One image or several, whatever holds them; a `TypeError` for anything else."""
    if isinstance(images, NamedImages):
        return images
    if isinstance(images, SINGLE_IMAGE):
        return NamedImages([NamedImage(images)])
    if hasattr(images, "__len__") and hasattr(images, "__getitem__"):
        return NamedImages(images)
    if isinstance(images, Iterable):
        return NamedStream(images)
    raise TypeError(f"One image or several expected; {describe_type(images)} is neither.")
