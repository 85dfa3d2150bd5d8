"""Sets of images and rows that can't do: a message or a result, not a NaN and not a traceback. Broken images, at every door,
are in tests/test_every_door.py."""

import json

import datasets
import pytest
import torch
from commands import complaint, image_commands, run, strictly
from pictures import encoded
from PIL import Image
from toy import make_rows, make_sae
from trainings import make_trainer
from words import NAMES, compared_model, make_word_tokenizer

from hf_vs2 import (
    calibrate,
    evaluate,
    extract_activations,
    measure_statistics,
    recommend,
    steering_grid,
)
from hf_vs2.steering.corpus import RetrievalCorpus
from hf_vs2.training.label_losses import PrototypeAlignment


def test_sets_that_cannot_do_are_refused_in_one_line(clip_path, checkpoint, images_path, tmp_path, capsys):
    """An empty split, one image, one image copied, one class."""
    for name, count in (("single", 1), ("same", 30)):
        (tmp_path / name / "red").mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (32, 32), "red").save(tmp_path / name / "red" / f"{index}.png")
    (tmp_path / "nothing").mkdir()

    def asked(command, images, *more):
        return [
            *image_commands(clip_path, checkpoint, ["--dataset", images], tmp_path / "out", images)[command],
            *more,
        ]

    for command in ("train", "evaluate", "calibrate", "recommend", "atlas"):
        message = complaint(capsys, *asked(command, images_path, "--split", "train[:0]"))
        assert "The data set is empty" in message, command
    for arguments, expected in (
        (asked("extract", tmp_path / "nothing"), "holds no data set that can be read"),
        (asked("classify", tmp_path / "nothing"), "holds no image"),
        (asked("train", tmp_path / "single"), "1 activation rows are too few"),
        (asked("train", tmp_path / "same"), "All training rows are the same"),
    ):
        assert expected in complaint(capsys, *arguments)
    assert not list((tmp_path / "out").glob("*/config.json"))
    for images in ("single", "same"):  # one class, too
        run(capsys, *asked("evaluate", tmp_path / images))
        strictly((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
        (answer, *_) = json.loads(run(capsys, *asked("classify", tmp_path / images, "--labels", "red")))
        assert answer["predictions"] == [{"score": 1.0, "label": "red"}]


ROWS = make_rows(300, 32)
LABELS, CLASSES = [0] * 300, torch.eye(24)[:7]


def trained(rows, folder, **labels):
    return make_trainer(folder / "sae", rows, model=make_sae(32).config, max_steps=3, save_steps=1, **labels).train()


def compared(rows, labels=LABELS, **others):
    labels = labels if labels is not LABELS else LABELS[: len(rows)]
    return evaluate(compared_model(ROWS), rows, labels, NAMES, make_word_tokenizer(), templates="single", **others)


JOBS = {
    "train": trained,
    "calibrate": lambda rows, _: calibrate(make_sae(32), rows),
    "calibrate on some": lambda rows, _: calibrate(make_sae(32), rows, torch.arange(len(rows))),
    "measure_statistics": lambda rows, _: measure_statistics(make_sae(32), rows),
    "measure_statistics, held out": lambda rows, _: measure_statistics(
        make_sae(32), rows, held_out=torch.arange(len(rows))[100:150]
    ),
    "a corpus": lambda rows, _: RetrievalCorpus.from_store(rows),
    "evaluate": lambda rows, _: compared(rows),
    "evaluate, for reference": lambda rows, _: compared(ROWS, reference_rows=rows),
    "recommend": lambda rows, _: recommend(compared_model(ROWS, statistics=True), rows, CLASSES),
    "steering_grid": lambda rows, _: steering_grid(
        compared_model(ROWS), rows, LABELS[: len(rows)], CLASSES, [1.5], [1.0]
    ),
}


def broken(value):
    return ROWS.clone().index_fill_(0, torch.tensor([123]), value)


BAD_ROWS = {
    "NaN": (broken(torch.nan), "Row 123 of .* holds NaN"),
    "infinity": (broken(torch.inf), "Row 123 of .* holds NaN"),
    "minus infinity": (broken(-torch.inf), "Row 123 of .* holds NaN"),
    "none": (ROWS[:0], "no rows|are empty|too few|these are .0, 32.|must be a .*tensor"),
    "another width": (ROWS[:, :17], "17"),
    "flat": (ROWS[:, 0], r"must be a \(rows, hidden_size\) tensor|a matrix with a row an image|rows must be"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_broken_rows_are_named_by_every_job(kind, tmp_path):
    """Rows come from other people's files, too. One NaN among millions would make every weight NaN."""
    rows, message = BAD_ROWS[kind]
    for name, job in JOBS.items():
        if kind == "another width" and name == "a corpus":  # of any width
            continue
        with pytest.raises(ValueError, match=message):
            job(rows, tmp_path)
            pytest.fail(name)
    assert not list(tmp_path.rglob("*.safetensors"))


LABEL_JOBS = {
    "train": lambda labels, folder: trained(ROWS, folder, labels=labels, label_loss=PrototypeAlignment()),
    "evaluate": lambda labels, _: compared(ROWS, labels=labels),
    "recommend": lambda labels, _: recommend(compared_model(ROWS, statistics=True), ROWS, CLASSES, labels),
    "steering_grid": lambda labels, _: steering_grid(compared_model(ROWS), ROWS, labels, CLASSES, [1.5], [1.0]),
}
BAD_LABELS = {
    "too few": ([0] * 299, r"one integer a row, \(300,\), not torch.int64 of shape \(299,\)"),
    "fractions": ([0.5] * 300, "one integer a row"),
    "names": (["cat"] * 300, "one integer a row, .* not 'cat'"),
    "of no class": ([7] + [0] * 299, "label 7 of row 0 is out of range"),
    "below all classes": ([0, -2] + [0] * 298, "label -2 of row 1"),
    "none known": ([-1] * 300, r"All labels are -1 \(unknown\)|label -1 of row 0"),
    "none": (None, "labels are missing|label_loss needs labels|labels must be"),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_impossible_labels_are_refused_by_every_job(kind, tmp_path):
    """A shifted or one-hot label column would give a wrong SAE, table or method with confidence."""
    labels, message = BAD_LABELS[kind]
    for name, job in LABEL_JOBS.items():
        if (name, kind) in (("train", "of no class"), ("recommend", "none"), ("recommend", "none known")):
            continue  # any number of classes; labels need not be known
        with pytest.raises(ValueError, match=message):
            job(labels, tmp_path)
            pytest.fail(name)


def test_a_stream_that_breaks_off_is_not_a_shorter_set(clip_path, tmp_path):
    """A row without its column in the middle of a stream: a store of the first half must not pass for the whole."""

    def rows():
        for number in range(9):
            image = {"bytes": encoded(Image.new("RGB", (1, 1), (9, 9, 9))), "path": None}
            yield {"image": image, "label": 0} if number != 6 else {"picture": image, "label": 0}

    stream = datasets.IterableDataset.from_generator(rows)
    with pytest.raises(ValueError, match="Row 6 has no column image"):
        extract_activations(str(clip_path), stream, tmp_path, batch_size=2, progress=False)
    assert not any(json.loads(file.read_text())["complete"] for file in tmp_path.glob("*/*.json"))
