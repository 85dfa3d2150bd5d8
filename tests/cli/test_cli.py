"""The command line: the README's way from images to a steered CLIP works, and every mistake gets one line and status 2."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from commands import COLOURS, TRAIN, complaint, make_tokenizer, read_json, run, source, with_checkpoint
from PIL import Image
from transformers import CLIPImageProcessorPil

from hf_vs2 import ActivationStore, SAEConfig, SAEModel, VS2CLIPForZeroShot, __version__
from hf_vs2.cli import COMMANDS, main
from hf_vs2.cli.answers import Table
from hf_vs2.cli.commands import adapt as adapt_command
from hf_vs2.cli.commands import atlas as atlas_command
from hf_vs2.cli.commands import evaluate as evaluate_command
from hf_vs2.cli.parsing import Parser
from hf_vs2.data import images as data_images
from hf_vs2.data import load_images
from hf_vs2.data.stores.activations import extract_activations
from hf_vs2.evaluation.comparison import evaluate
from hf_vs2.evaluation.methods import evaluation_methods


REPOSITORY = Path(__file__).parents[2]


def parser_of(command: str) -> Parser:
    module = import_module(f"hf_vs2.cli.commands.{command}")
    parser = Parser(f"hf-vs2 {command}", module.USAGE, module.DESCRIPTION, module.EXAMPLES)
    module.add_flags(parser)
    return parser


# From images to a steered model


def test_train_leaves_a_calibrated_checkpoint_that_names_its_clip(checkpoint, clip_path, images_path):
    """The checkpoint must need nothing else: where the CLIP is, what the gate is, what it was trained on."""
    config = SAEModel.from_pretrained(checkpoint).config
    assert (config.hidden_size, config.num_latents, config.top_k, config.layer) == (32, 128, 8, 2)
    assert config.base_model_name_or_path == str(clip_path)
    assert config.fvu_quantiles and config.training_data["id"] == str(images_path)
    assert read_json(checkpoint / "training_log.json")["metrics"]["steps"] == 30
    assert VS2CLIPForZeroShot.from_pretrained(checkpoint).steering_settings.gate == config.gate


def test_train_again_uses_the_activations_that_are_there(
    checkpoint, clip_path, images_path, tmp_path, capsys, monkeypatch
):
    """Extraction takes most of the time: a second run with other settings must not read one image."""
    monkeypatch.setattr("hf_vs2.data.batches.open_image", lambda *_, **__: pytest.fail("an image was read"))
    cache = checkpoint / "activations"
    arguments = [*source(clip_path, images_path), "--output_dir", tmp_path, "--activations_dir", cache, *TRAIN]
    out = run(capsys, "train", *arguments, "--top_k", 4, "--activation", "absolute", "--seed", 1)
    assert str(cache) in out and f"hf-vs2 evaluate --checkpoint {tmp_path}" in out
    config = SAEConfig.from_pretrained(tmp_path)
    assert (config.top_k, config.activation, config.training_data["seed"]) == (4, "absolute", 1)


def test_a_relative_path_of_the_clip_still_works_from_elsewhere(clip_path, images_path, tmp_path, monkeypatch):
    """A checkpoint trained with `--model ./clip` is used from other folders later."""
    monkeypatch.chdir(clip_path.parent)
    arguments = ["--model", clip_path.name, "--dataset", str(images_path), "--split", "test"]
    assert main(["train", *arguments, "--output_dir", str(tmp_path), *TRAIN]) == 0
    monkeypatch.chdir(tmp_path)
    VS2CLIPForZeroShot.from_pretrained(tmp_path)


def test_extract_then_train_on_a_chosen_layer(clip_path, images_path, tmp_path, capsys):
    """Activations of several layers are extracted once; training on them needs neither the model nor the images."""
    flags = ["--layers", "-1", "-2", "--label_column", "label", "--disable_tqdm", "--dtype", "bfloat16"]
    run(capsys, "extract", *source(clip_path, images_path), *flags, "--output_dir", tmp_path / "rows")
    store = ActivationStore.open(tmp_path / "rows")
    assert (len(store), store.layers, store.class_names) == (120, [1, 2], sorted(COLOURS))
    given = ["--activations_dir", tmp_path / "rows", "--layer=-2", "--output_dir", tmp_path / "sae"]
    run(capsys, "train", *given, *TRAIN)
    assert SAEConfig.from_pretrained(tmp_path / "sae").layer == 1


def test_train_with_labels_and_say_so(clip_path, images_path, tmp_path, capsys):
    """PASS from the command line and from a file: the labels reach the loss, the checkpoint and its card say so; labels that are
    merely kept are not used."""
    cache = tmp_path / "rows"
    arguments = [*source(clip_path, images_path), "--activations_dir", cache, "--label_column", "label", *TRAIN]
    config = tmp_path / "pass.yaml"
    config.write_text("pass_weight: 0.8\nlabel_column: none\n", encoding="utf-8")
    run(capsys, "train", "--config", config, *arguments, "--output_dir", tmp_path / "pass")
    run(capsys, "train", *arguments, "--output_dir", tmp_path / "plain")
    run(capsys, "train", "--activations_dir", cache, *TRAIN, "--pass_weight", 2, "--output_dir", tmp_path / "two")
    recorded = [SAEConfig.from_pretrained(tmp_path / name).training_data for name in ("pass", "plain", "two")]
    weights = [data.get("label_loss", {}).get("weight") for data in recorded]
    assert weights == [0.8, None, 2.0]
    cards = [(tmp_path / name / "README.md").read_text(encoding="utf-8") for name in ("pass", "plain")]
    assert ["No labels were used" in card for card in cards] == [False, True]
    saes = [SAEModel.from_pretrained(tmp_path / name).W_enc for name in ("pass", "plain", "two")]
    assert not torch.equal(saes[0], saes[1]) and not torch.equal(saes[0], saes[2])


def test_train_on_the_activations_of_two_data_sets(clip_path, images_path, tmp_path, capsys):
    """One SAE for several domains: their rows are one set, and the checkpoint names each."""
    stores = [tmp_path / "train", tmp_path / "test"]
    for store in stores:
        run(capsys, "extract", *source(clip_path, images_path, store.name), "--output_dir", store, "--disable_tqdm")
    arguments = ["train", "--activations_dir", *stores, "--output_dir", tmp_path / "sae", *TRAIN]
    assert "label_loss needs labels, and the rows have none" in complaint(capsys, *arguments, "--pass_weight", 1)
    out = run(capsys, *arguments)
    assert all(str(store) in out for store in stores)
    data = SAEConfig.from_pretrained(tmp_path / "sae").training_data
    assert data["num_rows"] == 144 and [(part["split"], part["num_rows"]) for part in data["parts"]] == [
        ("train", 120),
        ("test", 24),
    ]


def test_evaluate_gives_the_figures_of_the_library(checkpoint, clip_path, images_path, tmp_path, capsys):
    """Printed table and result file must be those of `evaluate` on the same rows, with one prompt and with an ensemble."""
    out = run(capsys, *with_checkpoint("evaluate", checkpoint, images_path), "--gamma", 2, "--lambda", 1)
    result = read_json(checkpoint / "results.json")
    assert {(row["method"], row["prompts"]) for row in result["rows"]} == {
        (method, prompts) for method in evaluation_methods() for prompts in ("single", "ensemble")
    }
    assert "\nvs2+gate" in out and "\nprototypes" not in out
    assert str(checkpoint / "results.json") in out and str(checkpoint / "activations") in out

    model = VS2CLIPForZeroShot.from_pretrained(checkpoint)
    model.set_steering(gamma=2.0, lambda_=1.0)
    images = load_images(images_path, "test")
    rows = extract_activations(model.clip, images, tmp_path, label_column="label", progress=False)
    expected = evaluate(model, rows, None, None, make_tokenizer())
    for ours, theirs in zip(result["rows"], expected.rows, strict=True):
        assert ours | {"seconds": 0} == theirs | {"seconds": 0}


def test_evaluate_reuses_rows_for_other_prompts_and_references(checkpoint, images_path, tmp_path, capsys, monkeypatch):
    """Other templates, names, methods and gates cost seconds; the training rows serve as reference without being read again."""
    run(capsys, *with_checkpoint("evaluate", checkpoint, images_path))
    monkeypatch.setattr("hf_vs2.data.batches.open_image", lambda *_, **__: pytest.fail("an image was read"))
    templates, names = tmp_path / "templates.txt", tmp_path / "names.json"
    templates.write_text("a {} square.\na {} patch.\n", encoding="utf-8")
    names.write_text('{"red": "scarlet", "blue": "navy", "green": "lime"}', encoding="utf-8")
    flags = ["--method", "distribution_norm", "vs2+gate", "--gate", "0.5", "--reference_split", "train"]
    flags += ["--templates", templates, "--labels", names, "--output", tmp_path / "out" / "results.json"]
    run(capsys, *with_checkpoint("evaluate", checkpoint, images_path), *flags)
    result = read_json(tmp_path / "out" / "results.json")
    assert [row["method"] for row in result["rows"]] == ["clip", "vs2+gate", "distribution_norm"]
    assert result["meta"]["templates"] == {"custom": ["a {} square.", "a {} patch."]}
    assert result["per_class"]["class_names"] == ["scarlet", "navy", "lime"]
    assert result["rows"][2]["reference"] == "train" and result["rows"][1]["gate"] == 0.5


def test_results_lie_beside_the_checkpoint_that_they_are_of(tmp_path):
    """Two checkpoints in one folder wrote one results.json, and the second atlas showed the first one's table."""
    for name in ("k32", "k64"):
        (tmp_path / name).mkdir()
    args = Namespace(output=None, checkpoint=str(tmp_path), subfolder="k32")
    assert evaluate_command._result_path(args) == tmp_path / "k32" / "results.json"
    (tmp_path / "results.json").write_text("{}")
    assert atlas_command._beside(args, "results.json") is None
    assert "--overwrite" not in adapt_command._again(["adapt", "--overwrite-output-dir", "--seed", "1"])


