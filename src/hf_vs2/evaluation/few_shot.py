"""What people do with 1 to 16 labelled images a class: the rows that a method without labels is to be held against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import normalize, one_hot

from ..steering.retrieval import linear_probe


SHARPNESS, RESIDUAL = 5.5, 1.0
"""Tip-Adapter's beta and alpha, as its paper has them for ImageNet without training (arXiv 2111.03930)."""

PENALTY = 1 / (0.316 * 10**2)
"""Of the probe's weights: scikit-learn's C = 0.316, which CLIP's own example takes, for embeddings of unit length
where CLIP's are about 10 long."""


def draw_shots(target: torch.Tensor, shots: int, seed: int) -> torch.Tensor:
    """Which images are given with their labels, bool `(n,)`: `shots` of each class at random, but no more than half of
    its images.

    Args:
        target: the class of each image, `(n,)`.
    """
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(len(target), dtype=torch.bool)
    for label in target.unique():
        members = order[target[order] == label]
        chosen[members[: min(shots, len(members) // 2)]] = True
    return chosen


def nearest_mean(
    embeds: torch.Tensor, labels: torch.Tensor, classes: torch.Tensor, temperature: float
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Cosine with the mean of each class; -1 for a class without an image."""
    hits = one_hot(labels, len(classes)).to(embeds)
    means = normalize(hits.T @ embeds, dim=-1)
    missing = hits.sum(0) == 0
    return lambda query: (query @ means.T).masked_fill(missing, -1.0)


def cache(
    embeds: torch.Tensor, labels: torch.Tensor, classes: torch.Tensor, temperature: float
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Tip-Adapter without training: `alpha exp(-beta (1 - f F^T)) L + T f W^T` over T, on the scale of cosines."""
    hits = one_hot(labels, len(classes)).to(embeds)

    def scores(query: torch.Tensor) -> torch.Tensor:
        affinity = torch.exp(-SHARPNESS * (1 - query @ embeds.T))
        return RESIDUAL / temperature * affinity @ hits + query @ classes.T

    return scores


def probe(
    embeds: torch.Tensor, labels: torch.Tensor, classes: torch.Tensor, temperature: float
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Logistic regression on the embeddings, see [`linear_probe`]."""
    weight, bias = linear_probe(embeds, labels, len(classes), l2=PENALTY)
    return lambda query: query @ weight.T + bias


FEW_SHOT = {"nearest_mean": nearest_mean, "tip_adapter": cache, "linear_probe": probe}
"""Name of the row -> `(embeds, labels, classes, temperature) -> (query -> scores)`: fitted to unit embeddings `(m,
projection_dim)` with labels `(m,)` and unit class embeddings, it scores unit embeddings, `(batch, num_classes)`. Only
`tip_adapter` looks at the class embeddings."""


def cross_answers(
    embeds: torch.Tensor,
    labels: torch.Tensor,
    classes: torch.Tensor,
    temperature: float,
    folds: int = 5,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """What each of [`FEW_SHOT`] answers for labelled images `(m,)` when it is fitted to the others: each fifth of them
    by the other four."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    answers = {name: torch.zeros_like(labels) for name in FEW_SHOT}
    for part in order.chunk(folds):
        others = torch.ones(len(labels), dtype=torch.bool)
        others[part] = False
        for name, fit in FEW_SHOT.items():
            scores = fit(embeds[others], labels[others], classes, temperature)
            answers[name][part] = scores(embeds[part]).argmax(-1)
    return answers
