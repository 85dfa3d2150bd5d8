"""Data sets of images, and the stores that are made of them."""

import io
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from pictures import encoded
from PIL import Image
from transformers import CLIPImageProcessorPil

from hf_vs2.data import open_image


def noise_image(number: int, mode: str = "RGB") -> Image.Image:
    """Reproducible, of a size and texture of its own."""
    dice = np.random.default_rng(number)
    coarse = dice.integers(0, 256, (int(dice.integers(1, 9)), int(dice.integers(1, 9)), 4), dtype=np.uint8)
    image = Image.fromarray(coarse, "RGBA").resize(tuple(dice.integers(20, 90, 2).tolist()), Image.Resampling.BICUBIC)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def png(number: int, mode: str = "RGB") -> dict:
    return {"bytes": encoded(noise_image(number, mode)), "path": None}


def make_dataset(count: int = 23, broken: tuple[int, ...] = (), modes: tuple[str, ...] = ("RGB",)) -> datasets.Dataset:
    images = [png(n, modes[n % len(modes)]) for n in range(count)]
    for n in broken:
        images[n] = {"bytes": images[n]["bytes"][:60], "path": f"photo {n}.png"}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    return datasets.Dataset.from_dict({"image": images, "label": [n % 3 for n in range(count)]}, features=features)


def numbered(number: int) -> Image.Image:
    """An image that holds a number from 0 to 255."""
    return Image.new("RGB", (8, 8), (number, 40, 9))


def numbers_of(rows) -> list[int]:
    return [open_image(row["image"]).getpixel((0, 0))[0] for row in rows]


def numbered_rows(labels: list[Any], first: int = 0, names: list[str] | None = None) -> datasets.Dataset:
    """With a label each, which are numbers of `names` where there are any."""
    images = [{"bytes": encoded(numbered(first + place)), "path": None} for place in range(len(labels))]
    rows = datasets.Dataset.from_dict({"image": images, "label": labels}).cast_column("image", datasets.Image())
    return rows if names is None else rows.cast_column("label", datasets.ClassLabel(names=names))


def make_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def put_tar(path: Path, members: dict[str, bytes]) -> None:
    """An archive of files by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}