def test_evaluate_wants_names_for_numbered_classes(checkpoint, images_path, tmp_path, capsys):
    """Labels without names make no prompts: said before the extraction, and `--labels` mends it."""
    images = load_images(images_path, "test")
    images.cast_column("label", datasets.Value("int64")).save_to_disk(tmp_path / "numbered")
    arguments = ["evaluate", "--checkpoint", checkpoint, "--dataset", tmp_path / "numbered", "--disable_tqdm"]
    arguments += ["--output", tmp_path / "results.json", "--activations_dir", tmp_path / "rows"]
    assert "--labels" in complaint(capsys, *arguments) and not (tmp_path / "rows").exists()
    run(capsys, *arguments, "--labels", *sorted(COLOURS))


def test_classify_gives_the_models_own_answer_beside_clips(checkpoint, images_path, tmp_path, capsys, monkeypatch):
    """Scores are the softmax of the full model's logits, steered and plain, for files and for folders."""
    file = images_path / "test" / "red" / "00.png"
    arguments = ["classify", file, images_path / "test" / "blue", "--checkpoint", checkpoint, "--labels", *COLOURS]
    printed = json.loads(
        run(capsys, *arguments, "--top_k", 2, "--json", "--batch_size", 4, "--output", tmp_path / "r.json")
    )
    assert printed == read_json(tmp_path / "r.json") and len(printed) == 9 and printed[0]["image"] == str(file)

    model = VS2CLIPForZeroShot.from_pretrained(checkpoint)
    processor = CLIPImageProcessorPil.from_pretrained(model.config.base_model_name_or_path)
    prompts = [f"a photo of a {name}." for name in COLOURS]
    inputs = make_tokenizer()(prompts, return_tensors="pt", padding=True)
    inputs |= processor(Image.open(file), return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs)
        with model.steering(enabled=False):
            plain = model(**inputs)
    logits = out.logits_per_image[0]
    score, label = logits.softmax(-1).max(0)
    assert printed[0]["predictions"][0] == {
        "label": list(COLOURS)[label],
        "score": pytest.approx(score.item(), abs=1e-5),
    }
    assert [item["label"] for item in printed[0]["predictions"]] == [list(COLOURS)[i] for i in logits.topk(2).indices]
    assert printed[0]["plain"][0]["score"] == pytest.approx(plain.logits_per_image.softmax(-1).max().item(), abs=1e-5)
    assert printed[0]["fvu"] == pytest.approx(out.fvu.item(), rel=1e-4) and printed[0]["steered"] is out.steered.item()
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*map(str, arguments)]) == 0
    table, summary = (text.splitlines() for text in capsys.readouterr())
    assert table[0].split()[:3] == ["image", "label", "score"] and table[2].startswith(os.path.join("blue", "00.png"))
    changed = sum(row["changed"] for row in printed)
    assert len(table) == 10 and sum(line.endswith("*") for line in table) == changed
    assert f"9 images: {changed} changed" in summary[1] and all(len(line) <= 80 for line in table + summary)
    further = run(capsys, *arguments, "--top_k", 2).splitlines()
    assert len(further) == 10 and all(len(line) <= 80 for line in further)
    for line, row in zip(further[1:], printed, strict=True):
        assert [item["label"] in line.split() for item in row["predictions"]] == [True, True]


