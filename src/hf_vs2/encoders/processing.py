"""Tokenizer and image processor of a CLIP: loaded by name, checked, and put beside a checkpoint so that one id is
enough."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from ..files.json_files import read_object
from ..files.place import check_token, look_for


logger = logging.get_logger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
)
_OF_FAMILIES = ("SiglipTokenizer", "GemmaTokenizer", "XLMRobertaTokenizer")
"""Tokenizers of SigLIP, SigLIP 2 and MetaCLIP 2; all else is read as a CLIP's."""
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_LARGEST_IMAGE = 4096
"""Pixels of a side to which images may be resized; the largest CLIPs take 448."""
_LARGEST_PIXEL = 1e4


def load_processing(
    name_or_path: str | os.PathLike, revision: str | None = None, **kwargs: Any
) -> tuple[PreTrainedTokenizerBase, CLIPImageProcessorPil]:
    """Tokenizer and image processor of a CLIP, or of a checkpoint that holds their files.

    The concrete classes, because `AutoImageProcessor` asks for torchvision in some transformers versions and PIL does
    the same work without it. `kwargs` are those of any `from_pretrained` (`token`, `local_files_only`, ...).

    Raises:
        `OSError`: if the files are not there. `ValueError`: if one is damaged, or no image could be prepared by it;
            the message names it.
    """
    check_token(kwargs.get("token"))
    place = {"revision": revision or "main", **kwargs}
    return load_tokenizer(name_or_path, place), load_image_processor(name_or_path, place)


def load_tokenizer(name_or_path: str | os.PathLike, place: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """
    Raises:
        As [`load_processing`].
    """
    files = _files(name_or_path, TOKENIZER_FILES, place)
    if not {"tokenizer.json", "vocab.json", "spiece.model"} & set(files):
        raise FileNotFoundError(
            f"{name_or_path} holds no tokenizer files (tokenizer.json): expected those of its CLIP."
        )

    def load() -> PreTrainedTokenizerBase:
        kind = read_object(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
        of_another = str(kind.get("tokenizer_class") or "").removesuffix("Fast") in _OF_FAMILIES
        auto: Any = AutoTokenizer if of_another else CLIPTokenizer
        tokenizer = auto.from_pretrained(name_or_path, **{"trust_remote_code": False} if of_another else {}, **place)
        if not knows_words(tokenizer) or not all(isinstance(one, int) for one in tokenizer("a photo.")["input_ids"]):
            raise ValueError("it makes no tokens of text")
        return tokenizer

    return _usable(load, files)


def load_image_processor(
    name_or_path: str | os.PathLike, place: Mapping[str, Any], of_clip: bool = True
) -> CLIPImageProcessorPil:
    """
    Args:
        of_clip: whether it is a CLIP's; else any, in its PIL form where there is one.

    Raises:
        As [`load_processing`].
    """
    files = _files(name_or_path, PROCESSOR_FILES, place)
    if not files:
        raise FileNotFoundError(_missing(name_or_path, "image processor", PROCESSOR_FILES[0]))

    def load() -> CLIPImageProcessorPil:
        if of_clip and "Siglip" not in _kind(name_or_path, place).__name__:
            processor = CLIPImageProcessorPil.from_pretrained(name_or_path, **place)
        else:
            processor = _kind(name_or_path, place).from_pretrained(name_or_path, trust_remote_code=False, **place)
        _check(processor)
        return processor

    return _usable(load, files)


def _kind(name_or_path: str | os.PathLike, place: Mapping[str, Any]) -> Any:
    """The class of an image processor that reads images without torchvision."""
    import transformers

    settings, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name_or_path, **place)
    kind = settings.get("image_processor_type", "").removesuffix("Pil").removesuffix("Fast")
    return getattr(transformers, f"{kind}Pil", transformers.AutoImageProcessor)


def _check(processor: Any) -> None:
    """Refuse an image processor that asks for huge images, or makes no numbers of an image that an encoder could
    read."""
    for name in ("size", "crop_size"):
        sides = getattr(processor, name, None) or {}
        for side, pixels in dict(sides).items():
            if pixels is not None and not 0 < pixels <= _LARGEST_IMAGE:
                raise ValueError(f"{name}[{side!r}] is {pixels} pixels; expected 1 to {_LARGEST_IMAGE}")
    values = np.asarray(
        processor(Image.new("RGB", (8, 8), (64, 128, 192)), return_tensors="np")["pixel_values"], float
    )
    if not np.abs(values).max(initial=0) <= _LARGEST_PIXEL:  # not with NaN either
        raise ValueError(
            f"of an image it makes numbers from {values.min():g} to {values.max():g}: look at image_mean, image_std "
            f"and rescale_factor"
        )


def holds(name_or_path: str | os.PathLike, names: tuple[str, ...], place: Mapping[str, Any]) -> bool:
    """Whether any of these files is there."""
    try:
        return bool(_files(name_or_path, names, place))
    except OSError:  # the folder has been moved since a model was loaded from it
        return False


def _files(name_or_path: str | os.PathLike, names: tuple[str, ...], place: Mapping[str, Any]) -> dict[str, str]:
    found = {name: look_for(name_or_path, name, place) for name in names}
    return {name: path for name, path in found.items() if path is not None}


def _missing(name_or_path: str | os.PathLike, what: str, file: str) -> str:
    reach = "" if os.path.isdir(name_or_path) else ", or it could not be reached and is not in the cache"
    return f"{name_or_path} holds no {what} files ({file}){reach}: expected those of its CLIP."


def _usable(load: Callable[[], Any], files: Mapping[str, str]) -> Any:
    """`load()`, which reads these files; what goes wrong becomes a `ValueError` that names the damaged one of them."""
    try:
        return load()
    # The tokenizers library raises bare `Exception`s, and values of the wrong kind fail wherever they are first used.
    except Exception as error:
        for path in files.values():
            if path.endswith(".json"):
                read_object(path)
        if isinstance(error, OSError):
            raise
        first, *others = files.values()
        beside = f" (or {', '.join(map(os.path.basename, others))} beside it)" if others else ""
        text = " ".join(str(error).split())[:300]
        raise ValueError(f"{first}{beside} can't be used: {text}. Save or download it again.") from error


def knows_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether there is more in it than special tokens. Where the files are missing, transformers makes one without
    words."""
    return len(tokenizer) > len(tokenizer.all_special_tokens)


def save_processing(
    name_or_path: str | os.PathLike, revision: str | None, folder: Path, earlier: Path, **kwargs: Any
) -> None:
    """Put a CLIP's tokenizer and image processor files into `folder`. Where they can't be read, and there are none in
    `earlier`, a warning says what is missing. `kwargs` as in [`load_processing`]."""
    try:
        parts = load_processing(name_or_path, revision, **kwargs)
    except (OSError, ValueError) as error:
        if (earlier / "preprocessor_config.json").exists() and (earlier / "tokenizer_config.json").exists():
            return
        logger.warning(
            f"No tokenizer and image processor were saved in {earlier}: those of {name_or_path} could not be read "
            f"({error}). Save them there yourself (tokenizer.save_pretrained, image_processor.save_pretrained) for "
            "pipeline() to find them."
        )
        return
    for part in parts:
        part.save_pretrained(folder)
