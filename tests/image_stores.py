"""Data sets of images, and the stores that are made of them."""

import io
import tarfile
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from transformers import CLIPImageProcessorPil


def noise_image(number: int, mode: str = "RGB") -> Image.Image:
    """Reproducible, of a size and texture of its own."""
    dice = np.random.default_rng(number)
    coarse = dice.integers(0, 256, (int(dice.integers(1, 9)), int(dice.integers(1, 9)), 4), dtype=np.uint8)
    image = Image.fromarray(coarse, "RGBA").resize(tuple(dice.integers(20, 90, 2).tolist()), Image.Resampling.BICUBIC)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def png(number: int, mode: str = "RGB") -> dict:
    file = io.BytesIO()
    noise_image(number, mode).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def make_dataset(count: int = 23, broken: tuple[int, ...] = (), modes: tuple[str, ...] = ("RGB",)) -> datasets.Dataset:
    images = [png(n, modes[n % len(modes)]) for n in range(count)]
    for n in broken:
        images[n] = {"bytes": images[n]["bytes"][:60], "path": f"photo {n}.png"}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    return datasets.Dataset.from_dict({"image": images, "label": [n % 3 for n in range(count)]}, features=features)


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
