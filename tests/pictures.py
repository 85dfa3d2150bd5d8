"""Files of images: strange ones with what is to be seen on them, broken ones with the reason, and what is no image."""

import functools
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image


def picture(width: int = 36, height: int = 24, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8: smooth, and different in every corner."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    opaque = Image.fromarray(np.dstack([colours, alpha]))
    return np.asarray(Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque).convert("RGB"))


@functools.cache
def strange() -> dict[str, tuple[bytes, np.ndarray]]:
    """Files that two ways of opening read differently: content, and the pixels that are to be seen."""
    colours = picture(40, 30)
    alpha = np.linspace(0, 255, 40 * 30).reshape(30, 40).astype(np.uint8)
    grey = colours[..., 0]
    grey_rgb = np.repeat(grey[..., None], 3, -1)
    palette = Image.fromarray(np.tile(np.arange(40, dtype=np.uint8) // 10, (30, 1)), "P")
    palette.putpalette([255, 0, 0, 0, 99, 0, 0, 0, 255, 9, 9, 9])
    seen = np.array([(255, 255, 255), (0, 99, 0), (0, 0, 255), (9, 9, 9)], dtype=np.uint8)[np.asarray(palette)]
    thread, standing = picture(4000, 1, seed=1), picture(1, 4000, seed=2)
    plain = Image.fromarray(colours)
    files = {
        "clear grey.png": (
            Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha))),
            {},
            on_white(grey_rgb, alpha),
        ),
        "clear.png": (Image.fromarray(np.dstack([colours, alpha])), {}, on_white(colours, alpha)),
        "deep.png": (Image.fromarray(grey.astype(np.uint16) * 257), {}, grey_rgb),
        "moving.png": (plain, {"save_all": True, "append_images": [Image.new("RGB", plain.size)]}, colours),
        "one.png": (Image.new("RGB", (1, 1), (90, 160, 230)), {}, np.full((1, 1, 3), (90, 160, 230), np.uint8)),
        "palette.gif": (palette, {"transparency": 0}, seen),
        "standing thread.png": (Image.fromarray(standing), {}, standing),
        "thread.png": (Image.fromarray(thread), {}, thread),
        "turned.tiff": (plain, {"exif": exif(8)}, np.rot90(colours)),
        "turned.webp": (plain, {"lossless": True, "exif": exif(5)}, colours.swapaxes(0, 1)),
    }
    return {
        name: (encoded(image, Path(name).suffix[1:].upper(), **options), shown)
        for name, (image, options, shown) in files.items()
    }


# With Pillow's limit at PIXELS.
PIXELS = 500_000
BROKEN = {
    "bomb.png": "too large to be opened safely",
    "cut.jpg": "truncated",
    "empty.png": "it is empty, 0 bytes",
    "gone.png": "No such file",
    "page.jpg": "no image format that Pillow can identify",
}


@functools.cache
def broken(name: str) -> bytes:
    if name == "bomb.png":
        return encoded(Image.new("1", (1200, 1200)))
    if name == "cut.jpg":
        return encoded(Image.fromarray(picture(64, 64)), "JPEG")[:-400]
    return b"<html>404 not found</html>" if name == "page.jpg" else b""


def put_photos(root: Path, broken_ones=BROKEN) -> dict[str, np.ndarray | None]:
    """Images as people and systems keep them in `root`: {file: the pixels to be seen; `None`: broken}, in the order in
    which they are read. Beside them lie files that are no images of theirs, links in a circle, and a pipe."""
    far = root.with_name("far")
    plain = {name: picture(seed=place + 10) for place, name in enumerate(PLAIN)}
    for name, pixels in plain.items():
        place = far / name.removeprefix("dog/linked/") if "linked" in name else root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encoded(Image.fromarray(pixels)))
    for name, (content, _) in strange().items():
        (root / "dog" / name).write_bytes(content)
    for name in broken_ones:
        if name == "gone.png":
            (root / "dog" / name).symlink_to(root / "nowhere.png")
        else:
            (root / "dog" / name).write_bytes(broken(name))
    (root / "dog/linked").symlink_to(far)
    for name in NO_IMAGES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(Image.fromarray(picture())))
    (root / "notes.txt").write_text("not an image")
    (root / "dog/LICENSE").write_text("no image either")
    for name in ("IMG_1.HEIC", "IMG_2.HEIC"):
        (root / "dog" / name).write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (far / "up").symlink_to(root.parent)
    (root / "dog/again").symlink_to(root / "dog")
    os.mkfifo(root / "dog/pipe.png")
    shown = plain | {f"dog/{name}": pixels for name, (_, pixels) in strange().items()}
    return dict(sorted((shown | {f"dog/{name}": None for name in broken_ones}).items()))


PLAIN = ("cat/1.png", "cat/album.jpg/2.JPG", "dog/3", "dog/linked/4.png", "dog/linked/deeper/5.png")
NO_IMAGES = (
    *(".DS_Store", "cat/._1.png", "__MACOSX/cat/._1.png", "cat/.ipynb_checkpoints/1-checkpoint.png"),
    *("cat/@eaDir/1.png", "Thumbs.db", "dog/Thumbs.db"),
)
