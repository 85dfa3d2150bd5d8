"""A training folder: the same training goes on or is finished, another one is never written over unless that is asked for."""

import json
import shutil

import pytest
import torch
from commands import TRAIN, source
from toy import sparse_rows
from trainings import make_trainer

from hf_vs2 import SAEModel
from hf_vs2.cli import main
from hf_vs2.files.digests import file_digest


STEPS = {"max_steps": 8, "save_steps": 4, "logging_steps": 4}


@pytest.fixture(scope="module")
def rows():
    return sparse_rows(600)


@pytest.fixture(scope="module")
def finished(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "sae"
    make_trainer(folder, rows, **STEPS).train()
    return folder


@pytest.fixture()
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "sae")


def stop_at(trainer, step):
    """Ctrl-C when a training has come so far."""
    batch, taken = trainer._batch, iter(range(100))

    def interrupted(part):
        if next(taken) == step:
            raise KeyboardInterrupt
        return batch(part)

    trainer._batch = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def weights(folder):
    return file_digest(folder / "model.safetensors")


def test_the_same_training_again_says_that_it_is_finished(rows, folder, caplog):
    """Figures and model are those that are there; nothing is computed or written, and what a kill left beside it
    goes."""
    leftover = folder / ".training_log.json.0a1b2c3d.tmp"
    leftover.mkdir()
    before = {
        path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and "lock" not in path.name
    }
    trainer = make_trainer(folder, rows, **STEPS)
    metrics = trainer.train()
    assert "finished: there is nothing to do" in caplog.text
    assert metrics == json.loads((folder / "training_log.json").read_text())["metrics"]
    assert torch.equal(trainer.model.W_enc, SAEModel.from_pretrained(folder).W_enc)
    assert before == {path: path.stat().st_mtime_ns for path in before} and not leftover.exists()


@pytest.mark.parametrize("step", [2, 6])
def test_the_same_training_goes_on_after_ctrl_c(rows, finished, tmp_path, step):
    """Before the first training checkpoint, and after it: the end, and the log, are those of a run that was never interrupted.
    Kills at any moment: tests/survival/test_survives_kills.py."""
    folder = tmp_path / "sae"
    stop_at(make_trainer(folder, rows, **STEPS), step)
    assert not (folder / "config.json").exists(), "nothing may look like a finished SAE"
    make_trainer(folder, rows, **STEPS).train()
    assert weights(folder) == weights(finished)
    logs = [json.loads((one / "training_log.json").read_text())["log"] for one in (folder, finished)]
    assert logs[0] == logs[1] and len(logs[0]) == 2
    assert (
        SAEModel.from_pretrained(folder).config.fvu_quantiles
        == SAEModel.from_pretrained(finished).config.fvu_quantiles
    )


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "training_log.json").unlink(), None),  # its checkpoint tells the same
        (lambda folder: (folder / "training_log.json").write_text("{"), None),
        (
            lambda folder: [shutil.rmtree(folder / "checkpoint-4"), (folder / "training_log.json").unlink()],
            "SAE of another",
        ),
        (lambda folder: (folder / "config.json").unlink(), None),
        (lambda folder: (folder / "model.safetensors").unlink(), None),
    ],
)
def test_what_is_lost_is_made_again_and_what_is_not_known_is_kept(rows, finished, folder, harm, message):
    """A downloaded SAE has no log: whether it is of this training nobody can tell."""
    harm(folder)
    trainer = make_trainer(folder, rows, **STEPS)
    if message is None:
        trainer.train()
    else:
        with pytest.raises(ValueError, match=message):
            trainer.train()
    assert weights(folder) == weights(finished)


def test_another_training_takes_the_place_only_when_told(rows, finished, folder):
    """Other settings, other rows, another model to start from: refused, naming what differs; with overwrite_output_dir the old SAE
    stays until the new one is there, and an interrupted one goes on, told again or not."""
    start = SAEModel.from_pretrained(finished)
    for change, what in (
        ({"learning_rate": 1e-4}, "learning_rate=0.003, now it is 0.0001"),
        ({"sketch_rows": 0}, "sketch_rows=4096, now it is 0"),
        ({"model": start}, "start=None"),
        ({"rows": sparse_rows(600, seed=3)}, "total_variance="),
        ({"seed": 1}, "seed=42, now it is 1"),
        ({"max_steps": 40}, "steps=8, now it is 40"),
        ({"warmup_ratio": 0.5}, "warmup_ratio=0.05, now it is 0.5"),
        ({"per_device_train_batch_size": 32}, "global_batch_size=64, now it is 32"),
        ({"dead_latent_threshold": 9}, "dead_latent_threshold=8, now it is 9"),
        ({"calibration_share": 0.15}, "calibration_share=0.05, now it is 0.15"),
        ({"config": {"top_k": 4}}, "top_k=3, now it is 4"),
        ({"config": {"num_latents": 100}}, "num_latents=96, now it is 100"),
        ({"config": {"activation": "absolute"}}, "activation=relu, now it is absolute"),
    ):
        for resume in (None, "latest"):
            settings = {"rows": rows, "resume_from_checkpoint": resume, **STEPS, **change}
            with pytest.raises(ValueError, match=f"holds the SAE of another training .*{what}.*another output_dir"):
                make_trainer(folder, **settings).train()
    assert weights(folder) == weights(finished) and (folder / "checkpoint-4").is_dir()

    settings = {**STEPS, "learning_rate": 1e-4}
    stop_at(make_trainer(folder, rows, **settings, overwrite_output_dir=True), 2)
    assert weights(folder) == weights(finished) and not (folder / "checkpoint-4").exists()
    stop_at(make_trainer(folder, rows, **settings, overwrite_output_dir=True), 6)
    assert (folder / "checkpoint-4").is_dir()
    make_trainer(folder, rows, **settings).train()
    make_trainer(folder.with_name("alone"), rows, **settings).train()
    assert weights(folder) == weights(folder.with_name("alone")) != weights(finished)


def test_a_finished_training_is_done_again_when_told(rows, finished, folder):
    """And meanwhile it counts as one that is not finished."""
    stop_at(make_trainer(folder, rows, **STEPS, overwrite_output_dir=True), 2)
    assert json.loads((folder / "training_log.json").read_text())["metrics"] is None
    make_trainer(folder, rows, **STEPS).train()
    assert weights(folder) == weights(finished)


def test_train_refuses_another_folder_before_the_first_image(
    checkpoint, clip_path, images_path, capsys, caplog, monkeypatch, tmp_path
):
    """An SAE with other settings, a CLIP, a downloaded SAE in output_dir; the same command again is done in a moment."""
    arguments = ["train", *source(clip_path, images_path), *TRAIN, "--output_dir"]
    assert main([*arguments, str(checkpoint)]) == 0
    assert "nothing to do" in caplog.text
    monkeypatch.setattr("hf_vs2.data.batches.open_image", lambda *_, **__: pytest.fail("an image was read"))
    for folder, change in ((checkpoint, ["--top_k", "4"]), (clip_path, [])):
        assert main([*arguments, str(folder), *change, "--activations_dir", str(tmp_path)]) == 2
        message = capsys.readouterr().err
        assert f"{folder} holds" in message and "overwrite_output_dir" in message