def test_classify_by_other_methods(checkpoint, images_path, tmp_path, capsys):
    """The issue's promise to a practitioner: one flag, and what is said about each image is what that method knows."""
    arguments = ["classify", images_path / "test", "--checkpoint", checkpoint, "--labels", *COLOURS]
    found = json.loads(run(capsys, *arguments, "--method", "prototypes", "--json"))
    plain = json.loads(run(capsys, *arguments, "--method", "none", "--json"))
    assert [one["plain"] for one in found] == [one["predictions"] for one in plain]
    assert all(one["fvu"] is None and one["distance"] > 0 for one in found)
    assert [one["predictions"] for one in found] != [one["plain"] for one in found]
    assert "distance" in run(capsys, *arguments, "--method", "prototypes").splitlines()[0]
    assert "fvu_threshold=0.5" in complaint(capsys, *arguments, "--method", "prototypes", "--fvu_threshold", 0.5)

    # Rows of images may be left out of a checkpoint: then there is nothing to fit prototypes to.
    given = with_checkpoint("calibrate", checkpoint, images_path)
    assert "no rows" in run(capsys, *given, "--sketch_rows", 0, "--output_dir", tmp_path)
    arguments[3] = tmp_path
    assert "Use method='distribution_norm'" in complaint(capsys, *arguments, "--method", "prototypes")
    run(capsys, *arguments, "--method", "distribution_norm")
    assert "\nvs2 " in run(capsys, *with_checkpoint("evaluate", tmp_path, images_path), "--templates", "single")


