"""The images of an adaptation: as people give them, and what each is called in lists of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.images import image_path
from ..data.inputs import SINGLE_IMAGE
from ..data.load import load_images, undecoded


if TYPE_CHECKING:
    from datasets import Dataset


def dataset_of(images: Any, image_column: str = "image", on_error: str = "raise") -> tuple[Dataset, str]:
    """
    A data set of images, undecoded, and what to call it.

    Args:
        images: a folder, or anything else that [`load_images`] opens; a list of images (paths, PIL images, bytes); or
            a data set whose rows can be counted.

    Raises:
        TypeError: it is something else, or a stream. ValueError, OSError: see [`load_images`].
    """
    import datasets

    if isinstance(images, (str, os.PathLike)):
        return load_images(images, image_column=image_column, on_error=on_error), os.fspath(images)
    if isinstance(images, datasets.Dataset):
        return undecoded(images, image_column), "a data set"
    if isinstance(images, datasets.IterableDataset) or not isinstance(images, Sequence):
        raise TypeError(
            f"images must be a folder, a list of images or a `datasets.Dataset`, not {type(images).__name__}: they "
            "are read more than once, which a stream can't be."
        )
    wrong = next((number for number, one in enumerate(images) if not isinstance(one, SINGLE_IMAGE)), None)
    if wrong is not None:
        raise TypeError(f"image {wrong} of the list is of type {type(images[wrong]).__name__}, which is no image.")
    features = datasets.Features({image_column: datasets.Image()})
    values = [os.fspath(one) if isinstance(one, os.PathLike) else one for one in images]
    made = datasets.Dataset.from_dict({image_column: values}, features=features)
    return undecoded(made, image_column), f"a list of {len(images)} images"


def image_names(dataset: Dataset, image_column: str, source: str) -> list[str]:
    """What each row is called in tables: the path of its file, within the folder `source` where it lies there, or
    `image 17` where rows have no paths, or some share one."""
    if dataset.format["type"] == "custom":  # `with_transform`: reading a name would decode the image
        return [f"image {number}" for number in range(len(dataset))]
    column = dataset.select_columns([image_column]).with_format("arrow")
    paths: list[Any] = []
    for table in column.iter(4096):
        chunk = table.column(image_column)
        if hasattr(chunk.type, "fields") and chunk.type.get_field_index("path") >= 0:
            import pyarrow.compute

            chunk = pyarrow.compute.struct_field(chunk, "path")
            paths += chunk.to_pylist()
        else:
            values = chunk.to_pylist()
            paths += [image_path(value) if isinstance(value, str) else None for value in values]
    root = Path(source).absolute() if os.path.isdir(source) else None
    names = [None if path is None else _within(path, root) for path in paths]
    if None in names or len(set(names)) < len(names):
        return [f"image {number}" for number in range(len(names))]
    return [str(name) for name in names]


def _within(path: str, root: Path | None) -> str:
    place = Path(path)
    if root is not None and place.is_absolute() and place.is_relative_to(root):
        place = place.relative_to(root)
    return place.as_posix()
