"""Embeddings of images and texts for search and clustering, asked for as in sentence-transformers."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from transformers.pipelines.pt_utils import KeyDataset

from ..config.schema import COUNT
from ..config.steering import refuse_settings_of_plain
from ..data.ahead import num_processors
from ..data.batches import read_groups
from ..data.folders.listing import list_images
from ..data.inputs import SINGLE_IMAGE, NamedImage, NamedImages, named_images
from ..data.labels.prompts import text_features, tokenized
from ..data.load import undecoded
from ..data.pixels import Normalizer
from ..encoders.tail import unit_embeds
from ..encoders.wrapped import device_of
from ..files.progress import progress_bar
from ..steering.steerer import Steerer
from .loading import processing_of
from .steering import SteeringMixin


T = TypeVar("T")


class EmbeddingMixin(SteeringMixin):
    """Of [`VS2CLIPForZeroShot`]: `encode_images` and `encode_text`."""

    def encode_images(
        self,
        images: Any,
        batch_size: int = 32,
        *,
        steered: bool | None = None,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = False,
        image_column: str = "image",
        processor: Any = None,
        **settings: Any,
    ) -> np.ndarray | torch.Tensor | list[torch.Tensor]:
        """
        Embeddings of images in the space that CLIP shares between images and texts, steered or not.

        ```python
        >>> photos = model.encode_images("photos/", normalize_embeddings=True)  # (number of images, projection_dim)
        >>> query = model.encode_text("a dog on a beach", normalize_embeddings=True)  # (projection_dim,)
        >>> best = (photos @ query).argsort()[::-1]
        ```

        Args:
            images: one image (a path, address, PIL image, array or anything else that the pipeline takes), a folder,
                whose images come in the order of [`list_images`], a list or column of images, a `datasets.Dataset` or
                `IterableDataset`, or any other iterable of images.
            batch_size (`int`, *optional*, defaults to 32): images per forward pass.
            steered (`bool`, *optional*): `True` steers, `False` gives plain CLIP's embeddings; by default as the model
                is set. The gate leaves an image that it holds back as plain CLIP has it.
            show_progress_bar (`bool`, *optional*): by default on a terminal, for more than one batch.
            convert_to_numpy, convert_to_tensor (`bool`): a numpy array (the default), one tensor on the model's device
                (`convert_to_tensor=True`), or, with both `False`, a list of tensors.
            normalize_embeddings (`bool`, *optional*, defaults to `False`): whether embeddings have length 1, so that a
                dot product is the cosine.
            image_column (`str`, *optional*, defaults to `"image"`): of a data set.
            processor (*optional*): a `CLIPProcessor`, or a pair of tokenizer and image processor. By default those of
                where the model was loaded from.
            settings: of [`Steering`] for this call, such as `method="centroid"` or `gate=None`.

        Returns:
            float32 `(number of images, projection_dim)`, rows in the order of the images; of one image
            `(projection_dim,)`.

        Raises:
            `UnreadableImageError` (a `ValueError`): naming an image that can't be read.
            `ValueError`: no image, or a method that moves no image with `steered=True`. `TypeError`: other things than
                images.
        """
        steerer = self._steerer_for(steered, settings)
        is_one = isinstance(images, SINGLE_IMAGE) and not _is_folder(images)
        inputs, total = _as_inputs(images, image_column)
        COUNT.read(batch_size, "batch_size")
        _, image_processor = self._processing(processor)
        normalizer = Normalizer(image_processor, device_of(self.clip))
        shown = show_progress_bar if show_progress_bar is not None else total is None or total > batch_size
        found = []
        num_threads = 0 if is_one else num_processors()
        batches = read_groups(_groups(inputs, batch_size), image_processor, num_threads=num_threads)
        bar = progress_bar(shown=shown, total=total, desc="Images", unit=" images")
        with torch.no_grad(), bar, closing(batches):
            for batch in batches:
                features = steerer.features(normalizer(batch.pixels).to(self.clip.dtype)).features
                names = [named.name for named in batch.images]
                found.append(_checked(features, normalize_embeddings, names.__getitem__))
                bar.update(len(names))
        if not found:
            raise ValueError("There is no image to encode.")
        return _converted(torch.cat(found), is_one, convert_to_numpy, convert_to_tensor)

    def encode_text(
        self,
        texts: str | Sequence[str],
        batch_size: int = 256,
        *,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = False,
        processor: Any = None,
    ) -> np.ndarray | torch.Tensor | list[torch.Tensor]:
        """
        Embeddings of texts, as they are: no template is put around them. Steering does not change them.

        Args:
            texts: one text, or a list of them.
            batch_size (`int`, *optional*, defaults to 256): texts per forward pass.
            show_progress_bar, convert_to_numpy, convert_to_tensor, normalize_embeddings, processor: see
                [`~VS2CLIPForZeroShot.encode_images`].

        Returns:
            float32 `(number of texts, projection_dim)`; of one text `(projection_dim,)`.

        Raises:
            `ValueError`: no text. `TypeError`: other things than texts.
        """
        is_one = isinstance(texts, str)
        given = [texts] if isinstance(texts, str) else list(texts)
        wrong = [type(text).__name__ for text in given if not isinstance(text, str)]
        if wrong or not given:
            raise (TypeError if wrong else ValueError)(
                f"encode_text takes a text or a list of texts, not {f'a {wrong[0]}' if wrong else 'an empty list'}."
            )
        COUNT.read(batch_size, "batch_size")
        tokenizer, _ = self._processing(processor)
        batches = tokenized(self.clip, tokenizer, given, batch_size, {})
        shown, found = len(batches) > 1 if show_progress_bar is None else show_progress_bar, []
        names = iter(given)
        with torch.no_grad():
            for _, ids, mask in progress_bar(batches, shown=shown, desc="Texts", unit=" batches"):
                features = text_features(self.clip, ids, mask)
                named = [f"the text {text!r}" for text in islice(names, len(ids))]
                found.append(_checked(features, normalize_embeddings, named.__getitem__))
        return _converted(torch.cat(found), is_one, convert_to_numpy, convert_to_tensor)

    def _processing(self, processor: Any) -> tuple[Any, Any]:
        """Tokenizer and image processor; the model's own are loaded once."""
        if processor is not None:
            return processing_of(self, processor)
        if getattr(self, "_own_processing", None) is None:
            self._own_processing = processing_of(self, None)
        return self._own_processing

    def _steerer_for(self, steered: bool | None, settings: dict[str, Any]) -> Steerer:
        refuse_settings_of_plain("steered", steered, settings)
        steerer = self.steerer.with_(**settings | ({} if steered is None else {"enabled": steered}))
        rule = steerer.settings.rule
        if steered and rule.step is None and steerer.settings.edits is None:
            raise ValueError(
                f"method={rule.name!r} moves no image: it changes scores of labels, and embeddings stay plain CLIP's. "
                "Give a method that moves images, such as method='vs2', or steered=False."
            )
        return steerer


