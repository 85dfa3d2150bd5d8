"""Latents changed by hand: each edit does to the code what its name says, on top of the steering in force."""

import pytest
import torch
from steered import LATENTS, cls_rows, fitted_sae, make_inputs

from hf_vs2 import VS2CLIPForZeroShot
from hf_vs2.config.latent_edits import LatentEdits


@pytest.fixture()
def model(tiny_clip):
    return VS2CLIPForZeroShot(tiny_clip, fitted_sae(tiny_clip)).double().eval()


@pytest.fixture()
def rows(model):
    return cls_rows(model.clip, make_inputs(5)["pixel_values"].double())


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # factors are kept in float32


@torch.no_grad()
def test_no_edits_change_no_bit(model, rows):
    """Empty edits, and those of a block that has ended, leave nothing behind."""
    before, settings = model.steer_cls(rows).rows, model.steering_settings
    with model.editing():
        assert model.steering_settings == settings
        assert torch.equal(model.steer_cls(rows).rows, before)
    with model.editing(set={3: 4.0}):
        assert not torch.equal(model.steer_cls(rows).rows, before)
        with model.editing(suppress=[5]):  # in place of the others
            assert model.steering_settings.edits == LatentEdits(suppress=[5])
    assert model.steering_settings == settings and torch.equal(model.steer_cls(rows).rows, before)
    assert "edits" not in model.config.to_dict()


def test_edits_need_one_sae(tiny_clip):
    """Latent 4 of which SAE? Several layers leave that open."""
    model = VS2CLIPForZeroShot(tiny_clip, {0: fitted_sae(tiny_clip, 0), 2: fitted_sae(tiny_clip, 2)})
    with pytest.raises(ValueError, match="edits name latents of one SAE"):
        model.set_steering(edits={"suppress": [4]})


def test_edits_and_a_gamma_for_each_latent_serve_training_after_inference_mode(tiny_clip):
    """What an evaluation under `torch.inference_mode` has put on the device is used in a training step: torch refuses tensors of
    inference mode there."""
    model = VS2CLIPForZeroShot(
        tiny_clip, fitted_sae(tiny_clip)
    ).eval()  # in float32, as they are kept: nothing is copied
    pixels = make_inputs(2)["pixel_values"]
    settings = {"edits": {"amplify": {1: 3.0}, "set": {2: 1.5}, "suppress": [3]}, "gamma": tuple([1.2] * LATENTS)}
    model.set_steering(**settings)
    with torch.inference_mode():
        expected = model.get_image_features(pixel_values=pixels).pooler_output
    found = model.get_image_features(pixel_values=pixels.requires_grad_()).pooler_output
    found.sum().backward()
    assert pixels.grad.isfinite().all() and pixels.grad.any()
    close(found, expected)
