"""Checkpoints of a steered CLIP: light and full ones come back as they were, with the CLIP that they name or another. What
holds for every method stands in tests/methods/test_every_method.py, damage in tests/survival/test_every_damage.py."""

import copy

import pytest
import torch
from conftest import make_tiny_clip
from safetensors.torch import load_file
from steered import LAST, LATENTS, cls_rows, fitted_sae, make_inputs
from toy import make_sae
from transformers import AutoModel, AutoModelForZeroShotImageClassification, CLIPModel

from hf_vs2 import VS2CLIPForZeroShot, calibrate
from hf_vs2.encoders.base_model import describe_base_model


PER_LATENT = tuple(1 + 0.01 * i for i in range(LATENTS))


@pytest.fixture()
def named_clip(tmp_path):
    """A CLIP that was loaded from a path, as users' CLIPs are: light checkpoints name it."""
    make_tiny_clip().save_pretrained(tmp_path / "clip")
    return CLIPModel.from_pretrained(tmp_path / "clip")


def described(clip, **changed):
    return fitted_sae(clip, **{**describe_base_model(clip), **changed})


def test_an_sae_of_another_clip_is_refused_with_both_names(named_clip, tmp_path):
    """ViT-B/32 and ViT-B/16 have the same width: their SAEs fit each other and give nonsense."""
    ours = str(tmp_path / "clip")
    sae = described(named_clip, base_model_name_or_path="their/clip")
    VS2CLIPForZeroShot(named_clip, sae)
    VS2CLIPForZeroShot(copy.deepcopy(named_clip).bfloat16(), sae)

    other = CLIPModel.from_pretrained(ours)
    with torch.no_grad():
        other.vision_model.embeddings.class_embedding.mul_(1.05)
    with pytest.raises(ValueError, match=f"trained on their/clip; the CLIP given is {ours}.*not the same weights"):
        VS2CLIPForZeroShot(other, sae)
    sae.config.base_model_fingerprint = None  # what the message says to do
    VS2CLIPForZeroShot(other, sae)

    sae.config.base_model_num_layers = 12
    with pytest.raises(ValueError, match=f"their/clip.*{ours}.*depths differ: 12 layers against 3"):
        VS2CLIPForZeroShot(named_clip, sae)
    wide = make_sae(48, base_model_name_or_path="their/wide-clip")
    with pytest.raises(
        ValueError, match=f"their/wide-clip.*{ours}.*the SAE reads 48 features, the vision tower gives 32"
    ):
        VS2CLIPForZeroShot(named_clip, wide)


def assert_same_logits(one, other):
    inputs = make_inputs()
    with torch.no_grad():
        assert torch.equal(one(**inputs).logits_per_image, other(**inputs).logits_per_image)


