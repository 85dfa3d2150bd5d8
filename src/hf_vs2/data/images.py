"""One image, however people have it, to 8-bit RGB."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import stat
import threading
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from urllib.request import url2pathname

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from transformers.utils import logging

from .folders.listing import HEIF_BRANDS, heif_is_readable
from .web import read_url


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
# Pillow reads pixels and EXIF of an opened file when they are first asked for, which two threads must not do at once:
# an object's lock is found by its address.
_LOCKS = [threading.Lock() for _ in range(251)]
LONGEST_NAME = 500  # letters of a path, an address or base64 in a message


class UnreadableImageError(ValueError):
    """An image that cannot be read; the message names it and says why."""


def open_image(
    value: Any,
    name: str | None = None,
    *,
    mode: str | None = None,
    timeout: float | None = None,
    at_least: int | None = None,
) -> Image.Image:
    """
    Reads one image, whatever it is stored as, into 8-bit RGB. Every command, pipeline and function reads images
    through it.

    The EXIF rotation is applied, animations give their first frame, transparency (RGBA, LA, palettes) is laid on
    white, 16-bit greyscale is scaled to 8 bits (Pillow itself would clip it to white), and everything else is
    converted by Pillow. What comes back holds pixels and nothing else, no EXIF and no XMP: reading it again changes
    nothing.

    Args:
        value: a path; a text that holds an http, https, file or `data:image/...;base64` address, or base64; encoded
            bytes; `{"bytes": ..., "path": ...}` as `datasets` gives with `decode=False`; a PIL image; or an array /
            tensor of shape (height, width), (height, width, 1|3|4) or (1|3|4, height, width): uint8, uint16, bool, or
            wider types with values up to 1 (fractions), 255 or 65535. HEIC files need the package pillow-heif.
        name (`str`, *optional*): how an error message names the image. Default: by its path or address, where it has
            one.
        mode (`str`, *optional*): `"L"`, `"1"` or `"P"`: what Pillow makes of the image in this mode, as RGB.
        timeout (`float`, *optional*): seconds for an image from the web, for everything together. Default: 60.
        at_least (`int`, *optional*): pixels that each side needs: a JPEG that has twice as many or more is decoded
            at a half, a quarter or an eighth of its size, where both sides divide by it: in less time and to slightly
            other pixels. Default: as it is.

    Returns:
        `PIL.Image.Image` of mode RGB, which belongs to the caller.

    Raises:
        UnreadableImageError: (a `ValueError`) for a missing, truncated, unknown or unsafe image.
    """
    name = image_name("the image", value) if name is None else name
    try:
        with _LOCKS[id(value) // 16 % len(_LOCKS)] if isinstance(value, Image.Image) else contextlib.nullcontext():
            image = _to_rgb(_upright(_decode(value, timeout, at_least), name))
        if mode is not None:
            image = image.convert(mode).convert("RGB")
        image.info = {}
        return image
    except Image.DecompressionBombError as error:
        # Pillow's sentence, without its full stop: what may be done instead follows.
        raise UnreadableImageError(
            f"{name} is too large to be opened safely: {str(error).rstrip('.')} (if you trust it, raise "
            "PIL.Image.MAX_IMAGE_PIXELS)"
        ) from error
    except UnidentifiedImageError as error:  # whose own words are the address of a buffer, another one in every run
        raise UnreadableImageError(f"{name} cannot be read (no image format that Pillow can identify)") from error
    # Pillow's decoders raise nearly every exception type on damaged files (OSError, SyntaxError, struct.error, ...),
    # and the web adds its own. The system's errors repeat the path, which is named already.
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        reason = one_line(getattr(error, "strerror", None) or error)
        raise UnreadableImageError(f"{name} cannot be read ({kind}{reason})") from error


def image_name(name: str, value: Any) -> str:
    """`name`, and the image's path or address where it has one: how messages name it."""
    path = image_path(value)
    return f"{name} ({one_line(path[:LONGEST_NAME])})" if path else name


def image_path(value: Any) -> str | None:
    """Where an image comes from, if it says so."""
    if isinstance(value, dict):
        return value.get("path")
    path = value if isinstance(value, (str, os.PathLike)) else getattr(value, "filename", None)
    return os.fsdecode(path) if path else None


def one_line(text: Any) -> str:
    """A person's words in a message or a table: on one line, and without letters that steer a terminal."""
    shown = str(text).encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda letter: repr(letter[0])[1:-1], shown)


