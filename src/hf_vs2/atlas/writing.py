"""The folder: thumbnails, data as scripts, the page itself. It is made beside its place and moved there whole.

Browsers let a page that was opened from disk load no JSON, but they do run scripts. So each piece of data is a script
that hands itself to `atlas.register(name, data)`, and the page adds one when it needs it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.images import image_name, open_image
from ..data.load import image_mode, undecoded
from ..files.atomic import failing_as, new_folder
from ..files.json_files import read_json, to_json
from ..files.progress import progress_bar
from ..version import __version__
from .pages import thumbnail_path


FORMAT = "hf_vs2.atlas"
FORMAT_VERSION = 1
MANIFEST = "latents.json"
_NAMES = {MANIFEST, "index.html", "assets", "data", "thumbs"}
THUMBNAIL_SIZE = 112
"""Longest side in pixels; smaller images stay as they are."""
JPEG_QUALITY = 84


def check_output(folder: Path) -> None:
    """Refuse to replace a folder that holds anything but an earlier atlas.

    Raises:
        OSError: it does, or is a file.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OSError(f"{folder} is a file: an atlas is a folder. Give another --output.")
    names = {path.name for path in folder.iterdir()} - {".DS_Store", "Thumbs.db", "desktop.ini"}  # of systems
    if not names:
        return
    try:
        others = names - _NAMES if read_json(folder / MANIFEST)["format"] == FORMAT else names
    except (OSError, ValueError, KeyError, TypeError):
        others = names
    if others:
        raise OSError(
            f"{folder} holds files that are no atlas ({min(others)}), and an atlas replaces the whole folder: move "
            "them, or give --output a new or empty one."
        )


@contextmanager
def atlas_folder(folder: Path) -> Iterator[Path]:
    """[`new_folder`], unless `folder` holds anything but an earlier atlas."""
    check_output(folder)
    with failing_as(folder), new_folder(folder) as temporary:
        yield temporary


def write_assets(folder: Path) -> None:
    """The page, its style and its scripts."""
    source = files(__package__) / "assets"
    (folder / "assets").mkdir()
    for asset in source.iterdir():
        target = folder / asset.name if asset.name == "index.html" else folder / "assets" / asset.name
        target.write_bytes(asset.read_bytes())


def write_data(folder: Path, name: str, data: Any) -> None:
    """`data/<name>.js`, which registers `data` under `name`."""
    text = to_json(data, separators=(",", ":"), ensure_ascii=True)
    # Pure ASCII without "<": nothing that ends a script or opens a tag, whatever a class is called.
    text = text.replace("<", "\\u003c").replace(">", "\\u003e")
    path = folder / "data" / f"{name}.js"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"atlas.register({to_json(name)}, {text});\n", encoding="ascii", newline="")


def write_manifest(folder: Path, facts: dict[str, Any], latents: list[dict[str, Any]]) -> None:
    """`latents.json`, for other programs."""
    head = {"format": FORMAT, "format_version": FORMAT_VERSION, "hf_vs2_version": __version__, **facts}
    # One latent a line: it can be read, searched and compared with line tools.
    lines = ",\n".join(to_json(latent) for latent in latents)
    body = to_json(head, indent=1)
    text = body.removesuffix("\n}") + f',\n "latents": [\n{lines}\n]\n}}\n'
    (folder / MANIFEST).write_text(text, encoding="utf-8", newline="")


def write_thumbnails(folder: Path, dataset: Any, image_column: str, wanted: Sequence[int], progress: bool) -> None:
    """The [`thumbnails`] as files."""
    made = thumbnails(dataset, image_column, wanted)
    for index, jpeg in progress_bar(made, shown=progress, total=len(wanted), desc="Thumbnails", unit=" images"):
        path = folder / thumbnail_path(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg)


def thumbnails(dataset: Any, image_column: str, wanted: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """A small JPEG of each wanted row of the data set, ascending, each decoded once.

    Raises:
        UnreadableImageError: an image can't be read; the message names it.
    """
    mode = image_mode(dataset, image_column)
    for index, value in _values(dataset, image_column, wanted):
        yield index, thumbnail(open_image(value, image_name(f"image {index} of the data set", value), mode=mode))


def thumbnail(image: Image.Image) -> bytes:
    """An RGB image as a JPEG of at most [`THUMBNAIL_SIZE`] pixels a side, without any metadata."""
    image = image.copy()
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return buffer.getvalue()


def _values(dataset: Any, column: str, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """The undecoded images of the wanted rows; a stream is read up to the last of them."""
    import datasets

    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom":  # `with_transform`
        for index in wanted:
            yield index, dataset[index][column]
        return
    if isinstance(dataset, datasets.Dataset):
        only = undecoded(dataset, column).select_columns([column]).with_format(None)
        for index in wanted:
            yield index, only[index][column]
        return
    left = set(wanted)
    for index, row in enumerate(undecoded(dataset, column)):
        if index in left:
            left.remove(index)
            yield index, row[column]
        if not left:
            return
    raise ValueError(f"The stream of images ended before image {min(left)}: it is not the one the activations are of.")
