"""Bad images and bad sets through every door: the sample is named and nothing else is lost, or it is skipped, counted and listed.

One folder holds them all, as a scraped data set does: good images, strange ones that must be read, and broken ones.
"""

import functools
import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from commands import COLOURS, complaint, image_commands, read_json, run
from PIL import Image
from toy import make_sae
from transformers import CLIPModel

from hf_vs2 import ActivationStore, SAETrainer, SAETrainingArguments, calibrate, zero_shot_classifier
from hf_vs2.cli import main
from hf_vs2.data import UnreadableImageError, load_images, open_image
from hf_vs2.data.inputs import NamedImage
from hf_vs2.data.stores.activations import extract_activations
from hf_vs2.steering.corpus import RetrievalCorpus
from hf_vs2.steering.retrieval import embed_images


BROKEN = {
    "bomb.png": "too large to be opened safely: Image size (400000000 pixels)",
    "cut.jpg": "truncated",
    "empty.png": "it is empty, 0 bytes",
    "page.jpg": "no image format that Pillow can identify",
}
STRANGE = ("deep.png", "moving.gif", "one.png")


@functools.cache
def encoded(name: str) -> bytes:
    file = io.BytesIO()
    dice = np.random.default_rng(1)
    if name == "bomb.png":  # 48 kB on disk, 1.2 GB as RGB
        Image.new("1", (20_000, 20_000)).save(file, "PNG", compress_level=1)
    elif name == "cut.jpg":
        Image.fromarray(dice.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file, "JPEG")
        return file.getvalue()[:-400]
    elif name == "page.jpg":
        return b"<html>404 not found</html>"
    elif name == "deep.png":
        Image.fromarray((np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)).save(file, "PNG")
    elif name == "moving.gif":
        frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    elif name == "one.png":
        Image.new("RGB", (1, 1), (9, 9, 9)).save(file, "PNG")
    return file.getvalue()


