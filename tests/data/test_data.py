"""Images come as people have them: every common kind is read as it looks, a broken one is named, sources agree."""

import random
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from image_stores import numbered, numbered_rows, numbers_of
from pictures import encoded, picture
from PIL import Image

from hf_vs2.data import UnreadableImageError, load_images, open_image


COLOUR = picture()
GREY = COLOUR[..., 0]
GREY_RGB = np.repeat(GREY[..., None], 3, axis=-1)
PALETTE = Image.fromarray(np.tile(np.arange(36, dtype=np.uint8) // 9, (24, 1)), "P")
PALETTE.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
# What is given, what is to be seen, and how far it may be off. More of them: `strange` in tests/pictures.py.
KINDS = {
    "rgb png": (encoded(Image.fromarray(COLOUR)), COLOUR, 0),
    "greyscale": (encoded(Image.fromarray(GREY)), GREY_RGB, 0),
    "black and white": (encoded(Image.fromarray(GREY > 99)), np.where(GREY_RGB > 99, 255, 0), 0),
    "16 bits in 32, tiff": (encoded(Image.fromarray(GREY.astype(np.int32) * 257), "TIFF"), GREY_RGB, 0),
    "float tiff": (encoded(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"), GREY_RGB, 0),
    "palette": (encoded(PALETTE), np.asarray(PALETTE.convert("RGB")), 0),
    "cmyk jpeg": (encoded(Image.fromarray(GREY_RGB).convert("CMYK"), "JPEG", quality=100), GREY_RGB, 6),
    "exif: damaged": (encoded(Image.fromarray(COLOUR), "WEBP", lossless=True, exif=b"Exif\0\0no"), COLOUR, 0),
    "bmp in a row of datasets": ({"bytes": encoded(Image.fromarray(COLOUR), "BMP"), "path": "x.bmp"}, COLOUR, 0),
    "array, one channel": (GREY[..., None], GREY_RGB, 0),
    "array of fractions": (COLOUR / 255, COLOUR, 0),
    "tensor, channels first": (torch.from_numpy(COLOUR.copy()).movedim(-1, 0), COLOUR, 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_is_read_as_it_looks(kind):
    value, expected, tolerance = KINDS[kind]
    image = open_image(value)
    assert image.mode == "RGB"
    assert image.size == (expected.shape[1], expected.shape[0])
    assert np.abs(np.asarray(image).astype(float) - expected).max() <= tolerance


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        (None, "neither bytes nor a path"),
        (np.zeros((2, 5, 7)), "shape"),
        (np.full((4, 4), np.nan), "nan"),
        (np.full((4, 4), -1), "lie in"),
    ],
)
def test_an_unreadable_image_is_named_with_the_reason(value, reason):
    with pytest.raises(UnreadableImageError, match=r"^image 7 \(a\.jpg\) cannot be read") as caught:
        open_image(value, "image 7 (a.jpg)")
    assert reason in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_random_damage_gives_an_image_or_the_named_error_and_nothing_else():
    """Pillow raises a dozen exception types on damaged files; a long extraction must meet only one."""
    dice = random.Random(0)
    outcomes = set()
    for value, _, _ in KINDS.values():
        for _ in range(40 if isinstance(value, bytes) else 0):
            damaged = bytearray(value[: dice.randrange(1, len(value) + 1)] if dice.random() < 0.4 else value)
            for _ in range(dice.choice((1, 5, 50))):
                damaged[dice.randrange(len(damaged))] = dice.randrange(256)
            try:
                outcomes.add(open_image(bytes(damaged), "x").mode)
            except UnreadableImageError as error:
                assert str(error).startswith("x ")
                outcomes.add("named")
    assert outcomes == {"RGB", "named"}


# Sets of images

CLASSES = ["café", "dog", "Émeu"]  # the file system may hold the accents decomposed


def make_rows(count: int, first: int = 0) -> datasets.Dataset:
    return numbered_rows([n % 3 for n in range(first, first + count)], first, sorted(CLASSES))


def make_source(kind: str, root: Path) -> Path:
    """12 training images numbered 0..11 with classes by number modulo 3, and 4 test images 100..103."""
    root.mkdir()
    train, test = make_rows(12), make_rows(4, first=100)
    if kind == "image folder":
        for split, numbers in (("train", range(12)), ("val", range(100, 104))):
            for n in numbers:
                name = unicodedata.normalize("NFD", sorted(CLASSES)[n % 3])
                folder = root / split / name
                folder.mkdir(parents=True, exist_ok=True)
                numbered(n).save(folder / f"{n:03d}.{('png', 'PNG', 'bmp', 'webp')[n % 4]}", lossless=True)
    elif kind == "parquet folder":
        (root / "data").mkdir()
        for part in range(3):
            train.select(range(part * 4, part * 4 + 4)).to_parquet(
                root / "data" / f"train-{part:05d}-of-00003.parquet"
            )
        test.to_parquet(root / "data" / "validation-00000-of-00001.parquet")
    elif kind == "saved":
        datasets.DatasetDict({"train": train, "validation": test}).save_to_disk(root / "saved")
        return root / "saved"
    return root


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["image folder", "parquet folder", "saved"])
def test_every_source_gives_the_same_undecoded_rows(kind, streaming, tmp_path):
    source = make_source(kind, tmp_path / "source")
    train = load_images(source, "train", streaming=streaming)
    assert isinstance(train, datasets.IterableDataset if streaming else datasets.Dataset)
    assert train.features["image"] == datasets.Image(decode=False)
    assert train.features["label"].names == sorted(CLASSES)
    rows = list(train)
    assert sorted(numbers_of(rows)) == list(range(12))
    assert [row["label"] for row in rows] == [n % 3 for n in numbers_of(rows)]
    assert numbers_of(load_images(source, "train[2:5]", streaming=streaming)) == numbers_of(rows[2:5])
    assert sorted(numbers_of(load_images(source, "validation", streaming=streaming))) == [100, 101, 102, 103]
    if not streaming:
        assert str(load_images(source, "train[2:5]").split) == "train[2:5]"
        assert numbers_of(load_images(source, "train[50%:]")) == numbers_of(rows[6:])
        assert numbers_of(load_images(source, "train[:1]+validation[:1]"))[0] == numbers_of(rows)[0]
    for wrong in (None, "test", "train[3"):
        with pytest.raises(ValueError, match="train.*validation"):
            load_images(source, wrong, streaming=streaming)
    with pytest.raises(ValueError, match="no column 'img'; it has image, label; pass image_column='image'"):
        load_images(source, "train", image_column="img", streaming=streaming)


def test_single_files_and_a_single_saved_data_set_need_no_split(tmp_path):
    rows = make_rows(5)
    rows.to_parquet(tmp_path / "test-00000-of-00001.parquet")
    rows.save_to_disk(tmp_path / "saved")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    for source in (tmp_path / "test-00000-of-00001.parquet", tmp_path / "saved", arrow):
        assert numbers_of(load_images(source)) == list(range(5))
    assert numbers_of(load_images(tmp_path / "test-00000-of-00001.parquet", "test[1:3]")) == [1, 2]


def test_what_is_not_there_is_said_with_what_is(tmp_path):
    (tmp_path / "flowers").mkdir()
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(FileNotFoundError, match="flowers, readme.txt"):
        load_images(tmp_path / "flower")
    with pytest.raises(FileNotFoundError, match="does not exist either"):
        load_images(tmp_path / "a/b/c")
    with pytest.raises(ValueError, match="expected images .* found nothing"):
        load_images(tmp_path / "flowers")
    with pytest.raises(ValueError, match="expected a folder, or a .parquet or .arrow file"):
        load_images(tmp_path / "readme.txt")
    with pytest.raises(ValueError, match="revision='main' is for data sets on the Hub"):
        load_images(tmp_path, revision="main")
    with pytest.raises(OSError, match="'nobody/nothing' is neither a path on this machine nor"):
        load_images("nobody/nothing")


def test_a_card_with_configurations_and_a_damaged_file_are_explained_in_one_line(tmp_path):
    for name in ("big", "small"):
        make_rows(3).to_parquet(tmp_path / "set" / f"{name}.parquet")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("big", "small"))
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert len(load_images(tmp_path / "set", config_name="small")) == 3
    with pytest.raises(ValueError, match=r"'big', 'small'.*\(choose one with config_name=...\)$") as caught:
        load_images(tmp_path / "set")
    assert "\n" not in str(caught.value)
    (tmp_path / "half.parquet").write_bytes((tmp_path / "set" / "big.parquet").read_bytes()[:100])
    with pytest.raises(ValueError, match="half.parquet cannot be opened: .*[Pp]arquet"):
        load_images(tmp_path / "half.parquet")
