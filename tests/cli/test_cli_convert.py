"""`hf-vs2 convert`: from another library's files to a steered CLIP with a gate, and out again, by the command line alone."""

import json

import pytest
import torch
from commands import complaint, run
from foreign_saes import LATENTS, assert_same, dense, reference, weights, write
from toy import clip_like_rows, make_sae

from hf_vs2 import SAEModel


def test_from_a_strangers_sae_to_a_gate(tmp_path, capsys, clip_path, images_path):
    """convert, calibrate, classify: what a user of a downloaded SAE does. The mean that calibration measures must be saved, too."""
    theirs, ours = write(tmp_path / "layers.2", "sparsify", {"d_in": 32}, weights(width=32)), tmp_path / "sae"
    convert = ["convert", theirs, "--base_model", clip_path, "--output_dir"]
    assert "holds a model of type 'clip', which is kept" in complaint(capsys, *convert, clip_path)
    out = run(capsys, *convert, ours)
    assert f"32 inputs, {LATENTS} latents, top_k 12, relu" in out and str(ours) in out
    converted = SAEModel.from_pretrained(ours)
    assert converted.config.base_model_name_or_path == str(clip_path) and converted.config.layer == 2
    assert torch.equal(converted.mean, converted.b_pre)
    picture = next(images_path.rglob("*.png"))
    asked = ["classify", picture, "--checkpoint", ours, "--labels", "red", "blue", "--gate=0.9"]
    assert "Calibrate it" in complaint(capsys, *asked)

    run(capsys, "calibrate", "--checkpoint", ours, "--dataset", images_path, "--split", "train", "--disable_tqdm")
    calibrated = SAEModel.from_pretrained(ours)
    assert not torch.equal(calibrated.mean, converted.mean) and calibrated.config.total_variance > 0
    assert torch.equal(calibrated.W_dec, converted.W_dec)
    (answer,) = json.loads(run(capsys, *asked, "--json"))
    assert answer["image"].endswith(".png")
    rows = clip_like_rows(100, 32)
    assert_same(dense(calibrated, rows), reference(rows, weights(width=32)))


@pytest.mark.parametrize("target", ["sparsify", "sae_lens"])
def test_out_to_another_library_and_between_two(tmp_path, capsys, target):
    """Ours to theirs, theirs to the other's: the weights stay, bit for bit."""
    sae, rows = make_sae(layer=3), clip_like_rows(50, 16)
    sae.save_pretrained(tmp_path / "ours")
    run(capsys, "convert", tmp_path / "ours", "--to", target, "--output", tmp_path / "layers.3")
    other = {"sparsify": "sae_lens", "sae_lens": "sparsify"}[target]
    run(capsys, "convert", tmp_path / "layers.3", "--to", other, "--output_dir", tmp_path / "other")
    run(capsys, "convert", tmp_path / "other", "--from", other, "--output_dir", tmp_path / "again")
    again = SAEModel.from_pretrained(tmp_path / "again")
    assert torch.equal(dense(again, rows)[1], dense(sae, rows)[1])
    assert "config.json" not in {path.name for path in (tmp_path / "layers.3").iterdir()}


def test_what_cannot_be_is_said_in_one_line(tmp_path, capsys):
    """Wrong format, nothing to do, options that would be passed over: nothing is written then."""
    gated, target = write(tmp_path / "gated", "sae_lens", {"architecture": "gated"}), tmp_path / "out"
    assert "architecture='gated'" in complaint(capsys, "convert", gated, "--output_dir", target)
    assert "sae.safetensors" in complaint(capsys, "convert", gated, "--from", "sparsify", "--output_dir", target)
    make_sae().save_pretrained(tmp_path / "ours")
    assert "is of hf_vs2 already" in complaint(capsys, "convert", tmp_path / "ours", "--output_dir", target)
    message = complaint(capsys, "convert", tmp_path / "ours", "--layer=3", "--to", "sparsify", "--output_dir", target)
    assert "--layer is not for a checkpoint of hf_vs2" in message
    (tmp_path / "empty").mkdir()
    message = complaint(capsys, "convert", tmp_path / "empty", "--output_dir", target)
    assert "no format that is known" in message and "--from sparsify" in message
    assert not target.exists()
