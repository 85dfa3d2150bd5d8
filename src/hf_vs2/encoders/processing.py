"""Tokenizer and image processor of a CLIP: loaded by name, and put beside a checkpoint so that one id is enough."""

import os
from pathlib import Path
from typing import Any

from transformers import CLIPImageProcessorPil, CLIPTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging


logger = logging.get_logger(__name__)


def load_processing(
    name_or_path: str | os.PathLike, revision: str | None = None, **kwargs: Any
) -> tuple[PreTrainedTokenizerBase, CLIPImageProcessorPil]:
    """Tokenizer and image processor of a CLIP, or of a checkpoint that holds their files.

    The concrete classes, because `AutoImageProcessor` asks for torchvision in some transformers versions and PIL does the same
    work without it. `kwargs` are those of any `from_pretrained` (`token`, `local_files_only`, ...).

    Raises:
        `OSError`: if the files are not there.
    """
    place = {"revision": revision or "main", **kwargs}
    tokenizer = CLIPTokenizer.from_pretrained(name_or_path, **place)
    if not knows_words(tokenizer):
        raise OSError(f"{name_or_path} holds no tokenizer files (tokenizer.json): expected those of its CLIP.")
    return tokenizer, CLIPImageProcessorPil.from_pretrained(name_or_path, **place)


def knows_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether there is more in it than special tokens. Where the files are missing, transformers makes one without words."""
    return len(tokenizer) > len(tokenizer.all_special_tokens)


def save_processing(
    name_or_path: str | os.PathLike, revision: str | None, folder: str | os.PathLike, **kwargs: Any
) -> None:
    """Put a CLIP's tokenizer and image processor files into `folder`. Where they can't be read, those that the folder holds
    stay; without any, a warning says what is missing. `kwargs` as in [`load_processing`]."""
    try:
        parts = load_processing(name_or_path, revision, **kwargs)
    except (OSError, ValueError) as error:
        if (Path(folder) / "preprocessor_config.json").exists() and (Path(folder) / "tokenizer_config.json").exists():
            return
        logger.warning(
            f"No tokenizer and image processor were saved in {folder}: those of {name_or_path} could not be read ({error}). "
            "Save them there yourself (tokenizer.save_pretrained, image_processor.save_pretrained) for pipeline() to find them."
        )
        return
    for part in parts:
        part.save_pretrained(folder)


__all__ = ["knows_words", "load_processing", "save_processing"]
