"""What people give to be explained: images and labels, and names for latents."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.batches import read_pixels
from ..data.inputs import DEFAULT_TEMPLATES, NamedImages, named_images
from ..data.labels.lists import names_in
from ..data.labels.names import clean_class_names
from ..data.labels.prompts import class_embeddings
from ..data.pixels import Normalizer
from ..encoders.families import family_of, tower_of
from ..files.json_files import read_json
from .explanation import VS2Explanation, explain_rows
from .latent_names import LatentNames, name_latents


if TYPE_CHECKING:
    from ..steering.corpus_search import RetrievalInputs
    from ..steering.steerer import Steerer


@torch.no_grad()
def explain_images(
    steerer: Steerer,
    images: Any,
    labels: Sequence[str] | torch.Tensor,
    processing: Callable[[], tuple[Any, Any]],
    templates: str | Path | Sequence[str] | None,
    names: Any,
    vocabulary: Sequence[str] | None,
    clean: bool,
    retrieval: RetrievalInputs,
) -> VS2Explanation:
    """See [`VS2CLIPForZeroShot.explain`]; `processing` gives tokenizer and image processor, when they are needed."""
    if names is not None and vocabulary is not None:
        raise ValueError("names= and vocabulary= exclude each other: give one of them.")
    clip = steerer.clip
    given = isinstance(labels, torch.Tensor) and _is_batch(images) and vocabulary is None
    tokenizer, image_processor = (None, None) if given else processing()
    templates = DEFAULT_TEMPLATES if templates is None else templates
    if isinstance(labels, torch.Tensor):
        embeds, words = labels, None
    else:
        labels = names_in(labels, "labels")
        clean_class_names(labels, clean, "labels")
        embeds, words = class_embeddings(clip, tokenizer, labels, templates, clean=clean), labels
    if vocabulary is not None:
        names = name_latents(steerer, tokenizer, vocabulary, top=1)
    pixels = images if _is_batch(images) else _pixels(images, image_processor, clip.device)
    rows = family_of(clip).row(tower_of(clip)(pixel_values=pixels.to(clip.device, clip.dtype)))
    name = (lambda row: "the image") if len(rows) == 1 else "image {}".format
    return explain_rows(steerer, rows, embeds, words, resolve_names(names), retrieval, name)


def resolve_names(names: Any) -> dict[int, str]:
    """
    Names of latents by number, of those that have one.

    Args:
        names: a mapping `latent -> name`, a sequence with one name (or `None`) a latent, [`LatentNames`], the path of
            a JSON file of the first two, or of the `latents.json` of an atlas, of which each latent's first name is
            taken where the atlas takes it for a name; `None` for no names.

    Raises:
        `ValueError`, `TypeError`: on anything else. `OSError`: if the file can't be read.
    """
    source = "names"
    if isinstance(names, (str, os.PathLike)):
        source = os.fspath(names)
        names = _read_json(source)
    if names is None:
        return {}
    if isinstance(names, LatentNames):
        named = enumerate(map(names.name, range(len(names.indices))))
        return {latent: name for latent, name in named if name is not None}
    if isinstance(names, Mapping) and isinstance(names.get("latents"), Sequence):
        return _atlas_names(names["latents"], source)
    if isinstance(names, Sequence):
        names = dict(enumerate(names))
    if not isinstance(names, Mapping):
        raise TypeError(f"{source} must map latents to their names, not be a {type(names).__name__}.")
    found = {}
    for latent, name in names.items():
        if name is None:
            continue
        if not isinstance(name, str) or not str(latent).isdigit():
            raise ValueError(f"{source} has {latent!r}: {name!r}; expected the number of a latent and its name.")
        found[int(latent)] = name
    return found


def _read_json(path: str) -> Any:
    try:
        found = read_json(Path(path))
    except ValueError as error:
        raise ValueError(
            f"{path} is not a JSON file ({error}); expected the latents.json of an atlas, or names by latent."
        ) from error
    if not isinstance(found, (dict, list)):
        raise ValueError(f"{path} holds neither a JSON object nor a list: expected names by latent.")
    return found


def _atlas_names(latents: Sequence[Any], source: str) -> dict[int, str]:
    found = {}
    for number, latent in enumerate(latents):
        try:
            if latent.get("names") and latent.get("named", True):
                found[int(latent["index"])] = str(latent["names"][0]["name"])
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{source}: latents[{number}] is not as an atlas writes it: {latent!r}.") from error
    return found


def _is_batch(images: Any) -> bool:
    """Whether these are pixel values already."""
    return isinstance(images, torch.Tensor) and images.ndim == 4 and images.is_floating_point()


def _pixels(images: Any, image_processor: Any, device: torch.device) -> torch.Tensor:
    """Pixel values `(batch, channels, height, width)`, as the pipeline makes them."""
    images = named_images(images)
    named = [images[place] for place in range(len(images))] if isinstance(images, NamedImages) else list(images)
    if not named:
        raise ValueError("images is empty: give one image or several.")
    return Normalizer(image_processor, device)(read_pixels(named, image_processor))
