"""Latents changed by hand: each edit does to the code what its name says, on top of the steering in force."""

import pytest
import torch
from conftest import make_tiny_clip
from steered import LATENTS, cls_rows, fitted_sae, make_inputs
from transformers import CLIPModel

from hf_vs2 import VS2CLIPConfig, VS2CLIPForZeroShot
from hf_vs2.config.latent_edits import LatentEdits
from hf_vs2.functional import equations as functional
from hf_vs2.steering.corpus import RetrievalCorpus


@pytest.fixture()
def model(tiny_clip):
    return VS2CLIPForZeroShot(tiny_clip, fitted_sae(tiny_clip)).double().eval()


@pytest.fixture()
def rows(model):
    return cls_rows(model.clip, make_inputs(5)["pixel_values"].double())


def dense(model, rows):
    """The code as a row of all latents."""
    with torch.no_grad():
        values, indices = model.sae.encode(rows)
    return torch.zeros(len(rows), LATENTS, dtype=values.dtype).scatter(1, indices, values)


def moved(model, x, change, start=None):
    """`start` plus a decoded change of the code, as long as `x`."""
    return functional.keep_norm((x if start is None else start) + change @ model.sae.W_dec.detach(), x)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # factors are kept in float32


@torch.no_grad()
def test_edits_of_all_latents_are_vs2(model, rows):
    """VS2 makes `(1 + lambda (gamma - 1)) c` of every active value: by hand the same must come out."""
    expected = model.steer_cls(rows).rows
    factor = 1 + model.steering_settings.lambda_ * (1.5 - 1)
    with model.steering(gamma=1.0), model.editing(amplify=dict.fromkeys(range(LATENTS), factor)):
        close(model.steer_cls(rows).rows, expected)
    with model.editing(amplify=dict.fromkeys(range(LATENTS), factor)):  # and takes VS2's place, not on top of it
        close(model.steer_cls(rows).rows, expected)


@torch.no_grad()
def test_each_edit_does_what_it_says(model, rows):
    """Amplify multiplies what is there, suppress removes it, set makes it a value even where the latent is not active."""
    code = dense(model, rows)
    latent = int((code != 0).sum(0).argmax())
    active = code[:, latent] != 0
    silent = int((code == 0).all(0).nonzero()[0])
    assert active.any()
    one = torch.nn.functional.one_hot(torch.tensor(latent), LATENTS).double()
    value = code[:, latent : latent + 1]
    model.set_steering(gamma=1.0)
    with model.editing(amplify={latent: 3.0, silent: 50.0}):
        found = model.steer_cls(rows).rows
        close(found, moved(model, rows, 2 * value * one))
        assert torch.equal(found[~active], rows[~active]), "an inactive latent was amplified"
    with model.editing(suppress=[latent]):
        close(model.steer_cls(rows).rows, moved(model, rows, -value * one))
    with model.editing(set={latent: 2.5}):
        close(model.steer_cls(rows).rows, moved(model, rows, (2.5 - value) * one))
    model.set_steering(gamma=1.5, lambda_=2.0)
    with model.editing(suppress=[latent]):  # the others go on being amplified
        close(model.steer_cls(rows).rows, moved(model, rows, code - 2 * value * one))