def test_recommend_says_what_to_run(checkpoint, images_path, tmp_path, capsys):
    """It is told with its evidence, of labelled images too, and the file holds the same."""
    target = tmp_path / "advice.json"
    given = with_checkpoint("recommend", checkpoint, images_path)
    assert "--labels" in complaint(capsys, *given)
    out = run(capsys, *given, "--labels", *COLOURS, "--output", target)
    advice = read_json(target)
    assert out.startswith("Recommended: ") and str(target) in out and advice["candidates"] == []
    with_labels = run(capsys, *given, "--label_column", "label")
    assert "On 24 labelled images:" in with_labels and "| balanced_prototypes |" in with_labels


@pytest.mark.parametrize("kind", ["plain", "classes"])
def test_the_next_line_works_when_it_is_pasted(kind, clip_path, images_path, tmp_path, capsys):
    """From a folder of images, with a blank in its name, each command leads to one that works as it stands."""
    folder, sae = tmp_path / "my images", tmp_path / "sae"
    shutil.copytree(images_path / "test", folder)
    if kind == "plain":
        for file in list(folder.glob("*/*.png")):
            file.rename(folder / f"{file.parent.name}_{file.name}")
    out = run(capsys, "train", "--model", clip_path, "--dataset", folder, "--output_dir", sae, *TRAIN)
    followed = ["train"]
    labels = ["--labels", *COLOURS] if kind == "plain" else ["--label_column", "label"]
    while lines := [line for line in out.splitlines() if line.startswith(("First: hf-vs2 ", "Next: hf-vs2 "))]:
        outs = [run(capsys, *shlex.split(line.partition("hf-vs2 ")[2])) for line in lines]
        followed += [shlex.split(line)[2] for line in lines]
        out = outs[-1]
        if followed[-1] == "atlas":
            given = ["--checkpoint", sae, "--dataset", folder, *labels, "--disable_tqdm"]
            out = run(capsys, "recommend", *given)
    assert followed[-1] == "classify" and followed[1] == ("atlas" if kind == "plain" else "recommend")