def _decode(value: Any, timeout: float | None, at_least: int | None) -> Image.Image:
    """Any stored form to a loaded PIL image in its own mode."""
    is_ours = not isinstance(value, Image.Image)
    in_row = isinstance(value, dict)
    if in_row:
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if value is None:
        raise ValueError("the row has neither bytes nor a path")
    if isinstance(value, str):
        value = _from_text(value, in_row, timeout)
    elif isinstance(value, os.PathLike):
        value = _read_file(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = _from_bytes(value)
    if isinstance(value, Image.Image):
        if is_ours and at_least is not None:
            _decode_smaller(value, at_least)
        value.load()
        return value
    if hasattr(value, "detach"):  # a tensor, on whatever device; numpy has no bfloat16
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    return _from_array(np.asarray(value))


def _decode_smaller(image: Image.Image, at_least: int) -> None:
    """Has a JPEG decoded at the smallest part of its size that [`open_image`] allows. Other formats have no parts."""
    for part in (8, 4, 2):
        size = image.width // part, image.height // part
        # Where a side does not divide, the last pixel holds less of the image than others, and a crop would shift.
        if min(size) >= at_least and (part * size[0], part * size[1]) == image.size:
            image.draft(None, size)
            return


def _from_text(text: str, in_row: bool, timeout: float | None) -> bytes | Image.Image:
    """What stands at a path or address, or in base64."""
    scheme, _, rest = text.partition(":")
    scheme = scheme.lower()
    if scheme in ("http", "https") and rest.startswith("//"):
        return read_url(text, timeout)
    if scheme == "file" and rest.startswith("/"):
        return _read_file(local_path(text))
    if scheme == "data":
        return _from_base64(rest.partition(",")[2])
    if "://" in text and in_row:
        # Streaming data sets have remote paths; `datasets` knows their file systems and chained archives.
        from datasets.utils.file_utils import xopen

        with xopen(text, "rb") as file:
            return file.read()
    if "://" in text:
        raise ValueError(
            f"addresses that begin with {one_line(scheme)}: are not read: give a file, or an address with http:, "
            "https: or file:"
        )
    try:
        return _read_file(text)
    except OSError as missing:
        # Base64 without a word before it, which transformers' pipelines take too. A short path may look like it.
        try:
            return _from_bytes(_from_base64(text))
        except (ValueError, UnidentifiedImageError):
            raise missing from None


def local_path(text: str) -> str:
    """The path of a `file:` address on this computer; another text as it is."""
    scheme, _, rest = text.partition(":")
    if scheme.lower() != "file" or not rest.startswith("/"):
        return text
    host, path = rest[2:].partition("/")[::2] if rest.startswith("//") else ("", rest[1:])
    if host.lower() not in ("", "localhost"):
        raise ValueError(
            f"a file: address of another computer ({one_line(host)}); for this one it begins with file:///"
        )
    return url2pathname(f"/{path}") if os.name == "nt" else unquote(f"/{path}", errors="surrogateescape")


def _from_base64(text: str) -> bytes:
    return base64.b64decode("".join(text.split()), validate=True)


def _read_file(path: str | os.PathLike) -> bytes:
    kind = os.stat(path).st_mode
    if stat.S_ISDIR(kind):
        raise ValueError("it is a folder")
    if not stat.S_ISREG(kind):  # a pipe may never end, and reading one that nobody writes to never begins
        raise ValueError("it is a pipe or a device, not a file")
    return Path(path).read_bytes()


def _from_bytes(content: bytes | bytearray | memoryview) -> Image.Image:
    content = bytes(content)
    if not content:
        raise ValueError("it is empty, 0 bytes")
    try:
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        if content[4:8] != b"ftyp" or content[8:12] not in HEIF_BRANDS:
            raise
    if not heif_is_readable():
        raise ValueError("a HEIC image, which Pillow reads with pillow-heif alone: pip install pillow-heif")
    import pillow_heif

    pillow_heif.register_heif_opener()
    return Image.open(io.BytesIO(content))


def _upright(image: Image.Image, name: str) -> Image.Image:
    # `ImageOps.exif_transpose` would also write the remaining EXIF data anew, which fails on some that can be read.
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception as error:  # as many types as for damaged pixels, which these are not
        logger.warning(f"{name} has damaged EXIF data ({error}): it is read without rotation")
        return image
    return image.transpose(ROTATIONS[orientation]) if orientation in ROTATIONS else image


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
    """A new image of mode RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image)
        grey = _to_uint8(pixels)
        if "transparency" in image.info:  # of PNG files: this value is
            grey = np.where(pixels == image.info["transparency"], np.uint8(255), grey)
        image = Image.fromarray(grey)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")