def write_images(folder: Path, names, per_class: int = 6) -> Path:
    """Good images of three classes, and the named ones among the last class."""
    dice = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            pixels = (np.asarray(colour) + dice.integers(-40, 40, (32, 32, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:02d}.png")
    for name in names:
        (folder / "red" / name).write_bytes(encoded(name))
    return folder


@pytest.fixture(scope="module")
def messy(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "messy", (*BROKEN, *STRANGE))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, clip_path) -> Path:
    root = tmp_path_factory.mktemp("outputs")
    images = write_images(root / "images", STRANGE, per_class=12)
    assert main([*map(str, commands(clip_path, root / "sae", images, root)["train"])]) == 0
    return root / "sae"


def commands(clip_path: Path, checkpoint: Path, images: Path, out: Path) -> dict[str, list[object]]:
    return image_commands(clip_path, checkpoint, ["--dataset", images], out, images)


@pytest.mark.parametrize("command", ["extract", "train", "evaluate", "recommend", "calibrate", "atlas", "classify"])
def test_a_command_names_the_broken_image_or_skips_counts_and_lists_it(
    command, clip_path, checkpoint, messy, tmp_path, capsys, caplog
):
    """Strict by default, or a typo in a path silently halves a data set; `--on_error skip`, or one bad file in a million costs
    the night. The list must come with reasons, and say which files."""
    arguments = commands(clip_path, checkpoint, messy, tmp_path)[command]
    message = complaint(capsys, *arguments)
    assert str(messy / "red" / "bomb.png") in message and BROKEN["bomb.png"] in message
    assert command == "classify" or "--on_error skip" in message, "as the option is spelled on the command line"
    assert not list(tmp_path.glob("*/config.json")) and not (tmp_path / "results.json").exists()

    caplog.clear()
    assert main([*map(str, arguments), "--on_error", "skip"]) == 0
    out, err = capsys.readouterr()
    for name, reason in BROKEN.items():
        (line,) = [line for line in caplog.messages if line.startswith("Skipped:") and name in line]
        assert str(messy / "red" / name) in line and reason in line
    good = 3 * 6 + len(STRANGE)
    if command == "classify":  # whose last line counts them
        assert len(json.loads(out)) == good and f"{len(BROKEN)} images left out, which can't be read." in err
    else:
        counted = f"{len(BROKEN)} of {good + len(BROKEN)} images could not be read and were skipped."
        assert counted in caplog.messages
    if command == "train":
        assert read_json(tmp_path / "sae" / "config.json")["training_data"]["skipped"] == len(BROKEN)
    if command == "evaluate":
        result = read_json(tmp_path / "results.json")
        assert result["meta"]["dataset"]["skipped"] == len(BROKEN) and result["meta"]["n"] == good


def test_skipped_images_are_recorded_the_same_in_every_run(clip_path, messy, tmp_path):
    """An interrupted extraction must end with the files of an undisturbed one: no address of a buffer in a message."""
    stores = [
        extract_activations(str(clip_path), load_images(messy), tmp_path / n, on_error="skip", progress=False)
        for n in "ab"
    ]
    listed = [(Path(item["path"]).name, item["error"]) for item in stores[0].metadata["skipped"]]
    assert [name for name, _ in listed] == sorted(BROKEN)
    assert all(BROKEN[name] in error and "0x" not in error for name, error in listed)
    first, second = ({file.name: file.read_bytes() for file in store.path.iterdir()} for store in stores)
    assert first == second
    assert isinstance(stores[0], ActivationStore) and stores[0].tensor().isfinite().all()


@pytest.mark.parametrize("name", BROKEN)
def test_library_doors_name_the_broken_image(name, clip_path, checkpoint, tmp_path):
    """Whichever function meets it, the user learns which file to look at."""
    folder = write_images(tmp_path / "images", (name,), per_class=1)
    rows = load_images(folder)
    clip = CLIPModel.from_pretrained(clip_path)
    classifier = zero_shot_classifier(str(checkpoint))
    paths = [row["path"] for row in rows["image"]]
    for door in (
        lambda: extract_activations(str(clip_path), rows, tmp_path / "store", progress=False),
        lambda: extract_activations(str(clip_path), rows.to_iterable_dataset(), tmp_path / "store", progress=False),
        lambda: embed_images(clip, rows),
        lambda: classifier(paths, list(COLOURS), batch_size=2),
        lambda: open_image(paths[3], f"image 3 ({paths[3]})"),
    ):
        with pytest.raises(UnreadableImageError, match=f"image 3 .*{name}"):
            door()


def test_strange_images_are_read_and_trained_on(clip_path, tmp_path):
    """One pixel, an animation and 16 bits are images: they get rows, all different, as the eye tells them apart."""
    store = extract_activations(
        str(clip_path), load_images(write_images(tmp_path / "images", STRANGE, 1)), tmp_path / "s", progress=False
    )
    rows = store.tensor()
    assert len(rows) == 6 and rows.isfinite().all()
    assert torch.cdist(rows, rows)[~torch.eye(6, dtype=torch.bool)].min() > 1e-3
    deep = np.asarray(open_image(encoded("deep.png")))
    assert deep.min() == 0 and deep.max() > 250 and len(np.unique(deep)) > 200, "not clipped to white"
    assert np.asarray(open_image(encoded("moving.gif")))[0, 0].tolist() == [255, 0, 0], "the first frame"
    path = str(next((tmp_path / "images").rglob("deep.png")))
    for given in (path, Path(path).read_bytes(), Image.open(path)):
        assert (np.asarray(NamedImage(given, "deep").read(None)) == deep).all(), (
            "the pipeline sees what was trained on"
        )


def test_sets_that_cannot_do_are_refused_in_one_line(clip_path, checkpoint, tmp_path, capsys):
    """An empty split, one image, one image copied, one class: a message or a result, not a NaN and not a traceback."""
    good = write_images(tmp_path / "good", ())
    for name, count in (("single", 1), ("same", 30)):
        (tmp_path / name / "red").mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (32, 32), "red").save(tmp_path / name / "red" / f"{index}.png")
    (tmp_path / "nothing").mkdir()

    def asked(command: str, images: Path, *more: object) -> list[object]:
        return [*commands(clip_path, checkpoint, images, tmp_path / "out")[command], *more]

    for arguments, expected in (
        (asked("train", good, "--split", "train[:0]"), "The data set is empty"),
        (asked("evaluate", good, "--split", "train[:0]"), "The data set is empty"),
        (asked("calibrate", good, "--split", "train[:0]"), "The data set is empty"),
        (asked("extract", tmp_path / "nothing"), "holds no data set that can be read"),
        (asked("classify", tmp_path / "nothing"), "holds no image"),
        (asked("train", tmp_path / "single"), "1 activation rows are too few"),
        (asked("train", tmp_path / "same"), "All training rows are the same"),
        (asked("evaluate", good, "--labels", "a", "b"), "no label for blue, green, red"),
        (asked("evaluate", good, "--image_column", "img"), "no column 'img'; it has image, label"),
        (asked("extract", good, "--label_column", "class"), "no column 'class'; it has image, label"),
    ):
        assert expected in complaint(capsys, *arguments)
    assert not list((tmp_path / "out").glob("*/config.json"))
    for images in ("single", "same"):  # one class, too
        run(capsys, *asked("evaluate", tmp_path / images))
        text = (tmp_path / "out" / "results.json").read_text(encoding="utf-8")
        assert "NaN" not in text and "Infinity" not in text
        (answer, *_) = json.loads(run(capsys, *asked("classify", tmp_path / images, "--labels", "red")))
        assert answer["predictions"] == [{"score": 1.0, "label": "red"}]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_broken_rows_are_named_by_every_job(value, tmp_path):
    """Rows come from other people's files, too. One NaN among millions would make every weight NaN."""
    rows = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    rows[123, 4] = value
    arguments = SAETrainingArguments(output_dir=str(tmp_path / "sae"), max_steps=3, disable_tqdm=True)
    for job, message in (
        (
            lambda: SAETrainer(make_sae().config, arguments, rows).train(),
            "Row 123 of the activations holds NaN or infinite",
        ),
        (lambda: calibrate(make_sae(), rows), "Row 123 of the activations holds NaN or infinite"),
        (lambda: RetrievalCorpus.from_store(rows), "Row 123 of the corpus' rows holds NaN, infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            job()
    assert not (tmp_path / "sae").exists() or not list((tmp_path / "sae").glob("*.safetensors"))


def test_a_stream_that_breaks_off_is_not_a_shorter_set(clip_path, tmp_path):
    """A row without its column in the middle of a stream: a store of the first half must not pass for the whole."""

    def rows():
        for number in range(9):
            image = {"bytes": encoded("one.png"), "path": None}
            yield {"image": image, "label": 0} if number != 6 else {"picture": image, "label": 0}

    stream = datasets.IterableDataset.from_generator(rows)
    with pytest.raises(ValueError, match="Row 6 has no column image"):
        extract_activations(str(clip_path), stream, tmp_path, batch_size=2, progress=False)
    assert not any(json.loads(file.read_text())["complete"] for file in tmp_path.glob("*/*.json"))
