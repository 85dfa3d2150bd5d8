"""The one list of a folder's files that every door reads."""

from __future__ import annotations

import importlib.util
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from transformers.utils import logging


logger = logging.get_logger(__name__)

IMAGE_EXTENSIONS = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".webp", ".bmp", ".dib"),
        *(".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
    )
)
HEIF_EXTENSIONS = frozenset({".heic", ".heif", ".hif"})
# Formats that a file without suffix may have. TGA and DIB have no mark of their own: much would pass for them.
_MARKED_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
# What systems and programs leave in folders, beside all names that begin with a dot.
_SYSTEM_NAMES = frozenset(
    (
        *("__macosx", "@eadir", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "$recycle.bin", "#recycle"),
        *("system volume information", "lost+found", "__pycache__"),
    )
)
# What lies beside images as a rule: left out without a warning.
_QUIET = frozenset(
    (
        *(
            "hidden file",
            "file without suffix",
            ".txt",
            ".md",
            ".rst",
            ".pdf",
            ".html",
            ".json",
            ".jsonl",
            ".csv",
            ".tsv",
        ),
        *(".xml", ".yaml", ".yml", ".toml", ".log", ".py", ".ipynb", ".mat", ".npy", ".npz", ".db", ".xmp", ".aae"),
    )
)
_HINTS = {
    **dict.fromkeys(HEIF_EXTENSIONS, "pip install pillow-heif"),
    **dict.fromkeys((".zip", ".rar", ".7z"), "unpack them"),
    **dict.fromkeys((".csv", ".tsv", ".jsonl"), "a list of images is opened by its own path"),
}
# The brands of HEIC files, as phones write them.
HEIF_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"))


def heif_is_readable() -> bool:
    """Whether HEIC files (.heic, .heif) can be read here."""
    return importlib.util.find_spec("pillow_heif") is not None


@dataclass
class Listing:
    """The files below a folder, in an order that is the same on every system, and what was left out."""

    root: str
    files: list[str] = field(default_factory=list)
    """Below `root`, parts joined by `/`."""
    left_out: Counter[str] = field(default_factory=Counter)
    """How many of each kind."""

    def path(self, file: str) -> str:
        return os.path.join(self.root, file)

    def pick(self, suffixes: Collection[str], sniff: bool = False) -> list[str]:
        """The files with one of these suffixes, and with `sniff` those without suffix that hold an image."""
        return [
            file
            for file in self.files
            if (suffix := suffix_of(file)) in suffixes or (not suffix and sniff and _holds_image(self.path(file)))
        ]

    def keep(self, files: Collection[str]) -> None:
        """Counts all other files as left out."""
        kept = set(files)
        self.left_out.update(suffix_of(file) or "file without suffix" for file in self.files if file not in kept)
        self.files = [file for file in self.files if file in kept]

    def describe_left_out(self) -> str:
        """`2 .heic files (pip install pillow-heif), 1 hidden file`; empty where nothing was."""
        said = []
        for kind, count in sorted(self.left_out.items(), key=lambda item: (item[0] in _QUIET, item[0])):
            name = f"{kind} file" if kind.startswith(".") else kind
            name = name if count == 1 else re.sub(r"(file|folder|link|image)", r"\1s", name, count=1)
            said.append(f"{count} {name}" + (f" ({_HINTS[kind]})" if kind in _HINTS else ""))
        return ", ".join(said)

    def say_left_out(self) -> None:
        """One line: a warning if there may be images among what was left out."""
        if self.left_out:
            level = logging.INFO if self.left_out.keys() <= _QUIET else logging.WARNING
            logger.log(level, f"{self.root}: not read are {self.describe_left_out()}.")


def list_folder(root: str | os.PathLike, on_error: str = "raise") -> Listing:
    """
    Every file below a folder that is no leftover of a system.

    Linked folders are read for each path to them, but for links to a folder that they lie in. Hidden names, what
    systems leave (`__MACOSX`, `Thumbs.db`, ...), pipes, devices and sockets are left out. A link to a file that is not
    there is listed, so that its reader names it.

    Args:
        root: the folder; its own name may be a hidden one.
        on_error (`str`): "skip" leaves out folders that may not be listed.

    Raises:
        PermissionError: a folder may not be listed, with `on_error="raise"`.
    """
    listing = Listing(os.fspath(root))
    _walk(listing, "", [os.path.realpath(root)], on_error)
    listing.files.sort(key=composed)
    return listing


def list_images(root: str | os.PathLike, on_error: str = "raise") -> Listing:
    """The same of image files only. A file without suffix is one if Pillow identifies it."""
    listing = list_folder(root, on_error)
    listing.keep(listing.pick(image_suffixes(), sniff=True))
    return listing


def image_suffixes() -> frozenset[str]:
    """Suffixes of the image files that can be read here."""
    return IMAGE_EXTENSIONS | HEIF_EXTENSIONS if heif_is_readable() else IMAGE_EXTENSIONS


def suffix_of(file: str) -> str:
    name = file.rpartition("/")[2].lower()
    return ".tar.gz" if name.endswith(".tar.gz") else os.path.splitext(name)[1]


def _walk(listing: Listing, inside: str, around: list[str], on_error: str) -> None:
    """Lists the folder `inside` of the root; `around`: the real paths of it and of those on the way to it."""
    folder = listing.path(inside)
    try:
        entries = list(os.scandir(folder))
    except PermissionError as error:
        if on_error != "skip":
            raise PermissionError(
                f"the folder {folder} may not be listed: get the permission, or leave it out with on_error='skip'"
            ) from error
        listing.left_out["folder without permission"] += 1
        return
    for entry in entries:
        linked, name = entry.is_symlink(), inside + entry.name
        if entry.name.startswith(".") or entry.name.lower() in _SYSTEM_NAMES:
            listing.left_out["hidden file"] += 1
        elif os.path.isdir(entry.path) if linked else entry.is_dir():
            real = os.path.realpath(entry.path)
            if any(Path(other).is_relative_to(real) for other in around):
                listing.left_out["link to a folder around it"] += 1
            else:
                _walk(listing, f"{name}/", [*around, real], on_error)
        elif (os.path.isfile(entry.path) or not os.path.exists(entry.path)) if linked else entry.is_file():
            listing.files.append(name)
        else:
            listing.left_out["special file"] += 1


def composed(name: str) -> str:
    """macOS stores accents decomposed; composed names sort and compare equal everywhere."""
    return unicodedata.normalize("NFC", name)


def _holds_image(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            head = file.read(12)
        if head[4:8] == b"ftyp" and head[8:] in HEIF_BRANDS:
            return heif_is_readable()
        Image.init()
        with Image.open(path, formats=[name for name in _MARKED_FORMATS if name in Image.OPEN]):
            return True
    except Image.DecompressionBombError:
        return True  # it will be named when it is read
    except Exception:  # of as many types as there are decoders
        return False
