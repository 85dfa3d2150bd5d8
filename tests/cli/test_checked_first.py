"""What can't work is refused before the first image is read, in one line that names it: hours of extraction are lost otherwise."""

import os
import shutil

import pytest
from commands import TRAIN, complaint, source, with_checkpoint

from hf_vs2.cli import main
from hf_vs2.data.registry import dataset_info
from hf_vs2.files.sharing.card_edits import Card, CardError
from hf_vs2.files.yaml_files import read_yaml
from hf_vs2.study import StudyConfig
from hf_vs2.training.trackers import check_tracker


WRONG_LINES = [
    ("", "name a command: demo, adapt, extract"),
    ("trian", "there is no command 'trian'; did you mean train?"),
    ("--verbose", "unknown argument --verbose"),
    ("train", "required: --output_dir"),
    ("train --output_dir o", "give --model and --dataset, or --activations_dir"),
    ("train --output_dir o --lerning_rate 1", "did you mean --learning_rate?"),
    ("train --output_dir o --top_k x", "--top_k: invalid int value: 'x'"),
    ("train --output_dir o --seed x", "--seed: invalid int value: 'x'"),
    ("train --output_dir o --max_steps 0", "--max_steps must be a whole number from 1"),
    ("train --output_dir o --max_steps 1 --num_train_epochs 1", "give one of them"),
    ("train --output_dir o --config none.yaml", "none.yaml"),
    ("train --output_dir o --max_step 1", "unknown argument --max_step"),
    ("train --output_dir o --activations_dir a --label_column c", "column of --dataset"),
    ("train --output_dir o --model m --dataset d --pass_weight 1", "with --label_column"),
    ("train --output_dir o --activations_dir a --pass_weight -1", "at least 0), not -1.0"),
    ("train --output_dir o --model m --dataset d --activations_dir a b", "one cache root"),
    ("extract --model m", "required: --dataset, --output_dir"),
    ("extract --on_error ignore", "invalid choice: 'ignore'"),
    ("classify --labels a --checkpoint c", "required: IMAGE"),
    ("classify a.jpg --labels a --checkpoint c --top_k 0", "--top_k must be a whole number from 1"),
    ("classify a.jpg --labels a --checkpoint c --gate high", "--gate"),
    ("explain a.jpg --labels a --checkpoint c --top_latents 0", "--top_latents must be a whole number from 1"),
    ("explain a.jpg --labels a --checkpoint c --set 3", "must be LATENT=NUMBER"),
    ("explain a.jpg --labels a --checkpoint c --suppress 3 --amplify 3=2", "two edits"),
    ("explain a.jpg --labels a --checkpoint c --names n --vocabulary v", "exclude each other"),
    ("evaluate --checkpoint c --dataset d --method vs3", "'vs3' is no row of a comparison"),
    ("calibrate --checkpoint user/sae --dataset d", "--output_dir"),
]


def test_a_wrong_command_line_gets_one_line(capsys, tmp_path, monkeypatch):
    """No traceback and no page of usage: what is wrong, and what to do; nothing is written before the line is
    understood."""
    monkeypatch.chdir(tmp_path)
    for line, message in WRONG_LINES:
        assert message in complaint(capsys, *line.split()), line
        assert not list(tmp_path.iterdir()), line


WRONG_CONFIGS = [
    ("lerning_rate: 1", "unknown key 'lerning_rate'; did you mean learning_rate?"),
    ("top_k: many", "top_k: 'many' is not a value"),
    ("top_k: [1, 2]", "expected one value, not a list"),
    ("top_k: {a: 1}", "expected a value"),
    ("disable_tqdm: 3", "expected true or false"),
    ("activation: gelu", "invalid choice: 'gelu'"),
    ("just words", "must hold one `flag: value` a line"),
    ("a: b: c", "is not a YAML file"),
]


