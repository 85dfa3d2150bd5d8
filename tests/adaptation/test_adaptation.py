"""`hf-vs2 adapt`, from a folder of images to a checkpoint and a report, on the demo's CLIP and handwriting."""

import csv
import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image

import hf_vs2
from hf_vs2.adaptation import run
from hf_vs2.adaptation.answers import confidence
from hf_vs2.adaptation.checked import checked_labels
from hf_vs2.adaptation.plan import sae_plan, trust
from hf_vs2.cli import main
from hf_vs2.cli.steps import labels_and_prompts
from hf_vs2.data.pixels import reads_fast
from hf_vs2.demo.data import DIGIT_NAMES, load_handwriting


pytest.importorskip("sklearn")

CLIP = Path(hf_vs2.__file__).parent / "demo_assets"
HOSTILE = "<script>alert(1)<|script>.png"  # a file name can't have the slash
LABELS = [*DIGIT_NAMES[:9], 'nine" onerror=alert(1) <b>']


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """What is trained is not looked at here."""
    monkeypatch.setattr("hf_vs2.training.arguments.SAETrainingArguments.num_steps", lambda *_: 20)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder of 90 handwritten digits, one of them with a hostile name, and the label of each file."""
    folder, truth = tmp_path_factory.mktemp("adapt") / "digits", {}
    folder.mkdir()
    for number, one in enumerate(load_handwriting().select(range(90))):
        name = HOSTILE if number == 0 else f"{number:03d}.png"
        one["image"].save(folder / name, "PNG")
        truth[name] = LABELS[one["label"]]
    return folder, truth


def adapt(folder, output, *more):
    given = ["--model", CLIP, "--dataset", folder, "--labels", *LABELS, "--output_dir", output, "--disable_tqdm"]
    return main(["adapt", *map(str, [*given, *more])])


def test_from_a_folder_to_a_checkpoint_that_labels_decide_on(digits, tmp_path, monkeypatch, capsys):
    """The whole way: an interrupted run resumes, the report is whole, offline and escaped, the checkpoint answers as the report says, a
    second run repeats nothing, and labels that were filled in decide and are never written over."""
    (folder, truth), output = digits, tmp_path / "adapted"

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_page", interrupted)
        assert adapt(folder, output) == 130
    weights = (output / "model.safetensors").stat().st_ino
    assert not (output / "report.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr("hf_vs2.data.batches.open_image", lambda *_, **__: pytest.fail("an image was read again"))
        patch.setattr("hf_vs2.training.trainer.SAETrainer._optimize", lambda *_: pytest.fail("trained again"))
        capsys.readouterr()
        assert adapt(folder, output) == 0
    shown = capsys.readouterr().out
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert report["chosen"]["label"] in shown and "Not known" in shown
    assert f"--output_dir {output} --disable_tqdm --checked {output}/to_label.csv" in shown

    page = (output / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|http:|https:|onerror=alert\(1\) <b>|src=\"(?!data:)", page)
    assert "nine&#34; onerror=alert(1) &lt;b&gt;" in page

    classifier = hf_vs2.zero_shot_classifier(str(output))
    files = sorted(path for path in folder.iterdir())
    found = classifier([str(path) for path in files], LABELS, templates="single", top_k=1, return_details=True)
    # The checkpoint knows what it was asked; a terminal that gives no labels gets the same answers.
    assert main(["classify", str(files[3]), "--checkpoint", str(output), "--json"]) == 0
    (alone,) = json.loads(capsys.readouterr().out)
    assert alone["predictions"][0]["label"] == found[3]["predictions"][0]["label"]
    assert main(["classify", str(files[3]), "--checkpoint", str(CLIP)]) == 2
    assert "was not adapted to labels" in capsys.readouterr().err
    changed = {path.name for path, one in zip(files, found, strict=True) if one["predictions"] != one["plain"]}
    different = [one["predictions"][0]["label"] != one["plain"][0]["label"] for one in found]
    assert report["changes"]["number"] == sum(different) <= len(changed)
    sure = sum(one["plain"][0]["score"] for one in found) / len(found)
    assert report["calibration"]["plain"]["mean_confidence"] == pytest.approx(sure, abs=1e-4)

    before = {path: path.stat().st_mtime_ns for path in output.glob("*.*")}
    with monkeypatch.context() as patch:
        patch.setattr(run, "recommend", lambda *_, **__: pytest.fail("chosen again"))
        pipeline = hf_vs2.adapt(CLIP, folder, LABELS, output, progress=False)
    assert {path: path.stat().st_mtime_ns for path in output.glob("*.*")} == before
    assert pipeline(str(files[3]))[0]["label"] == found[3]["predictions"][0]["label"]

    # Trained again, or left by a run that was killed: the report must not pass for that of another checkpoint.
    assert adapt(folder, output, "--overwrite_output_dir") == 0
    assert hf_vs2.SAEModel.from_pretrained(output).config.method == report["chosen"]["method"] != "vs2"

    rows = list(csv.DictReader((output / "to_label.csv").open(encoding="utf-8")))
    assert {row["file"] for row in rows} == set(truth) and not any(row["label"] for row in rows)
    filled = output / "to_label.csv"
    with filled.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(row | {"label": truth[row["file"]].upper()} for row in rows[:60])
    kept = filled.read_bytes()
    assert adapt(folder, output, "--checked", filled) == 0
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert report["chosen"]["decided_by"] == "checked labels" and report["checked"]["n"] == 60
    plain = {path.name: one["plain"][0]["label"] for path, one in zip(files, found, strict=True)}
    right = sum(plain[row["file"]] == truth[row["file"]] for row in rows[:60]) / 60
    assert report["calibration"]["plain"]["checked"]["accuracy"] == pytest.approx(right)
    assert report["checked"]["methods"][0]["top1"] == pytest.approx(100 * right)
    assert [one["method"] for one in report["checked"]["few_shot"]] == ["nearest_mean", "tip_adapter", "linear_probe"]
    assert filled.read_bytes() == kept
    assert (output / "model.safetensors").stat().st_ino != weights or report["chosen"]["method"] == "none"


@pytest.mark.slow
def test_in_use_other_images_are_noticed_and_turned_away(digits, tmp_path, capsys):
    """Someone who classifies noise with a checkpoint for digits must read that it is not for such images, and can have
    them answered by none of the labels; digits are answered as before, but for the share that the report says."""
    output, other = tmp_path / "adapted", tmp_path / "noise"
    hf_vs2.adapt(CLIP, digits[0], list(DIGIT_NAMES), output, progress=False)
    other.mkdir()
    for number in range(30):
        noise = torch.randint(0, 256, (28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.numpy()).save(other / f"{number}.png")

    def classify(images, *more):
        assert main(["classify", *map(str, [images, "--checkpoint", output, "--json", *more])]) == 0
        shown = capsys.readouterr()
        return json.loads(shown.out), shown.err

    answers, said = classify(digits[0], "--reject")
    assert not re.search("not be the images|not the images", said)
    assert sum(one["rejected"] for one in answers) in (3, 4)  # 5 % of 90; the one at the threshold lies on either side
    before, _ = classify(digits[0])
    assert [
        one["predictions"] for one in before if one["image"] in {a["image"] for a in answers if not a["rejected"]}
    ] == [one["predictions"] for one in answers if not one["rejected"]]
    answers, said = classify(other, "--reject")
    assert re.search("not be the images|not the images", said)
    assert sum(one["predictions"][0]["label"] == "none of these labels" for one in answers) == sum(
        one["rejected"] for one in answers
    )
    capsys.readouterr()
    argv = ["classify", str(other), "--checkpoint", str(output), "--labels", "a", "b", "--reject"]
    assert main(argv) == 2 and "is for other labels" in capsys.readouterr().err


def test_five_images_keep_plain_clip(digits, tmp_path):
    """Nothing can be learned of five images: the answers are plain CLIP's, bit for bit, and the report says why. A
    checkpoint reads images as those that it was adapted to were read."""
    files = sorted(digits[0].iterdir())[:5]
    pipeline = hf_vs2.adapt(CLIP, list(map(str, files)), LABELS, tmp_path / "few", progress=False)
    report = json.loads((tmp_path / "few" / "report.json").read_text(encoding="utf-8"))
    assert report["chosen"]["method"] == "none" and "too few" in report["sae"]["why"]
    plain = hf_vs2.zero_shot_classifier(CLIP)
    assert pipeline(str(files[0])) == plain(str(files[0]), LABELS, templates="single")
    with pytest.raises(ValueError, match="another training"):
        hf_vs2.adapt(CLIP, digits[0], LABELS, tmp_path / "few", progress=False)
    assert not reads_fast(hf_vs2.zero_shot_classifier(tmp_path / "few").image_processor)
    hf_vs2.adapt(CLIP, list(map(str, files)), LABELS, tmp_path / "fast", fast_decode=True, progress=False)
    assert reads_fast(hf_vs2.zero_shot_classifier(tmp_path / "fast").image_processor)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\nb.png,dog\n", "names 'b.png', which is none of these 2 images"),
        ("file,label\na.png,dig\n", "the label 'dig', which is none of those to choose from: cat, dog"),
        ("file,label\na.png,\n", "has no label yet"),
        ("file,label\na.png,dog\na.png,cat\n", "has 'a.png' twice, as 'dog' and as 'cat'"),
        ("name;label\na.png;dog\n", "has no column 'file'"),
        ("", "has no column 'file'"),
    ],
)
def test_a_table_of_labels_that_does_not_fit_is_named(text, message, tmp_path):
    """A label that was not understood would count as a wrong answer of every method."""
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        checked_labels(path, ["a.png", "c.png"], ["cat", "dog"])


def test_a_table_of_labels_as_spreadsheets_write_it(tmp_path):
    """Excel writes semicolons and a byte order mark, and people capital letters and rows in any order."""
    path = tmp_path / "labels.csv"
    path.write_bytes("\ufefflabel;File;note\r\n Dog ;c.png;\r\n\r\n;a.png;blurred\r\n".encode())
    assert checked_labels(path, ["a.png", "c.png"], ["cat", "dog"]).tolist() == [-1, 1]


def test_the_size_of_the_sae_and_when_it_counts():
    """The rule that the docs state: a user who counts on it plans how many images to gather by it."""
    assert sae_plan(5, 768).max_steps == 1
    assert [sae_plan(n, 768).max_steps for n in (20, 120, 499, 500)] == [100, 360, 1497, None]
    assert [sae_plan(n, 768).expansion_factor for n in (20, 999, 1000, 5000)] == [1, 1, 2, 4]
    assert (sae_plan(5000, 768).top_k, sae_plan(5000, 8).top_k) == (64, 1)
    assert [trust(1000, {"fvu": fvu, "held_out_rows": 200})[0] for fvu in (0.6, 0.61)] == [True, False]
    assert "no better than the mean" in trust(120, {"fvu": 1.15, "held_out_rows": 24})[1]


def test_calibration_error():
    """By hand: in the tenth from 0.9, three images at 0.95 of which two are right; at 0.5, one that is right."""
    found = confidence(torch.tensor([0.95, 0.95, 0.95, 0.5]), torch.tensor([True, True, False, True]))
    assert found["ece"] == pytest.approx((abs(2.85 - 2) + 0.5) / 4) and found["accuracy"] == 0.75
    assert found["shares"][9] == 0.75 and found["shares"][5] == 0.25


def test_a_checkpoint_is_asked_as_it_was_adapted(tmp_path):
    """With other labels, prompts or cleaning the answers are of another classifier than the one in the report. What the
    command line says wins; a checkpoint that says nothing needs labels."""
    flags = dict.fromkeys(("clip", "revision", "subfolder", "labels", "templates"))
    asked = Namespace(checkpoint=str(tmp_path), names_as_given=False, **flags)
    with pytest.raises(ValueError, match="--labels is missing: .* was not adapted to labels"):
        labels_and_prompts(asked)
    request = {"labels": ["cat", "Dog_1"], "templates": ["a sketch of a {}.", "a {}."], "clean": False}
    (tmp_path / "report.json").write_text(json.dumps({"request": request}))
    assert labels_and_prompts(asked) == (request["labels"], request["templates"], False)
    asked.templates = "ensemble"
    assert labels_and_prompts(asked) == (request["labels"], "ensemble", False)
