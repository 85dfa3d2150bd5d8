"""Dictionaries that nobody trained: a control that is weaker than it should be makes every SAE look good."""

import numpy as np
import pytest
import torch
from conftest import make_tiny_clip
from steered import HIDDEN, LATENTS, cls_rows, fitted_sae, make_inputs

from hf_vs2 import VS2CLIPForZeroShot
from hf_vs2.evaluation.controls import control_model


@pytest.fixture(scope="module")
def rows():
    return cls_rows(make_tiny_clip(), make_inputs(64, seed=5)["pixel_values"])


@pytest.fixture()
def model(tiny_clip):
    return VS2CLIPForZeroShot(tiny_clip, fitted_sae(tiny_clip), gamma=1.7, lambda_=0.9)


def test_all_principal_components_are_the_centroid(tiny_clip, rows):
    """Prop. 3.1: with a dictionary that reconstructs every row, VS2 moves along `x - mu` exactly."""
    whole = VS2CLIPForZeroShot(tiny_clip, fitted_sae(tiny_clip, top_k=HIDDEN), gamma=1.7, lambda_=0.9)
    pca = control_model(whole, "pca")
    pca.sae.mean.copy_(pca.sae.b_pre)
    with torch.no_grad():
        found = pca.steer_cls(rows)
        with pca.steering(method="centroid"):
            expected = pca.steer_cls(rows)
    assert found.fvu.max() < 1e-5
    torch.testing.assert_close(found.rows, expected.rows, rtol=1e-4, atol=1e-3)


def test_principal_components_are_the_best_of_their_number(model, rows):
    """No k directions of an orthogonal dictionary hold more of the rows than each row's k largest principal components."""
    pca = control_model(model, "pca").sae
    mean, known = model.domain_statistics.mean, model.domain_statistics.components
    coefficients = ((rows - mean) @ known.T).detach().numpy()
    kept = np.sort(np.abs(coefficients), axis=1)[:, -pca.config.top_k :]
    error = np.square(coefficients).sum(1) - np.square(kept).sum(1)
    found = (pca(rows).reconstruction - rows).square().sum(-1).detach().numpy()
    np.testing.assert_allclose(found, error, rtol=1e-3, atol=1e-2)


def test_random_directions_take_the_best_step(model):
    """As many directions and as many active as the SAE has, and the one length that fits the rows best: no straw man."""
    sae = control_model(model, "random").sae
    rows = model.domain_statistics.rows.float()
    assert sae.W_dec.shape == (LATENTS, HIDDEN) and sae.config.top_k == model.sae.config.top_k
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(LATENTS))

    def error(stretch: float) -> float:
        with torch.no_grad():
            step = sae(rows).reconstruction - sae.b_pre
        return (rows - sae.b_pre - stretch * step).square().sum().item()

    assert error(1.0) < min(error(0.98), error(1.02))


def test_seeds_and_settings(model):
    """Another seed is another dictionary, the same one the same; gamma, lambda and the CLIP are the model's own."""
    one, same, other = (control_model(model, "random", seed) for seed in (0, 0, 1))
    assert torch.equal(one.sae.W_dec, same.sae.W_dec) and not torch.equal(one.sae.W_dec, other.sae.W_dec)
    assert one.clip is model.clip and one.domain_statistics.rows is not None
    assert (one.steering_settings.gamma, one.steering_settings.lambda_) == (1.7, 0.9)
    assert len(one.domain_statistics.latent_mean) == LATENTS
    with pytest.raises(ValueError, match="dictionary='best' is not known"):
        control_model(model, "best")
    model.set_domain_statistics(None)
    with pytest.raises(ValueError, match="this model has none"):
        control_model(model, "pca")