@pytest.mark.parametrize("kind", ["sae", "light", "full"])
def test_a_recommendation_that_is_applied_is_used(kind, checkpoint, images_path, tmp_path, capsys, monkeypatch):
    """Whoever applies it need not repeat it: every command, the Space and Python read it from the checkpoint."""
    monkeypatch.chdir(tmp_path)  # where explain leaves its picture
    if kind == "sae":
        shutil.copytree(checkpoint, tmp_path / "own")
    else:
        VS2CLIPForZeroShot.from_pretrained(checkpoint).save_pretrained(tmp_path / "own", full=kind == "full")
    monkeypatch.setattr(
        "hf_vs2.evaluation.recommendation.decide", lambda evidence: ("balanced_prototypes", ["So it is."])
    )
    given = ["recommend", "--checkpoint", tmp_path / "own", "--dataset", images_path, "--split", "train"]
    given += ["--disable_tqdm", "--activations_dir", tmp_path / "rows", "--labels", *COLOURS]
    out = run(capsys, *given, "--apply")
    assert str(tmp_path / "own") in out
    assert VS2CLIPForZeroShot.from_pretrained(tmp_path / "own").steering_settings.method == "balanced_prototypes"
    image = images_path / "test" / "red" / "00.png"
    command = [image, "--checkpoint", tmp_path / "own", "--labels", *COLOURS, "--gate", "none"]
    asked = json.loads(run(capsys, "classify", *command, "--method", "balanced_prototypes", "--json"))
    assert json.loads(run(capsys, "classify", *command, "--json")) == asked
    assert "what no latent does" in run(capsys, "explain", *command)
    assert "no folder here" in complaint(
        capsys, *with_checkpoint("recommend", "user/sae", images_path), "--labels", "a", "b", "--apply"
    )


def test_explain_draws_and_says_what_moved_the_scores(checkpoint, images_path, tmp_path, capsys):
    """The picture must be there and show something, the table and the JSON must agree with the model, and edits must count."""
    pytest.importorskip("matplotlib")
    file = images_path / "test" / "red" / "00.png"
    (tmp_path / "words.txt").write_text("red\ngreen\nblue\n", encoding="utf-8")
    picture = tmp_path / "pictures" / "why.png"
    arguments = ["explain", file, "--checkpoint", checkpoint, "--labels", *COLOURS, "--gate", "none"]
    arguments += ["--output", picture, "--top_latents", 2]
    found = json.loads(run(capsys, *arguments, "--vocabulary", tmp_path / "words.txt", "--json"))
    model = VS2CLIPForZeroShot.from_pretrained(checkpoint, gate=None)
    (expected,) = model.explain(str(file), list(COLOURS), templates="single").to_dict(2)
    assert found["steered"] and found["fvu"] == pytest.approx(expected["fvu"])
    for one, other in zip(found["labels"], expected["labels"], strict=True):
        assert one["steered"] == pytest.approx(other["steered"], abs=1e-4)
        assert [latent["latent"] for latent in one["latents"]] == [latent["latent"] for latent in other["latents"]]
        assert all(latent["name"] in (*COLOURS, None) for latent in one["latents"])  # None: no nearer than chance
    steered = np.asarray(Image.open(picture).convert("RGB"))
    assert min(steered.shape[:2]) > 400 and len(np.unique(steered.reshape(-1, 3), axis=0)) > 100

    latent = found["labels"][0]["latents"][0]["latent"]
    out = run(capsys, *arguments, "--suppress", latent)
    assert str(picture) in out
    line = next(line for line in out.splitlines() if f"latent {latent} " in line)
    assert "-> 0.00" in line
    gated = run(capsys, *arguments[:-2], "--fvu_threshold", 0, "--gate", "none")
    assert "not steered" in gated and "normalisation" not in gated
    assert Image.open(picture).size[1] < len(steered), "the scores of an image left alone were taken apart"
    message = complaint(capsys, *arguments, "--output", tmp_path / "why.jpeg")
    assert "its suffix must be one of .png" in message and not (tmp_path / "why.jpeg").exists()


