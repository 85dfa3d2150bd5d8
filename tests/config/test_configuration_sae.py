"""The config is the checkpoint's passport: it must refuse what can't work, and come back as it was written."""

import json

import pytest
import torch
from conftest import make_tiny_clip

from hf_vs2 import SAEConfig, SAEModel, Steering, VS2CLIPConfig


FULL = {
    "hidden_size": 32,
    "num_latents": 100,
    "top_k": 7,
    "activation": "absolute",
    "aux_k": 9,
    "aux_k_coefficient": 0.125,
    "base_model_name_or_path": "openai/clip-vit-base-patch32",
    "base_model_revision": "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
    "base_model_num_layers": 12,
    "base_model_fingerprint": [0.1, 1 / 3, -2.0],
    "layer": 11,
    "total_variance": 1 / 7,
    "fvu_quantiles": {"0.9": 0.1 + 0.2, "0.99": 0.7},
    "num_calibration_rows": 200,
    "gamma": 2,
    "lambda_": 1.25,
    "gate": 0.9,
    "training_data": {"id": "cifar10", "split": "train", "num_rows": 50_000},
    "training_metrics": {"fvu": 0.25, "l0": 7.0},
    "hf_vs2_version": "0.1.0",
}


def test_every_field_survives_the_checkpoint(tmp_path):
    """Statistics that are lost on the way are the most asked-about bug of SAE libraries: the gate hangs on them."""
    config = SAEConfig(**FULL)
    config.save_pretrained(tmp_path)
    loaded = SAEConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in FULL} == FULL
    assert config == SAEConfig(**FULL)
    assert config != SAEConfig(**{**FULL, "top_k": 8}), "an equality that ignores the fields hides every mismatch"


def test_widths_follow_from_the_hidden_size():
    """`SAEConfig(hidden_size=..., top_k=...)` is what people write; the rest must fit by itself."""
    config = SAEConfig(hidden_size=768)
    assert (config.num_latents, config.aux_k, config.weight_shape) == (3072, 384, (3072, 768))
    assert SAEConfig(hidden_size=768, num_latents=100).weight_shape == (100, 768)
    assert SAEConfig(hidden_size=768, num_latents=100).aux_k == 100
    assert SAEConfig(hidden_size=1, expansion_factor=2, top_k=1).aux_k == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 129}, r"top_k=129 must be between 1 and the number of latents \(128\).*raise expansion_factor"),
        ({"top_k": 0}, "top_k=0"),
        ({"hidden_size": 0}, "hidden_size, expansion_factor and num_latents must be positive"),
        ({"num_latents": -4}, "must be positive"),
        ({"aux_k": 129}, r"aux_k=129 must be between 0 and the number of latents \(128\)"),
        ({"activation": "jumprelu"}, r"activation='jumprelu' is not known. Use one of \['relu', 'absolute'\]"),
        ({"site": "patches"}, "site='patches' is not known.*'cls'"),
        ({"layer": -1}, "layer=-1 must be counted from 0"),
        ({"gate": 1.5}, r"gate=1.5 must be a quantile between 0 and 1 \(0.99, say\), or None"),
        (
            {"format_version": 99},
            "format version 99; this package reads up to 1.*Install a newer hf_vs2: `pip install",
        ),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    """The message names the argument and what to do; without it the failure comes later, inside torch."""
    with pytest.raises(ValueError, match=message):
        SAEConfig(**{"hidden_size": 32, "top_k": 4, **settings})


def test_a_wrong_type_is_refused_by_name():
    """`top_k=64.0` from a YAML file must not become a float deep in `topk`."""
    config = SAEConfig(hidden_size=32, top_k=4)
    for change in (lambda: SAEConfig(hidden_size=32, top_k=4.0), lambda: setattr(config, "top_k", 4.0)):
        with pytest.raises(ValueError, match=r"top_k=4\.0 must be of the kind int\.$"):
            change()
    for field, value in (
        ("gamma", "a"),
        ("lambda_", None),
        ("edits", {"amplify": 3}),
        ("num_neighbors", 1.5),
        ("sae_configs", 3),
    ):
        with pytest.raises(ValueError):
            VS2CLIPConfig(**{field: value})


def test_a_field_of_a_later_version_is_kept(tmp_path):
    """The format grows additively: an older package reads a newer checkpoint and does not lose what it can't read."""
    config = SAEConfig(**FULL)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, "normalisation": "layer"}))
    loaded = SAEConfig.from_pretrained(tmp_path)
    assert loaded.normalisation == "layer"
    assert loaded.to_dict()["normalisation"] == "layer"


