"""Tokenizer and image processor of a CLIP: loaded by name, checked, and put beside a checkpoint so that one id is
enough."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPTokenizer, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, logging

from ..files.checkpoint_folder import PROCESSOR_FILES, TOKENIZER_FILES
from ..files.json_files import read_object
from ..files.place import check_token, look_for
from .families import FAMILIES, Family


logger = logging.get_logger(__name__)

_LARGEST_IMAGE = 4096
"""Pixels of a side to which images may be resized; the largest CLIPs take 448."""
_LARGEST_PIXEL = 1e4


def load_processing(
    name_or_path: str | os.PathLike, revision: str | None = None, **kwargs: Any
) -> tuple[Any, CLIPImageProcessorPil]:
    """Tokenizer (`None` of a model without texts) and image processor of a CLIP, or of a checkpoint that holds their
    files.

    The concrete classes, because `AutoImageProcessor` asks for torchvision in some transformers versions and PIL does
    the same work without it. `kwargs` are those of any `from_pretrained` (`token`, `local_files_only`, ...).

    Raises:
        `OSError`: if the files are not there. `ValueError`: if one is damaged, or no image could be prepared by it;
            the message names it.
    """
    check_token(kwargs.get("token"))
    place = {"revision": revision or "main", **kwargs}
    family = _family_beside(name_or_path, place)
    has_texts = family is None or family.has_texts
    return load_tokenizer(name_or_path, place) if has_texts else None, load_image_processor(name_or_path, place)


def load_tokenizer(name_or_path: str | os.PathLike, place: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """One part of [`load_processing`]."""
    files = _files(name_or_path, TOKENIZER_FILES, place)
    if not any(name.startswith(("tokenizer.", "vocab.", "spiece.", "sentencepiece.")) for name in files):
        raise FileNotFoundError(_missing(name_or_path, "tokenizer", TOKENIZER_FILES[0]))

    def load() -> PreTrainedTokenizerBase:
        kind = read_object(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
        of_another = _is_of_another(kind.get("tokenizer_class"), name_or_path, place)
        auto: Any = AutoTokenizer if of_another else CLIPTokenizer
        tokenizer = auto.from_pretrained(name_or_path, **{"trust_remote_code": False} if of_another else {}, **place)
        if not knows_words(tokenizer) or not all(
            isinstance(token, int) for token in tokenizer("a photo.")["input_ids"]
        ):
            raise ValueError("it makes no tokens of text")
        return tokenizer

    return _usable(load, files)


def _is_of_another(name: Any, name_or_path: str | os.PathLike, place: Mapping[str, Any]) -> bool:
    """Whether a tokenizer is not a CLIP's: by the class that its file names, else by the model beside it."""
    name = str(name or "").removesuffix("Fast")
    if name.endswith("Tokenizer") and name != "PreTrainedTokenizer":
        return name != "CLIPTokenizer" and hasattr(transformers, name)
    family = _family_beside(name_or_path, place)
    return family is not None and family.has_texts and not family.reads_to_end


def _family_beside(name_or_path: str | os.PathLike, place: Mapping[str, Any]) -> Family | None:
    """The family of the model in the same folder; `None` where that is none of a family, such as a VS2 checkpoint."""
    path = look_for(name_or_path, CONFIG_NAME, place)
    return None if path is None else FAMILIES.get(str(read_object(path).get("model_type")))


def load_image_processor(
    name_or_path: str | os.PathLike, place: Mapping[str, Any], of_clip: bool = True
) -> CLIPImageProcessorPil:
    """The other part of [`load_processing`]; not `of_clip`: of any model, in its PIL form where there is one."""
    files = _files(name_or_path, PROCESSOR_FILES, place)
    if not files:
        raise FileNotFoundError(_missing(name_or_path, "image processor", PROCESSOR_FILES[0]))

    def load() -> CLIPImageProcessorPil:
        kind = _kind(name_or_path, place, of_clip)
        # `trust_remote_code` would become a setting of a class that is no Auto class.
        refused = {"trust_remote_code": False} if kind is transformers.AutoImageProcessor else {}
        processor = kind.from_pretrained(name_or_path, **refused, **place)
        _check(processor)
        return processor

    return _usable(load, files)


def _kind(name_or_path: str | os.PathLike, place: Mapping[str, Any], of_clip: bool) -> Any:
    """The class of an image processor that reads images without torchvision."""
    settings, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name_or_path, **place)
    kind = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")
    kind = kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Pil").removesuffix("Fast")
    if hasattr(transformers, f"{kind}Pil"):
        return getattr(transformers, f"{kind}Pil")
    return CLIPImageProcessorPil if of_clip and not hasattr(transformers, kind) else transformers.AutoImageProcessor


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
            "and rescale_factor"
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
        if part is not None:
            part.save_pretrained(folder)
