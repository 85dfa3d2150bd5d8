"""Pictures for the offline demo, all from packages the `demo` extra installs: typefaces, handwriting, photographs.

The demo's CLIP learned printed characters (`scripts/train_demo_clip.py` draws them with [`render_character`]); its
target is scikit-learn's handwritten digits, and everything else here is foreign on purpose, to show what the gate is
for.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont


if TYPE_CHECKING:
    from datasets import Dataset

DIGITS = "0123456789"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTER_NAMES = tuple(f"letter {letter}" for letter in LETTERS)
IMAGE_SIZE = 28

# Named one by one: matplotlib also ships symbol fonts, whose glyphs at the places of digits are brackets and
# integrals.
TYPEFACES = (
    *(f"DejaVuSans{style}.ttf" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}.ttf" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}.ttf" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}.ttf" for style in ("", "Bol", "Italic", "BolIta")),
    *(f"{name}10.ttf" for name in ("cmr", "cmb", "cmss", "cmti", "cmtt", "cmmi")),
)


def require_demo_packages() -> None:
    """Raises `ImportError` with the command to run when scikit-learn or matplotlib is missing."""
    packages = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
    missing = [name for module, name in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"The demo needs {' and '.join(missing)}: run `pip install {' '.join(missing)}`.")


def load_typefaces(size: int) -> list[ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """The typefaces of [`TYPEFACES`] that this matplotlib has, then Pillow's own default, at `size` pixels."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = [folder / name for name in TYPEFACES if (folder / name).is_file()]
    return [*(ImageFont.truetype(str(path), size) for path in paths), ImageFont.load_default(size)]


def render_character(character: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, size: int) -> Image.Image:
    """One white character in the middle of a black square of `size` pixels, shrunk where it would not fit."""
    canvas = Image.new("L", (3 * size, 3 * size))
    ImageDraw.Draw(canvas).text((size, size), character, fill=255, font=font)
    glyph = canvas.crop(canvas.getbbox())
    room = size - 4
    if max(glyph.size) > room:
        glyph.thumbnail((room, room), Image.Resampling.BICUBIC)
    square = Image.new("L", (size, size))
    square.paste(glyph, ((size - glyph.width) // 2, (size - glyph.height) // 2))
    return square


def prepare_digit(pixels: np.ndarray) -> Image.Image:
    """A handwritten digit, 8 x 8 values in 0..16, as a 28-pixel picture: enlarged to 24 pixels, framed by 2 black
    ones."""
    levels = np.clip(np.rint(pixels * (255 / 16)), 0, 255).astype(np.uint8)
    framed = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
    framed.paste(Image.fromarray(levels).resize((24, 24), Image.Resampling.BICUBIC), (2, 2))
    return framed


def load_handwriting() -> "Dataset":
    """scikit-learn's 1,797 handwritten digits as a `datasets.Dataset` with the columns `image` and `label`."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature
    from sklearn.datasets import load_digits

    digits = load_digits()
    return Dataset.from_dict(
        {"image": [prepare_digit(pixels) for pixels in digits.images], "label": digits.target.tolist()},
        features=Features({"image": ImageFeature(), "label": ClassLabel(names=list(DIGIT_NAMES))}),
    )


def foreign_images(num_images: int, seed: int) -> dict[str, list[Image.Image]]:
    """Pictures the demo's SAE has not been trained for, `num_images` of each kind, by the name shown to the user."""
    rng = np.random.default_rng(seed)
    return {
        "turned digits": _turned_digits(num_images, rng),
        "printed letters": _printed_letters(num_images, rng),
        "photo crops": _photo_crops(num_images, rng),
        "uniform noise": _uniform_noise(num_images, rng),
    }


def _turned_digits(num_images: int, rng: np.random.Generator) -> list[Image.Image]:
    from sklearn.datasets import load_digits

    images = load_digits().images
    chosen = rng.choice(len(images), num_images, replace=num_images > len(images))
    return [prepare_digit(np.rot90(images[index])) for index in chosen]


def _printed_letters(num_images: int, rng: np.random.Generator) -> list[Image.Image]:
    fonts = load_typefaces(IMAGE_SIZE)
    drawn = zip(rng.choice(list(LETTERS), num_images), rng.integers(len(fonts), size=num_images), strict=True)
    return [render_character(letter, fonts[font], IMAGE_SIZE) for letter, font in drawn]


def _photo_crops(num_images: int, rng: np.random.Generator) -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    crops = []
    for _ in range(num_images):
        photo = photos[rng.integers(len(photos))]
        side = int(rng.integers(IMAGE_SIZE, 200))
        left, top = (int(rng.integers(length - side)) for length in photo.size)
        box = (left, top, left + side, top + side)
        crops.append(photo.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box=box))
    return crops


def _uniform_noise(num_images: int, rng: np.random.Generator) -> list[Image.Image]:
    pixels = rng.integers(0, 256, (num_images, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]
