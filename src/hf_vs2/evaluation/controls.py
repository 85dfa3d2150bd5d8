"""What an SAE has to beat: the same rule with a dictionary that nobody trained."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from ..clip.modeling import VS2CLIPForZeroShot
from ..config.sae import SAEConfig
from ..functional.sparse_ops import sparse_decode
from ..methods import DICTIONARIES
from ..sae.modeling import SAEModel
from ..sae.statistics import DomainStatistics
from ..training.domain import measure_statistics


@torch.no_grad()
def control_model(model: VS2CLIPForZeroShot, dictionary: str, seed: int = 0) -> VS2CLIPForZeroShot:
    """
    The model with another dictionary in its SAE's place, of as many active latents; the CLIP is shared.

    Args:
        model: with [`DomainStatistics`] that hold rows.
        dictionary: `"random"`, as many random directions as the SAE has latents, or `"pca"`, the principal components
            of the training rows, of which the largest by absolute value are active.
        seed: of the random directions.

    Raises:
        ValueError: an unknown dictionary, or no statistics to make it from.
    """
    known = model.domain_statistics
    if known is None or known.rows is None:
        raise ValueError("Control dictionaries are fitted to the rows of domain statistics, and this model has none.")
    if dictionary not in DICTIONARIES:
        raise ValueError(f"dictionary={dictionary!r} is not known. Use one of {list(DICTIONARIES)}.")
    make = _random if dictionary == "random" else _pca
    sae = make(model.sae.config, known, seed).to(model.sae.device).eval()
    rows = known.rows.float()
    sae.set_domain_statistics(measure_statistics(sae, rows, sketch_rows=len(rows)))
    now = model.steering_settings
    return VS2CLIPForZeroShot(model.clip, sae, gamma=now.gamma_factors[0], lambda_=now.lambda_)


def _random(config: SAEConfig, known: DomainStatistics, seed: int) -> SAEModel:
    generator = torch.Generator().manual_seed(seed)
    directions = normalize(torch.randn(config.weight_shape, generator=generator), dim=-1)
    assert known.rows is not None
    rows = known.rows.float() - known.mean
    # The one number that is fitted: how far a step along the chosen directions goes, by least squares.
    values, indices = (rows @ directions.T).topk(config.top_k, dim=-1)
    step = sparse_decode(values.clamp_min(0), indices, directions)
    scale = (rows * step).sum() / step.square().sum()
    return _dictionary(config, directions, known.mean, scale * directions, config.top_k, "relu")


def _pca(config: SAEConfig, known: DomainStatistics, seed: int) -> SAEModel:
    top_k = min(config.top_k, config.hidden_size)
    return _dictionary(config, known.components, known.mean, known.components, top_k, "absolute")


def _dictionary(
    config: SAEConfig, decoder: torch.Tensor, mean: torch.Tensor, encoder: torch.Tensor, top_k: int, activation: str
) -> SAEModel:
    sae = SAEModel(
        SAEConfig(
            site=config.site,
            hidden_size=config.hidden_size,
            num_latents=len(decoder),
            top_k=top_k,
            activation=activation,
            layer=config.layer,
            base_model_fingerprint=config.base_model_fingerprint,
            base_model_weights=config.base_model_weights,
        )
    )
    sae.W_enc.copy_(encoder)
    sae.W_dec.copy_(decoder)
    sae.b_enc.zero_()
    sae.b_pre.copy_(mean)
    sae.mean.copy_(mean)
    return sae