@torch.no_grad()
@pytest.mark.parametrize("method", ["amplify", "reconstruct", "centroid", "vs2++"])
def test_edits_come_on_top_of_every_method(method):
    """Whatever steers: an edited latent has its value by hand in what comes out, and the rest of the step is as it was."""
    clip = make_tiny_clip()
    model = VS2CLIPForZeroShot(clip, fitted_sae(clip)).eval()
    rows = cls_rows(clip, make_inputs(5)["pixel_values"])
    classes = torch.nn.functional.normalize(torch.randn(3, 24, generator=torch.Generator().manual_seed(0)), dim=-1)
    model.set_corpus(RetrievalCorpus.from_store(cls_rows(clip, make_inputs(30, seed=2)["pixel_values"]), clip=clip))
    model.set_steering(method=method, num_neighbors=5)
    code, decoder = dense(model, rows), model.sae.W_dec
    latent = int((code != 0).sum(0).argmax())
    retrieval = {"class_embeds": classes} if method == "vs2++" else {}
    # The method without that latent: a decoder in which it points nowhere.
    blind = VS2CLIPForZeroShot(clip, fitted_sae(clip)).eval()
    blind.set_corpus(model.corpus)
    blind.sae.W_dec[latent] = 0
    blind.set_steering(method=method, num_neighbors=5)
    with model.editing(set={latent: 2.0}):
        found = model.steer_cls(rows, **retrieval).rows
    base = blind.steer_cls(rows, **retrieval).rows
    if method in ("amplify", "reconstruct"):
        expected = base + 2.0 * decoder[latent]
    else:
        added = (2.0 - code[:, latent : latent + 1]) * decoder[latent]
        # `base` has its norm back already: undo it, by what its step was.
        step = blind.steerer.move(rows, **retrieval).step
        unscaled = step.start + torch.einsum("bm,bmh->bh", step.change, blind.sae.W_dec[step.latents])
        expected = functional.keep_norm(unscaled + added, rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_gate_and_off_switch_hold_for_edits(model, rows):
    """An image that the gate holds back keeps plain CLIP's result, bit for bit, and so does every image with steering off."""
    threshold = model.steer_cls(rows).fvu.median().item()
    model.set_steering(fvu_threshold=threshold, edits={"set": {3: 4.0}})
    found = model.steer_cls(rows)
    assert 0 < found.steered.sum() < len(rows)
    assert torch.equal(found.rows[~found.steered], rows[~found.steered])
    pixels = make_inputs(3)["pixel_values"].double()
    with model.steering(enabled=False):
        assert torch.equal(model.image_features(pixels).features, model.clip.get_image_features(pixels).pooler_output)


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


@torch.no_grad()
def test_checkpoints_keep_edits(tmp_path):
    """A checkpoint that was pushed with a latent suppressed must not come back with it."""
    make_tiny_clip().save_pretrained(tmp_path / "clip")
    clip = CLIPModel.from_pretrained(tmp_path / "clip").eval()
    model = VS2CLIPForZeroShot(clip, fitted_sae(clip)).eval()
    model.set_steering(edits={"amplify": {3: 4.0}, "suppress": [9, 5], "set": {7: 2.5}})
    model.save_pretrained(tmp_path / "light")
    model.save_pretrained(tmp_path / "full", full=True)
    rows = cls_rows(clip, make_inputs(3)["pixel_values"])
    for name in ("light", "full"):
        loaded = VS2CLIPForZeroShot.from_pretrained(tmp_path / name).eval()
        assert loaded.steering_settings == model.steering_settings
        assert torch.equal(loaded.steer_cls(rows).rows, model.steer_cls(rows).rows)
        assert VS2CLIPForZeroShot.from_pretrained(tmp_path / name, edits=None).steering_settings.edits is None
    damaged = model.config.to_dict() | {"edits": {"silence": [4]}}
    with pytest.raises(ValueError, match="edits has 'silence'"):
        VS2CLIPConfig.from_dict(damaged)


@pytest.mark.parametrize(
    ("edits", "error", "message"),
    [
        ({"suppress": [LATENTS]}, ValueError, f"edits names the latent {LATENTS}; the SAE has {LATENTS}"),
        ({"suppress": [-1]}, ValueError, "counted from 0"),
        ({"suppress": "17"}, TypeError, "suppress must be a list of latents"),
        ({"suppress": 17}, TypeError, "suppress must be a list of latents"),
        ({"amplify": [17]}, TypeError, "amplify must map latents to numbers"),
        ({"amplify": {3: float("nan")}}, ValueError, "amplify of latent 3 must be a finite number"),
        ({"amplify": {3: 2.0}, "suppress": [3]}, ValueError, "Latent 3 has two edits"),
        ({"set": {1.5: 2.0}}, TypeError, "set names the latent 1.5"),
        ({"boost": {3: 2.0}}, ValueError, "edits has 'boost'"),
        ([4], TypeError, "edits must be LatentEdits or a dict"),
    ],
)
def test_edits_that_cannot_be_meant_are_refused(model, edits, error, message):
    """A misspelt or impossible edit that was ignored would look like a latent without effect."""
    before = model.steering_settings
    with pytest.raises(error, match=message):
        model.set_steering(edits=edits)
    assert model.steering_settings == before


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
