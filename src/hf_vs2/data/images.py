"""One image, however people have it, to 8-bit RGB."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from transformers.utils import logging


logger = logging.get_logger(__name__)

# EXIF orientation to what makes the image upright.
ROTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImageError(ValueError):
    """An image that cannot be read; the message names it and says why."""


def open_image(value: Any, name: str = "the image") -> Image.Image:
    """
    Reads one image, whatever it is stored as, into 8-bit RGB.

    The EXIF rotation is applied, animations give their first frame, transparency (RGBA, LA, palettes) is composited
    on white as transformers 5 does, 16-bit greyscale is scaled to 8 bits (Pillow itself would clip it to white), and
    everything else is converted by Pillow.

    Args:
        value: a path or URL, encoded bytes, `{"bytes": ..., "path": ...}` as `datasets` gives with `decode=False`,
            a PIL image, or an array / tensor of shape (height, width), (height, width, 1|3|4) or
            (1|3|4, height, width): uint8, uint16, bool, or wider types with values up to 1 (fractions), 255 or 65535.
        name (`str`): how an error message names the image.

    Returns:
        `PIL.Image.Image` of mode RGB.

    Raises:
        UnreadableImageError: (a `ValueError`) for a missing, truncated, unknown or unsafe image.
    """
    try:
        return _to_rgb(_upright(_decode(value), name))
    except Image.DecompressionBombError as error:
        # Pillow's sentence, without its full stop: what may be done instead follows.
        raise UnreadableImageError(
            f"{name} is too large to be opened safely: {str(error).rstrip('.')} (if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS)"
        ) from error
    except UnidentifiedImageError as error:  # whose own words are the address of a buffer, another one in every run
        raise UnreadableImageError(f"{name} cannot be read (no image format that Pillow can identify)") from error
    # Pillow's decoders raise nearly every exception type on damaged files (OSError, SyntaxError, struct.error, ...).
    except Exception as error:
        raise UnreadableImageError(f"{name} cannot be read ({type(error).__name__}: {error})") from error


def _decode(value: Any) -> Image.Image:
    """Any stored form to a loaded PIL image in its own mode."""
    if isinstance(value, dict):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if value is None:
        raise ValueError("the row has neither bytes nor a path")
    if isinstance(value, (str, os.PathLike)):
        value = _read_file(os.fspath(value))
    if isinstance(value, (bytes, bytearray, memoryview)):
        if not len(value):
            raise ValueError("it is empty, 0 bytes")
        value = Image.open(io.BytesIO(value))
    if isinstance(value, Image.Image):
        value.load()
        return value
    return _from_array(np.asarray(value))


def _upright(image: Image.Image, name: str) -> Image.Image:
    # `ImageOps.exif_transpose` would also write the remaining EXIF data anew, which fails on some that can be read.
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception as error:  # as many types as for damaged pixels, which these are not
        logger.warning(f"{name} has damaged EXIF data ({error}): it is read without rotation")
        return image
    return image.transpose(ROTATIONS[orientation]) if orientation in ROTATIONS else image


def _read_file(path: str) -> bytes:
    if "://" not in path:
        return Path(path).read_bytes()
    # Streaming data sets have remote paths; `datasets` knows their file systems and chained archives.
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as file:
        return file.read()


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or array.size == 0 or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise ValueError(f"an array of shape {array.shape} is not an image")
    return Image.fromarray(_to_uint8(array))


def _to_uint8(array: np.ndarray) -> np.ndarray:
    """uint16 by its full range; wider types hold 8 bits, 16 bits or fractions, told apart by the largest value."""
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    low, high = float(array.min()), float(array.max())
    if array.dtype == np.bool_ or (array.dtype.kind == "f" and low >= 0 and high <= 1):
        return np.rint(array.astype(np.float64) * 255).astype(np.uint8)
    if array.dtype.kind in "iuf" and array.dtype != np.uint16 and low >= 0 and high <= 255:
        return np.rint(array).astype(np.uint8)
    if array.dtype.kind in "iu" and low >= 0 and high <= 65535:
        return ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    raise ValueError(f"its values ({array.dtype}) lie in [{low:g}, {high:g}], expected 8 or 16 bits or fractions of 1")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_uint8(np.asarray(image)))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")
