"""Small SAEs and activations of known structure, shared by the tests of the maths, the models and the training."""

import json
from pathlib import Path
from typing import Any

import torch

from hf_vs2 import SAEConfig, SAEModel


def make_sae(hidden_size: int = 16, seed: int = 0, **config: Any) -> SAEModel:
    """A random, untied SAE with biases, decoder rows of any length and a mean away from `b_pre`: no special case."""
    generator = torch.Generator().manual_seed(seed)
    sae = SAEModel(SAEConfig(hidden_size=hidden_size, **{"top_k": 5, **config}))

    def draw(tensor: torch.Tensor, scale: float) -> None:
        tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))

    with torch.no_grad():
        draw(sae.W_enc, 0.5)
        draw(sae.b_enc, 0.3)
        draw(sae.W_dec, 0.4)
        draw(sae.b_pre, 0.5)
        draw(sae.mean, 0.5)
    return sae


def forget_digests(folder: Path) -> None:
    """Make a checkpoint one of the versions without digests, which notice damage by what the files say."""
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"digests": None}))


def make_rows(num_rows: int, hidden_size: int = 16, seed: int = 0) -> torch.Tensor:
    """Rows with a mean, as CLS activations have one."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return 1.5 + torch.randn(num_rows, hidden_size, generator=generator)


def clip_like_rows(num_rows: int, hidden_size: int = 48, rank: int = 12, seed: int = 0) -> torch.Tensor:
    """A large mean, a few strong directions and noise: the spectrum of CLS activations. One `seed` is one draw of the
    same distribution."""
    world = torch.Generator().manual_seed(7)
    mean = 5 * torch.randn(hidden_size, generator=world)
    directions = torch.randn(rank, hidden_size, generator=world) * torch.linspace(2, 0.5, rank)[:, None]
    draw = torch.Generator().manual_seed(seed)
    factors = torch.randn(num_rows, rank, generator=draw)
    return mean + factors @ directions + 0.3 * torch.randn(num_rows, hidden_size, generator=draw)


def sparse_rows(
    num_rows: int, hidden_size: int = 24, num_features: int = 64, active: int = 3, seed: int = 0
) -> torch.Tensor:
    """Each row is a mean plus `active` of `num_features` unit directions: what a top-k SAE can find and PCA can't."""
    world = torch.Generator().manual_seed(11)
    features = torch.nn.functional.normalize(torch.randn(num_features, hidden_size, generator=world), dim=-1)
    mean = 3 * torch.randn(hidden_size, generator=world)
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.rand(num_rows, num_features, generator=draw).topk(active).indices
    strength = 1 + torch.rand(num_rows, active, generator=draw)
    return mean + torch.zeros(num_rows, num_features).scatter(1, chosen, strength) @ features