@pytest.mark.parametrize("full", [False, True], ids=["light", "full"])
@pytest.mark.parametrize("auto", [VS2CLIPForZeroShot, AutoModel, AutoModelForZeroShotImageClassification])
def test_checkpoints_come_back_the_same(named_clip, tmp_path, full, auto):
    """One id is enough: weights, settings, statistics and thresholds, light or full, by any class. An SAE that names no layer
    must not move to the last one."""
    saes = {1: fitted_sae(named_clip, seed=1), LAST: fitted_sae(named_clip, layer=LAST, seed=2)}
    model = VS2CLIPForZeroShot(named_clip, saes, gamma=PER_LATENT, lambda_=0.4, gate=0.9)
    model.save_pretrained(tmp_path / "vs2", full=full)
    names = load_file(tmp_path / "vs2" / "model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == ({"saes", "clip"} if full else {"saes"})

    loaded = auto.from_pretrained(tmp_path / "vs2")
    assert type(loaded) is VS2CLIPForZeroShot and not loaded.training
    assert loaded.steering_settings == model.steering_settings and loaded.fvu_thresholds == model.fvu_thresholds
    assert list(loaded.sae_by_layer) == [1, LAST] and saes[1].config.layer is None, "the SAE given is left as it is"
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert_same_logits(loaded, model)


@pytest.mark.parametrize("full", [False, True], ids=["light", "full"])
def test_settings_given_at_loading_win(named_clip, tmp_path, full):
    """`from_pretrained(id, gate=None, gamma=2.0)`, the same for each kind of checkpoint."""
    sae = fitted_sae(named_clip, base_model_name_or_path=named_clip.config._name_or_path)
    sae.save_pretrained(tmp_path / "sae")
    VS2CLIPForZeroShot(named_clip, sae, gate=0.9).save_pretrained(tmp_path / "vs2", full=full)
    for folder in ("sae", "vs2"):
        loaded = VS2CLIPForZeroShot.from_pretrained(tmp_path / folder, gamma=2.0, fvu_threshold=0.3)
        assert (loaded.config.gamma, loaded.config.lambda_, loaded.config.gate) == (2.0, 2.1, None)
        assert loaded.fvu_thresholds == {LAST: 0.3}


def test_a_bare_sae_checkpoint_is_enough(named_clip, tmp_path):
    """What training leaves behind names its CLIP and brings its default steering; without calibration there is no gate."""
    sae = described(named_clip, gamma=1.25, lambda_=1.0, gate=0.9)
    sae.save_pretrained(tmp_path / "sae")
    loaded = VS2CLIPForZeroShot.from_pretrained(tmp_path / "sae")
    assert (loaded.config.gamma, loaded.config.lambda_, loaded.config.gate) == (1.25, 1.0, 0.9)
    assert loaded.config.base_model_name_or_path == named_clip.config._name_or_path
    assert_same_logits(loaded, VS2CLIPForZeroShot(named_clip, sae, gamma=1.25, lambda_=1.0, gate=0.9))

    sae.config.fvu_quantiles = None
    sae.save_pretrained(tmp_path / "uncalibrated")
    assert VS2CLIPForZeroShot.from_pretrained(tmp_path / "uncalibrated").config.gate is None


def test_another_clip_can_be_given_and_is_checked(named_clip, tmp_path):
    """A local copy of the CLIP instead of its Hub id is fine; a different CLIP is not."""
    sae = described(named_clip, base_model_name_or_path="nobody/has-this-clip")
    sae.save_pretrained(tmp_path / "sae")
    for clip in (named_clip, named_clip.config._name_or_path):
        assert_same_logits(
            VS2CLIPForZeroShot.from_pretrained(tmp_path / "sae", clip=clip, gate=None),
            VS2CLIPForZeroShot(named_clip, sae),
        )
    VS2CLIPForZeroShot(named_clip, sae).save_pretrained(tmp_path / "full", full=True)
    loaded = VS2CLIPForZeroShot.from_pretrained(tmp_path / "full", clip=named_clip)
    assert loaded.clip is named_clip
    with pytest.raises(ValueError, match="depths differ"):
        VS2CLIPForZeroShot.from_pretrained(tmp_path / "full", clip=make_tiny_clip(num_layers=4))


def test_a_later_calibration_is_saved(named_clip, tmp_path):
    """Calibrating the SAE inside the model, then saving: the new quantiles must be in the checkpoint, not the old ones."""
    sae = fitted_sae(named_clip)
    sae.config.fvu_quantiles = None
    model = VS2CLIPForZeroShot(named_clip, sae)
    calibrate(model.sae, cls_rows(named_clip, make_inputs(40, seed=9)["pixel_values"]))
    model.set_steering(gate=0.9)
    model.save_pretrained(tmp_path / "vs2")
    loaded = VS2CLIPForZeroShot.from_pretrained(tmp_path / "vs2")
    assert loaded.sae.config.fvu_quantiles == sae.config.fvu_quantiles
    assert loaded.fvu_thresholds == model.fvu_thresholds


def test_a_checkpoint_must_have_a_clip_to_name(tiny_clip, tmp_path):
    """Else it could never be loaded. Damaged ones are in tests/survival/test_every_damage.py."""
    with pytest.raises(ValueError, match="A light checkpoint names its CLIP.*full=True"):
        VS2CLIPForZeroShot(tiny_clip, fitted_sae(tiny_clip)).save_pretrained(tmp_path / "nameless", full=False)
    fitted_sae(tiny_clip).save_pretrained(tmp_path / "sae")
    with pytest.raises(ValueError, match=r"does not name the CLIP it belongs to.*clip="):
        VS2CLIPForZeroShot.from_pretrained(tmp_path / "sae")
