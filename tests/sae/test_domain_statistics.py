"""`statistics.safetensors`: comes back as it was, goes with the SAE, and is refused where it can't belong. How it can be damaged
stands in tests/survival/test_every_damage.py."""

import copy
import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from toy import make_rows, make_sae

from hf_vs2 import SAEModel, calibrate, measure_statistics
from hf_vs2.files.checkpoint_folder import CheckpointFolder


NAME = "statistics.safetensors"
TENSORS = ("mean", "components", "variances", "latent_mean", "latent_frequency", "rows", "image_mean")


def measured(sae, seed=0, **options):
    rows = make_rows(120, sae.config.hidden_size, seed=seed)
    return measure_statistics(sae, rows, torch.arange(100), torch.arange(100, 120), **options)


def with_statistics(**config):
    sae = make_sae(**config)
    calibrate(sae, make_rows(200, sae.config.hidden_size))
    sae.set_domain_statistics(measured(sae))
    return sae


def same(left, right):
    """Every field, tensors bit for bit."""
    for name in TENSORS:
        ours, theirs = getattr(left, name), getattr(right, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype, name
    assert (left.num_rows, left.distance_quantiles) == (right.num_rows, right.distance_quantiles)


# With the SAE


@pytest.mark.parametrize("kept", ["rows", "no rows"])
def test_an_sae_checkpoint_brings_its_statistics(tmp_path, kept):
    """What was measured once on images that may be gone is what every later session uses; without a sketch there is no trace of one."""
    sae = with_statistics()
    if kept == "no rows":
        sae.set_domain_statistics(sae.domain_statistics.without_rows(image_mean=torch.full((8,), 0.25)))
    sae.save_pretrained(tmp_path)
    found = SAEModel.from_pretrained(tmp_path)
    same(found.domain_statistics, sae.domain_statistics)
    assert found.config.holds_statistics and ("rows" in load_file(tmp_path / NAME)) == (kept == "rows")
    assert CheckpointFolder.open(tmp_path).files.keys() >= {"config.json", "model.safetensors", NAME}
    found.save_pretrained(tmp_path / "again")
    same(SAEModel.from_pretrained(tmp_path / "again").domain_statistics, sae.domain_statistics)
    with safe_open(tmp_path / NAME, "pt") as file:
        about = json.loads(file.metadata()["hf_vs2"])
    assert (about["format"], about["format_version"], about["num_rows"]) == ("hf_vs2.statistics", 1, 100)
    assert sorted(about) == ["distance_quantiles", "format", "format_version", "num_rows"], (
        "no path, no name, no label"
    )


def test_an_sae_made_from_a_config_promises_no_statistics(tmp_path):
    """`SAEModel(sae.config)` is a fresh SAE: its checkpoint must not say that it holds what it does not."""
    fresh = SAEModel(copy.deepcopy(with_statistics().config))
    assert fresh.domain_statistics is None
    fresh.save_pretrained(tmp_path)
    assert CheckpointFolder.open(tmp_path).files.keys() == {"config.json", "model.safetensors"}
    assert not SAEModel.from_pretrained(tmp_path).config.holds_statistics


def test_a_file_that_was_left_out_is_missed_not_needed(tmp_path, caplog):
    """Who downloads weights and config alone can still use VS2, and is told what can't be used."""
    with_statistics().save_pretrained(tmp_path)
    (tmp_path / NAME).unlink()
    found = SAEModel.from_pretrained(tmp_path)
    assert found.domain_statistics is None and not found.config.holds_statistics
    (warning,) = {record.getMessage() for record in caplog.records}
    assert f"{tmp_path} says that it has {NAME}, which is not there" in warning and "hf-vs2 calibrate" in warning


def test_copies_share_them_and_processes_receive_them():
    """`copy.deepcopy(model)` for a training step, DataLoader workers, multiprocessing."""
    sae = with_statistics()
    assert copy.deepcopy(sae).domain_statistics is sae.domain_statistics, "never changed, and megabytes"
    same(pickle.loads(pickle.dumps(sae)).domain_statistics, sae.domain_statistics)


def test_statistics_stay_float32_in_half_precision():
    """`.to(torch.bfloat16)` must not round what the gate hangs on."""
    sae = with_statistics().to(torch.bfloat16)
    assert sae.domain_statistics.mean.dtype == torch.float32


def test_statistics_of_another_sae_are_refused():
    """They have the right type, and would fail in the first batch or steer by other latents."""
    sae = with_statistics()
    before = sae.domain_statistics
    with pytest.raises(ValueError, match="width 24 and 96 latents; the SAE has 16 and 64. Calibrate it again"):
        sae.set_domain_statistics(measured(make_sae(24)))
    assert sae.domain_statistics is before


# On their own


def test_the_gate_takes_no_level_that_nobody_vouched_for():
    """Higher levels than the held-out rows know pass fewer images, never more; lower ones are refused."""
    known = measured(make_sae())  # 20 held out: up to 0.95
    quantiles = known.distance_quantiles
    assert known.distance_threshold(0.99) == known.distance_threshold(0.95) == quantiles["0.95"]
    between = known.distance_threshold(0.905)
    assert quantiles["0.9"] <= between <= quantiles["0.91"]
    with pytest.raises(ValueError, match=r"gate=0.001 lies outside the distance quantiles"):
        known.distance_threshold(0.001)
    nobody = measure_statistics(make_sae(), make_rows(50))
    with pytest.raises(ValueError, match="gate=0.9 goes by the distance.*no rows were held out.*hf-vs2 calibrate"):
        nobody.distance_threshold(0.9)


def test_rows_can_be_given_up():
    """What is published need not hold activations of single images; a mean image has to be left."""
    known = measured(make_sae())
    with pytest.raises(ValueError, match=r"give image_mean=model.image_mean\(\)"):
        known.without_rows()
    found = known.without_rows(torch.ones(3))
    assert found.rows is None and torch.equal(found.image_mean, torch.ones(3)) and known.rows is not None
    assert torch.equal(found.without_rows().image_mean, torch.ones(3))
    assert found.distance_quantiles == known.distance_quantiles and torch.equal(found.components, known.components)
    assert "no rows" in repr(found) and "a sketch of 100" in repr(known)