def test_explain_answers_in_a_base_install(checkpoint, images_path, tmp_path, capsys, monkeypatch):
    """`pip install .` brings no matplotlib; table and JSON need none. A picture that was asked for is refused first."""
    monkeypatch.chdir(tmp_path)
    arguments = ["explain", images_path / "test" / "red" / "00.png", "--checkpoint", checkpoint, "--labels", *COLOURS]
    assert json.loads(run(capsys, *arguments, "--json"))["picture"] is None
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("hf_vs2.cli.commands.explain.find_spec", lambda name: None)
    assert "probability" in run(capsys, *arguments)
    assert "pip install matplotlib" in complaint(
        capsys, *arguments[:2], "--checkpoint", "nowhere", *arguments[4:], "--output", "a.png"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_classify_continues_a_file_of_rows(suffix, checkpoint, images_path, tmp_path, capsys, monkeypatch):
    """Fifty thousand images take an hour: what is there is not computed again, in whatever state Ctrl-C left the file, and never
    mixed with answers of other settings."""
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    arguments = ["classify", images_path / "test", "--checkpoint", checkpoint, "--labels", 'red, "light"', "blue"]
    arguments += ["--top_k", 2, "--batch_size", 1]
    answers = json.loads(run(capsys, *arguments, "--json"))
    run(capsys, *arguments, "--output", whole)
    if suffix == ".jsonl":
        assert [json.loads(line) for line in whole.read_text(encoding="utf-8").splitlines()] == answers
    else:
        rows = datasets.Dataset.from_csv(str(whole), cache_dir=str(tmp_path / "cache")).to_list()
        for row, answer in zip(rows, answers, strict=True):
            assert (row["image"], row["label_2"]) == (answer["image"], answer["predictions"][1]["label"])
            assert row["fvu"] == pytest.approx(answer["fvu"], rel=1e-5)
            assert (row["steered"], row["changed"]) == tuple(
                "yes" if answer[name] else "no" for name in ("steered", "changed")
            )
    opened = []
    monkeypatch.setattr(
        "hf_vs2.data.inputs.open_image",
        lambda *one, **options: opened.append(one) or data_images.open_image(*one, **options),
    )

    def interrupted(self, name, answer, _lines=Table.lines):
        if len(opened) > 10 and len(cut.read_bytes().splitlines()) > 7:
            raise KeyboardInterrupt
        return _lines(self, name, answer)

    with monkeypatch.context() as patch:
        patch.setattr(Table, "lines", interrupted)
        assert main([*map(str, arguments), "--output", str(cut)]) == 130
    assert "run the same command again" in capsys.readouterr().err
    with cut.open("ab") as file:
        file.write(whole.read_bytes().splitlines(keepends=True)[-1][:-9])  # as if killed while it wrote
    before = len(opened)
    assert main([*map(str, arguments), "--output", str(cut)]) == 0
    counted = capsys.readouterr().err
    assert cut.read_bytes() == whole.read_bytes() and len(opened) - before < 24 <= len(opened)
    assert "24 images: " in counted and "from an earlier run" in counted
    for other in (["--method", "none"], ["--labels", "red", "green"], ["--names_as_given"]):
        assert f"{cut} holds rows made with other settings" in complaint(capsys, *arguments, "--output", cut, *other)
    cut.write_bytes(cut.read_bytes()[3:])
    assert f"{cut} is damaged: row 1 is none" in complaint(capsys, *arguments, "--output", cut)
    (tmp_path / f"cut{suffix}.settings.json").unlink()
    assert "not beside it" in complaint(capsys, *arguments, "--output", cut)


def test_calibrate_changes_the_gate_and_nothing_else(checkpoint, images_path, tmp_path, capsys):
    """Into another folder, and without `--output_dir` in the checkpoint itself: the thresholds are those of the new images;
    weights stay bit for bit, and so does a text that somebody wrote into the card."""
    own = shutil.copytree(checkpoint, tmp_path / "own", ignore=shutil.ignore_patterns("activations"))
    with (own / "README.md").open("a", encoding="utf-8") as card:
        card.write("\nWritten by hand.\n")
    weights, before = (own / "model.safetensors").read_bytes(), SAEModel.from_pretrained(own)
    for more in (["--output_dir", tmp_path / "other"], []):
        run(capsys, *with_checkpoint("calibrate", own, images_path), *more)
    for folder in (own, tmp_path / "other"):
        after = SAEModel.from_pretrained(folder)
        assert after.config.num_calibration_rows == 24 and before.config.fvu_quantiles != after.config.fvu_quantiles
        assert before.config.base_model_fingerprint == after.config.base_model_fingerprint
        assert all(torch.equal(before.state_dict()[name], tensor) for name, tensor in after.state_dict().items())
    assert (own / "model.safetensors").read_bytes() == weights
    assert "Written by hand." in (own / "README.md").read_text(encoding="utf-8")


# Configuration files


def test_config_file_gives_flags_and_the_command_line_wins(checkpoint, clip_path, images_path, tmp_path):
    """Everything but what is varied can live in one file; numbers, switches and empty values read as on the command line."""
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {clip_path}\ndataset: {images_path}\nsplit: train\noutput_dir: {tmp_path / 'wrong'}\n"
        f"activations_dir: {checkpoint / 'activations'}\nlearning-rate: 5e-4\ntop_k: 8\nmixed_precision: no\nlayer: -1\n"
        "max_steps: 7\nnum_train_epochs:\nper_device_train_batch_size: 64\ndisable_tqdm: true\nstreaming: false\n",
        encoding="utf-8",
    )
    output = tmp_path / "sae"
    flags = ["--output_dir", str(output), "--top-k", "4", "--num_train_epochs=1"]
    assert main(["train", "--config", str(config), *flags]) == 0
    log = read_json(output / "training_log.json")
    assert SAEConfig.from_pretrained(output).top_k == 4
    assert (log["args"]["learning_rate"], log["args"]["mixed_precision"]) == (5e-4, "no")
    assert (log["args"]["max_steps"], log["args"]["num_train_epochs"]) == (None, 1.0), (
        "the file's max_steps is outdone"
    )
    assert not (tmp_path / "wrong").exists()


