"""Unit embeddings of images and classes, drawn at random in float64."""

import numpy as np
import torch
from torch.nn.functional import normalize

from hf_vs2.functional.label_free import (
    centred_classes,
)


DIM = 12


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn_classes(num_classes=5, seed=0):
    """Unit class embeddings around a mean of their own, as a text tower gives them."""
    return normalize(0.8 * draw(DIM, seed=90) + 0.6 * draw(num_classes, DIM, seed=seed), dim=-1)


def images_of(classes, labels, seed=0, noise=0.5):
    """Unit image embeddings: a mean that is not the texts', the class's direction, noise."""
    directions = centred_classes(classes)[labels]
    noise = noise * draw(len(labels), classes.shape[1], seed=seed) / classes.shape[1] ** 0.5
    return normalize(1.5 * normalize(draw(classes.shape[1], seed=91), dim=-1) + directions + noise, dim=-1)


def close(found, expected, tolerance=1e-9):
    np.testing.assert_allclose(found.numpy(), expected, rtol=tolerance, atol=tolerance)