def test_another_models_checkpoint_is_no_sae(tmp_path):
    """transformers would warn and give an SAE of random weights, whose steering looks like a bad method."""
    clip = make_tiny_clip()
    clip.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="configuration of a 'clip' model, not of an SAE"):
        SAEModel.from_pretrained(tmp_path / "clip")
    VS2CLIPConfig(clip_config=clip.config).save_pretrained(tmp_path / "vs2")
    with pytest.raises(ValueError, match=r"'vs2_clip' model.*VS2CLIPForZeroShot.from_pretrained\(...\).sae"):
        SAEModel.from_pretrained(tmp_path / "vs2")


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        *((0.5, 0.2), (0.9, 0.4), (0.99, 0.7)),
        (0.945, 0.55),  # half-way, whatever order the file holds them in
        (0.49, "gate=0.49 lies outside the calibrated quantiles 0.5 to 0.99.*fvu_threshold="),
        (0.995, "gate=0.995 lies outside the calibrated quantiles 0.5 to 0.99.*fvu_threshold="),
    ],
)
def test_the_gates_threshold_is_read_from_the_quantiles(gate, expected):
    """Extrapolating a quantile would promise a coverage that nobody measured."""
    config = SAEConfig(hidden_size=32, top_k=4, fvu_quantiles={"0.9": 0.4, "0.5": 0.2, "0.99": 0.7})
    if not isinstance(expected, str):
        assert config.fvu_threshold(gate) == pytest.approx(expected, abs=1e-12)
        return
    with pytest.raises(ValueError, match=expected):
        config.fvu_threshold(gate)
    with pytest.raises(ValueError, match="holds no FVU quantiles.*Calibrate it"):
        SAEConfig(hidden_size=32, top_k=4).fvu_threshold(gate)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "vs3"},
            r"method='vs3' is not known. Use one of \['none', 'centroid', 'reconstruct', 'amplify', 'vs2', 'vs2\+\+', 'corrected'",
        ),
        ({"gate": 0.9, "fvu_threshold": 0.5}, r"gate=0.9 \(a quantile\) and fvu_threshold=0.5.*exclude each other"),
        ({"gate": 2.0}, "gate=2.0 must be a quantile between 0 and 1.*use fvu_threshold="),
        ({"fvu_threshold": -0.5}, "fvu_threshold must be a number \\(at least 0\\) \\(or left out\\), not -0.5"),
        ({"fvu_threshold": float("nan")}, "fvu_threshold must be a number .*, not nan"),
        ({"method": "centroid", "gamma": (1.0, 2.0)}, "centroid.*gamma must be one number"),
        ({"lambda_": "2.1"}, "lambda_ must be a finite number, not '2.1'"),
        ({"lambda_": float("inf")}, "lambda_ must be a finite number"),
        ({"coefficient": 1.5}, "coefficient must be a finite number .*not 1.5"),
        ({"gate": "a"}, "gate must be a finite number .or left out., not 'a'"),
        ({"enabled": 1}, "enabled must be true or false, not 1"),
        (
            {"edits": {"amplify": {1: 10**400}}},
            "amplify of latent 1 must be a finite number, not a number of more than 30",
        ),
        ({"gamma": (1.0, float("nan"))}, "gamma must be a finite number, not nan"),
    ],
)
def test_impossible_steering_is_refused(settings, message):
    """A NaN factor or a gate given twice would give silently wrong accuracies."""
    with pytest.raises(ValueError, match=message):
        Steering(**settings)
    # Of a wrong type the config's own check speaks first, and `enabled` is no field of its.
    if not any(isinstance(settings.get(name), str) for name in ("lambda_", "gate")) and "enabled" not in settings:
        settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
        with pytest.raises(ValueError, match=message):
            VS2CLIPConfig(**settings)


def test_statistics_of_a_model_are_those_of_its_config():
    """`set_statistics` is how a training loop of one's own makes an SAE usable: all three places must be set."""
    sae = SAEModel(SAEConfig(hidden_size=4, top_k=2))
    sae.set_statistics(torch.arange(4.0), torch.tensor(2.5))
    assert sae.config.total_variance == 2.5
    assert isinstance(sae.config.total_variance, float)
    assert torch.equal(sae.mean, torch.arange(4.0)) and torch.equal(sae.b_pre.data, torch.arange(4.0))