# Mistakes: those in the command line itself are in test_checked_first.py


def test_debug_shows_where_an_error_comes_from(capsys):
    assert main(["train", "--output_dir", "o", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys, monkeypatch):
    """Each flag has a help text that fits a terminal of 80 columns, and each example is a command line that is understood."""
    monkeypatch.setenv("COLUMNS", "80")
    out = run(capsys, command, "--help")
    assert out.startswith(f"usage: hf-vs2 {command} ") and all(len(line) <= 80 for line in out.splitlines())
    parser = parser_of(command)
    assert all(action.help for action in parser.flags.values())
    monkeypatch.chdir(REPOSITORY)
    examples = [line.strip() for line in parser.epilog.replace("\\\n", " ").splitlines() if "hf-vs2 " in line]
    assert examples
    for example in examples:
        parser.parse(shlex.split(example)[2:])


def test_help_and_version_of_the_program(capsys):
    out = run(capsys, "--help")
    assert all(f"  {command} " in out for command in COMMANDS) and all(len(line) <= 80 for line in out.splitlines())
    assert run(capsys, "--version") == f"hf_vs2 {__version__}\n"


# The installed program

HEAVY = {"torch", "transformers", "datasets", "accelerate", "huggingface_hub", "numpy", "PIL"}


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def imported_by(*program: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """What Python says when it runs a program, and the names of the modules that were imported meanwhile."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *program], capture_output=True, text=True, env=environment(), check=False
    )
    lines = result.stderr.splitlines()
    modules = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    result.stderr = "\n".join(line for line in lines if not line.startswith("import time:"))
    assert "hf_vs2.cli" in modules
    return result, modules


@pytest.fixture
def program(tmp_path) -> str:
    """The script that pip writes for `hf-vs2`."""
    path = tmp_path / "hf-vs2"
    path.write_text("import sys\nfrom hf_vs2.cli import main\nsys.exit(main())\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_help_comes_without_torch(arguments, program, capsys):
    """Nobody waits for torch and transformers to be imported in order to read which flags there are."""
    result, modules = imported_by(program, *arguments)
    assert (result.returncode, result.stderr, result.stdout) == (0, "", run(capsys, *arguments))
    assert not HEAVY & modules


@pytest.mark.parametrize(
    ("arguments", "expected"), [(["trian"], "did you mean train?"), (["train", "--top_k", "x"], "invalid int value")]
)
def test_a_misspelt_command_line_is_refused_at_once(arguments, expected):
    """A typo costs no wait either, started as a module too."""
    result, modules = imported_by("-m", "hf_vs2.cli", *arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert expected in result.stderr and len(result.stderr.splitlines()) == 1
    assert not HEAVY & modules