def test_mistakes_in_a_config_file_are_named(tmp_path, capsys):
    """A key that is silently ignored costs a training run."""
    for text, message in WRONG_CONFIGS:
        (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
        line = ["--config", tmp_path / "c.yaml", "--model", "m", "--dataset", "d", "--output_dir", tmp_path]
        assert message in complaint(capsys, "train", *line), text[:20]


# With a CLIP, images and a checkpoint that are there: {file} is a file, {folder} a folder, {clip} the CLIP.
REFUSED = {
    "train": [
        ("--model {folder}/no-model", "no-model"),
        ("--model {checkpoint}", "expected a CLIP"),
        ("--dataset {folder}/no-data", "no-data"),
        ("--split dev", "no split 'dev'"),
        ("--image_column img", "no column 'img'; it has image, label"),
        ("--label_column class", "no column 'class'; it has image, label"),
        ("--layer 7", "layer=7 does not exist"),
        ("--layer -9", "layer"),
        ("--top_k 100000", "top_k=100000"),
        ("--report_to nothing", "report_to='nothing' is not known"),
        ("--report_to tensorbord", "report_to='tensorbord' is not known; did you mean 'tensorboard'"),
        ("--report_to clearml", "not installed"),
        ("--seed -1", "--seed must be a whole number from 0"),
        ("--mixed_precision bf-16", "did you mean 'bf16'"),
        ("--mixed_precision fp16", "needs a GPU"),
        ("--resume_from_checkpoint nowhere", "there is no such folder"),
        ("--resume_from_checkpoint latest", "holds no checkpoint-"),
        ("--learning_rate inf", "--learning_rate must be a finite number"),
        ("--num_workers -1", "--num_workers must be a whole number"),
        ("--batch_size 2147483648", "--batch_size must be a whole number from 1 to"),
        ("--activations_dir {file}", "it is a file): give another place with --activations_dir"),
        ("--output_dir {file}", "it is a file): give another place with --output_dir"),
        ("--output_dir {file}/sae", "is a file): give another place with --output_dir"),
        ("--pass_weight nan --label_column label", "--pass_weight must be a finite number"),
    ],
    "evaluate": [
        ("--label_column class", "no column 'class'"),
        ("--subfolder sea", "There is no folder"),
        ("--gate 2", "--gate must be a quantile above 0 and below 1, or none, not 2.0"),
        ("--gate 0.5 --fvu_threshold 1", "exclude each other"),
        ("--labels a b", "no label for blue, green, red"),
        ("--output {folder}", "it is a folder): give another place with --output"),
        ("--output {file}/x.json", "is a file): give another place with --output"),
        ("--activations_dir {file}", "give another place with --activations_dir"),
        ("--reference_split dev", "no split 'dev'"),
        ("--reference_dataset {folder}/none", "none"),
        ("--gamma nan", "--gamma must be a finite number"),
        ("--fvu_threshold -1", "--fvu_threshold must be a number (at least 0)"),
        ("--dataset {folder}/twins --split train", "the names 'Cat' and 'cat' are one to this CLIP"),
        ("--dataset {folder}/hidden --split train --labels a b", "Images have no label in column 'label'"),
        ("--dataset {folder}/lists --split train --labels a b", "Column 'label' holds List"),
    ],
    "calibrate": [
        ("--split train", "trained on"),
        ("--output_dir {clip}", "holds a model of type 'clip', which is kept: give another place with --output_dir"),
    ],
    "atlas": [
        ("--results {folder}/none.json", "none.json"),
        ("--results {file}", "is not a result file"),
        ("--vocabulary {folder}/none.txt", "none.txt"),
    ],
    "explain": [("--names {folder}/none.json", "none.json"), ("--names {file}", "is not a JSON file")],
}


@pytest.mark.parametrize("command", REFUSED)
def test_a_request_that_cannot_be_met_gets_one_line(
    command, checkpoint, clip_path, images_path, tmp_path, capsys, monkeypatch
):
    """The library's own messages reach the user whole, before the first image is read."""
    (tmp_path / "file").touch()
    for name, text in {
        "twins/metadata.csv": "file_name,label\n1.png,Cat\n2.png,cat\n",
        "hidden/metadata.csv": "file_name,label\n1.png,1\n2.png,\n",
        "lists/metadata.jsonl": '{"file_name": "1.png", "label": ["a", "b"]}\n',
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
        (tmp_path / name).with_name("1.png").touch()
    places = {"file": tmp_path / "file", "folder": tmp_path, "checkpoint": checkpoint, "clip": clip_path}
    start = with_checkpoint(command, checkpoint, images_path)
    if command == "train":
        start = ["train", *source(clip_path, images_path), *TRAIN, "--output_dir", tmp_path / "sae"]
    elif command == "explain":
        start = ["explain", "photo.jpg", "--checkpoint", checkpoint, "--labels", "red", "blue"]
    elif command in ("evaluate", "atlas"):
        start += ["--activations_dir", tmp_path] + (["--output", tmp_path / "atlas"] if command == "atlas" else [])
    if command != "calibrate":
        for module in ("batches", "images"):
            monkeypatch.setattr(f"hf_vs2.data.{module}.open_image", lambda *_, **__: pytest.fail("an image was read"))
    for flags, message in REFUSED[command]:
        if "fp16" in flags and os.environ.get("CUDA_VISIBLE_DEVICES", "") != "":  # there is a GPU
            continue
        assert message in complaint(capsys, *start, *flags.format(**places).split()), flags
    assert not (tmp_path / "sae" / "activations").exists()


@pytest.mark.parametrize(
    ("command", "place", "flag"),
    [("calibrate", "", "--output_dir"), ("evaluate", "results.json", "--output"), ("explain", "", "--output")],
)
def test_a_default_place_that_is_write_protected_is_refused_first(
    command, place, flag, checkpoint, images_path, tmp_path, capsys, monkeypatch, no_image
):
    """Somebody else's checkpoint, or a read-only folder to work in: hours of extraction would end in nothing."""
    monkeypatch.chdir(tmp_path)
    access = os.access  # tests may run as root, who may write anywhere
    locked = (str(checkpoint), str(tmp_path))
    monkeypatch.setattr(
        os, "access", lambda path, mode: not (mode & os.W_OK and str(path) in locked) and access(path, mode)
    )
    line = [*with_checkpoint(command, checkpoint, images_path), "--activations_dir", tmp_path.parent / "rows"]
    if command == "explain":
        line = ["explain", "photo.jpg", "--checkpoint", checkpoint, "--labels", "red", "blue"]
    where = "explanation.png" if command == "explain" else checkpoint / place
    assert complaint(capsys, *line).startswith(f"{where} can't be written to (")
    assert complaint(capsys, *line).endswith(f"give another place with {flag}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("encoders: [{id: a/b, path: nowhere}]", "nowhere"),
        ("sae: {top_k: 100000}", "top_k=100000"),
        ("ablations: {top_k: [8, 100000]}", "top_k=100000"),
        ("ablations: {top_kk: 3}", "ablations has no setting 'top_kk'; did you mean 'top_k'"),
        ("methods: [clip, vs2_last3]", "3 can't be steered"),
        ("datasets: [{name: x, path: nowhere}]", "nowhere"),
        ("output_dir: FILE", "it is a file): give another place with --output_dir"),
        ("seeds: [1]\nseeds: [2]", "'seeds' stands twice, in lines"),
        ("sae: {learning_rate: 5e-400}", "sae.learning_rate must be"),
    ],
)
def test_study(clip_path, images_path, tmp_path, capsys, monkeypatch, no_image, change, message):
    """Also of an encoder with two layers: the third from the end is not there."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip_path)
    model.vision_model.encoder.layers = model.vision_model.encoder.layers[:2]
    model.config.vision_config.num_hidden_layers = 2
    model.save_pretrained(shutil.copytree(clip_path, tmp_path / "clip"))
    (tmp_path / "FILE").touch()
    monkeypatch.chdir(tmp_path)
    lines = {
        "output_dir": "output_dir: out",
        "encoders": "encoders: [{id: a/b, path: clip}]",
        "datasets": f"datasets: [{{name: colours, path: {images_path}}}]",
        "methods": "methods: [clip, vs2]",
    }
    lines.pop(change.partition(":")[0], None)
    (tmp_path / "study.yaml").write_text("\n".join([*lines.values(), change]))
    assert message in complaint(capsys, "study", "study.yaml", "--no_figures", "--disable_tqdm")
    assert not (tmp_path / "out").exists()


def bomb(levels=9):
    lines = ["- &l0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"- &l{one} [{', '.join([f'*l{one - 1}'] * 9)}]" for one in range(1, levels)]
    return "\n".join(lines)


HOSTILE = {
    "aliases of aliases": (f"methods:\n{bomb()}", "stands for more than"),
    "merges of merges": (
        "a: &m0 {b: 1}\n" + "".join(f"c{i}: &m{i + 1} {{<<: [{', '.join([f'*m{i}'] * 40)}]}}\n" for i in range(6)),
        "more than",
    ),
    "itself": ("datasets: &a [*a]", "holds itself"),
    "too deep": ("datasets: " + "[" * 600, "nested too deeply"),
    "long number": ("seeds: [" + "9" * 5000 + "]", "a number of 5,000 letters"),
    "hexadecimal": ("seeds: [0x" + "f" * 5000 + "]", "a number of 5,002 letters"),
    "a key twice": ("seeds: 1\nviews: 2\nseeds: 3", "'seeds' stands twice, in lines 1 and 3"),
    "a key twice inside": ("sae: {top_k: 1, top_k: 2}", "'top_k' stands twice"),
    "an object": ("seeds: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    "too large": ("x: " + "y" * 2_000_000, "more than the 1,000,000"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_every_yaml_door_is_bounded_and_takes_no_key_twice(name, tmp_path):
    """A few hundred bytes grew to gigabytes; of a key that stands twice the last counted without a word."""
    text, message = HOSTILE[name]
    file = tmp_path / "x.yaml"
    file.write_text(text)
    for read in (StudyConfig.from_yaml, lambda path: dataset_info(str(path))):
        with pytest.raises(ValueError, match=message) as caught:
            read(file)
        assert str(file) in str(caught.value) and len(str(caught.value)) < 1000
    with pytest.raises(CardError, match=message):
        Card.parse(f"---\n{text}\n---\n# x")
    if "number" not in message and "constructor" not in message:
        assert main(["train", "--config", str(file), "--output_dir", str(tmp_path / "o")]) == 2


def test_ordinary_yaml_reads_as_before():
    """Anchors and merges are how people share settings; 5e-4 is a number."""
    text = "base: &b {top_k: 8, learning_rate: 5e-4}\nsae:\n  <<: *b\n  top_k: 16\nname: 1e\nlist: [*b, *b]"
    found = read_yaml(text, "x")
    assert found["sae"] == {"top_k": 16, "learning_rate": 5e-4} and found["name"] == "1e" and len(found["list"]) == 2
    assert read_yaml("top_k: 8\nprecision: no", "x", as_text=True) == {"top_k": "8", "precision": "no"}
    assert read_yaml("", "x") is None


def test_a_tracker_is_there_and_logged_in(tmp_path, monkeypatch):
    """wandb asks for a key when the training begins, hours later."""
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["wandb", "tensorboard"])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    check_tracker("tensorboard")
    for name in ("wandb", "all"):
        with pytest.raises(ValueError, match="wandb is not logged in. Run `wandb login`"):
            check_tracker(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_tracker("all")
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    check_tracker("wandb")
