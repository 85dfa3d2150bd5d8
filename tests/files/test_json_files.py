"""JSON that we write or print can be read by any JSON reader, whatever the numbers; ours gets infinity back from
it."""

import math
import os
from pathlib import Path

import pytest
from commands import run, source, strictly, with_checkpoint

from hf_vs2 import EvaluationResult, SAEModel, VS2CLIPForZeroShot, zero_shot_classifier
from hf_vs2.files.json_files import as_bytes, from_json, read_json, to_json, write_json
from hf_vs2.files.sharing.model_card import create_model_card


INFINITE = {"__float__": "Infinity"}


@pytest.mark.parametrize(
    ("value", "spelled"),
    [
        ({"tau": math.inf, "low": [-math.inf, 1.5]}, {"tau": INFINITE, "low": [{"__float__": "-Infinity"}, 1.5]}),
        ({"__float__": 1, "a": {"__float__": "else"}}, {"__float__": 1, "a": {"__float__": "else"}}),
        ({"\u732b": "\U0001f600", "none": None, "yes": True}, {"\u732b": "\U0001f600", "none": None, "yes": True}),
        ({"file": os.fsdecode(b"photo-\xff.png"), "n": 10**30}, {"file": "photo-\udcff.png", "n": 10**30}),
    ],
)  # fmt: skip
def test_what_is_written_is_read_back(value, spelled, tmp_path):
    """A bare Infinity, or a file name of bytes that are no text, would cost the whole result."""
    assert strictly(to_json(value)) == spelled
    assert from_json(to_json(value)) == value == read_json(write_json(tmp_path / "a.json", value))


def test_nan_is_named_where_it_stands():
    """NaN stands for no result: a file with a hole would hide it."""
    with pytest.raises(ValueError, match=r"^rows\[1\]\.fvu is NaN"):
        to_json({"rows": [{"fvu": 1.0}, {"fvu": math.nan}], "tau": math.inf})


def test_what_older_versions_wrote_is_read():
    """Up to 0.1 `--max_grad_norm inf` left a bare Infinity in training_log.json, which cards and atlases read."""
    assert from_json('{"max_grad_norm": Infinity}') == {"max_grad_norm": math.inf}


def json_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.json") if "tokenizer" not in path.name]


def test_infinite_settings_pass_every_door(checkpoint, clip_path, images_path, tmp_path, capsys):
    """`inf` is legal for a threshold, a quantile and a gradient norm. Each door must take it, and each file must stay
    JSON."""
    sae_folder = tmp_path / "sae"
    train = ["train", *source(clip_path, images_path), "--output_dir", sae_folder, "--top_k=8", "--max_steps=4"]
    run(capsys, *train, "--save_steps=2", "--max_grad_norm=inf", "--disable_tqdm", "--per_device_train_batch_size=64")
    run(capsys, *train, "--resume_from_checkpoint=latest", "--save_steps=2", "--max_grad_norm=inf", "--disable_tqdm",
        "--per_device_train_batch_size=64")  # fmt: skip
    sae = SAEModel.from_pretrained(sae_folder)
    sae.config.fvu_quantiles = {"0.3": 0.5, "0.8": math.inf, "0.99": math.inf}
    sae.config.gate = 0.9
    sae.save_pretrained(sae_folder)
    assert SAEModel.from_pretrained(sae_folder).fvu_threshold(0.9) == math.inf, "between two infinite quantiles"

    unlimited, out = ["--fvu_threshold", "inf"], tmp_path / "out"
    results = ["--output", sae_folder / "results.json", "--templates", "single", *unlimited]
    run(capsys, *with_checkpoint("evaluate", sae_folder, images_path), *results)
    (row,) = [row for row in read_json(sae_folder / "results.json")["rows"] if row["method"] == "vs2+gate"]
    assert row["tau"] == math.inf and row["coverage"] == 1
    run(
        capsys, *with_checkpoint("atlas", sae_folder, images_path), "--output", out / "atlas"
    )  # the SAE's own quantile
    assert read_json(out / "atlas" / "latents.json")["fvu_threshold"] == math.inf
    advice = ["--labels", "red", "blue", "--output", out / "r.json"]
    run(capsys, *with_checkpoint("recommend", sae_folder, images_path), *advice)
    image = images_path / "test" / "red" / "00.png"
    asked = [image, "--checkpoint", sae_folder, "--labels", "red", "blue", *unlimited, "--json", "--output"]
    (answer,) = strictly(run(capsys, "classify", *asked, out / "c.json"))
    assert answer["steered"] and strictly((out / "c.json").read_text()) == [answer]
    assert strictly(run(capsys, "explain", *asked, out / "e.png"))["steered"]
    assert EvaluationResult.from_json(sae_folder / "results.json").row("vs2+gate")["tau"] == math.inf
    assert "FVU up to inf" in str(create_model_card(sae_folder))

    model = VS2CLIPForZeroShot.from_pretrained(sae_folder)
    model.set_steering(fvu_threshold=math.inf)
    model.save_pretrained(tmp_path / "vs2")
    assert read_json(tmp_path / "vs2" / "config.json")["fvu_threshold"] == math.inf
    assert "every image is steered" in str(create_model_card(tmp_path / "vs2"))
    assert strictly(as_bytes(read_json(tmp_path / "vs2" / "config.json")).decode())["fvu_threshold"] == INFINITE
    classifier = zero_shot_classifier(tmp_path / "vs2")
    assert classifier.model.fvu_thresholds[2] == math.inf
    (found,) = classifier([str(image)], ["red", "blue"], return_details=True, fvu_threshold=math.inf)
    assert found["steered"]

    assert len(json_below(tmp_path)) > 8
    for path in json_below(tmp_path):
        strictly(path.read_text(encoding="utf-8"))
    for path in (out / "atlas" / "data").glob("*.js"):
        strictly(path.read_text(encoding="ascii").partition(", ")[2].removesuffix(");\n"))
