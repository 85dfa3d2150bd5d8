"""What adapting changes: plain CLIP's answers and the checkpoint's, for every image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..clip.modeling import VS2CLIPForZeroShot
from ..data.stores.rows import Rows
from ..encoders.tail import plain_embeds, probabilities
from ..evaluation.metrics import few_of_each


_BINS = 10
REJECTED = 0.05
"""Share of the images here that the threshold for "none of these labels" leaves out."""


@dataclass(frozen=True)
class Answers:
    """For each image, `(n,)` on the CPU: the answers of plain CLIP and of the checkpoint as places in the labels, how
    probable each of them says that its own answer is, and the cosine of the image with plain CLIP's answer."""

    plain: torch.Tensor
    adapted: torch.Tensor
    plain_confidence: torch.Tensor
    adapted_confidence: torch.Tensor
    lead: torch.Tensor
    """How much more probable the checkpoint finds its answer than plain CLIP's; 0 where they are the same."""
    similarity: torch.Tensor

    @property
    def changed(self) -> torch.Tensor:
        """Numbers of the images whose answers differ, the clearest change first."""
        rows = (self.plain != self.adapted).nonzero().squeeze(-1)
        return rows[self.lead[rows].argsort(descending=True, stable=True)]


@torch.no_grad()
def compare(model: VS2CLIPForZeroShot, rows: Rows, classes: torch.Tensor, batch_size: int = 1024) -> Answers:
    """
    Both answers for every row, by replaying the tail; gate and method are the model's own.

    Args:
        classes: unit class embeddings `(num_classes, projection_dim)`.
    """
    classes = classes.to(model.clip.device)
    parts: list[tuple[torch.Tensor, ...]] = []
    steerers = model.steerer.with_(enabled=False), model.steerer.for_one_call()
    for block in rows.batches(batch_size):
        cosines = plain_embeds(model.clip, block) @ classes.T
        before, after = (
            probabilities(steerer.class_logits(steerer.features_from_cls(block), classes), model.clip)
            for steerer in steerers
        )
        plain, adapted = before.max(-1), after.max(-1)
        lead = adapted.values - after.gather(-1, plain.indices.unsqueeze(-1)).squeeze(-1)
        found = (plain.indices, adapted.indices, plain.values, adapted.values, lead, cosines.amax(-1))
        parts.append(tuple(part.cpu() for part in found))
    return Answers(*(torch.cat(one) for one in zip(*parts, strict=True)))


def pairs(answers: Answers, labels: Sequence[str], most: int = 12) -> list[dict[str, Any]]:
    """The commonest changes: from which label to which, and how many images."""
    rows = answers.changed
    counted = Counter(zip(answers.plain[rows].tolist(), answers.adapted[rows].tolist(), strict=True))
    return [{"from": labels[old], "to": labels[new], "number": n} for (old, new), n in counted.most_common(most)]


def clearest(answers: Answers, most: int = 24, per_pair: int = 3) -> list[int]:
    """The images with the clearest changes, at most `per_pair` of one label to another."""
    plain, adapted = answers.plain.tolist(), answers.adapted.tolist()
    return few_of_each(answers.changed.tolist(), lambda row: (plain[row], adapted[row]), most, per_pair)


def confidence(probability: torch.Tensor, right: torch.Tensor | None = None) -> dict[str, Any]:
    """How sure answers are: the mean probability, and the share of images in each tenth from 0 to 1. With `right`
    `(n,)`, which of them are, the accuracy and the expected calibration error (ECE): the mean distance between
    probability and accuracy over the tenths, weighted by images."""
    place = (probability.double() * _BINS).long().clamp(max=_BINS - 1)
    counts = torch.bincount(place, minlength=_BINS)
    found: dict[str, Any] = {
        "n": len(probability),
        "mean_confidence": probability.double().mean().item(),
        "shares": (counts / len(probability)).tolist(),
    }
    if right is not None:
        hits = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, place, right.double())
        sure = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, place, probability.double())
        found["accuracy"] = right.double().mean().item()
        found["ece"] = ((hits - sure).abs().sum() / len(probability)).item()
    return found


def rejection(answers: Answers) -> dict[str, Any]:
    """The threshold for "none of these labels": see [`REJECTED`]."""
    number = max(1, int(REJECTED * len(answers.similarity)))
    return {
        "similarity": answers.similarity.kthvalue(number).values.item(),
        "share": REJECTED,
        "images": len(answers.similarity),
    }