def _is_folder(images: Any) -> bool:
    return isinstance(images, (str, os.PathLike)) and os.path.isdir(images)


def _as_inputs(images: Any, column: str) -> tuple[Iterable[NamedImage], int | None]:
    """Named images, and how many there are where that is known."""
    datasets = sys.modules.get("datasets")  # imported by whoever has a data set
    if _is_folder(images):
        listing = list_images(images)
        listing.say_left_out()
        images = list(map(listing.path, listing.files))
    elif datasets is not None and isinstance(images, datasets.Dataset):
        undecoded(images, column)  # which names the columns that there are
        images = KeyDataset(images, column)
    elif datasets is not None and isinstance(images, datasets.IterableDataset):
        images = (row[column] for row in undecoded(images, column))
    named = named_images(images)
    if isinstance(named, NamedImages):
        return (named[place] for place in range(len(named))), len(named)
    return named, None


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    upcoming = iter(items)
    while group := list(islice(upcoming, size)):
        yield group


def _checked(features: Any, normalize: bool, name: Callable[[int], str]) -> torch.Tensor:
    """float32, of unit length if asked; both refuse NaN by the name of its image or text."""
    unit = unit_embeds(features, name)
    return unit if normalize else features.float()


def _converted(
    embeddings: torch.Tensor, is_one: bool, to_numpy: bool, to_tensor: bool
) -> np.ndarray | torch.Tensor | list[torch.Tensor]:
    rows = embeddings[0] if is_one else embeddings
    if to_tensor:
        return rows
    if to_numpy:
        return rows.cpu().numpy()
    return rows if is_one else list(rows)
