"""What steering changes on the images of an atlas: accuracy by class, and single images with the latents that moved
them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..clip.modeling import VS2CLIPForZeroShot
from ..data.stores.rows import Rows
from ..encoders.tail import unit_embeds
from ..evaluation.metrics import class_changes, few_of_each
from ..explain.explanation import explain_rows
from .statistics import blocks


class Predictions(NamedTuple):
    """The answers of plain and of steered CLIP for each row, all `(n,)` on the CPU."""

    plain: torch.Tensor
    """int64: the class that plain CLIP chooses."""
    steered: torch.Tensor
    """int64: the class that the model chooses with steering."""
    lead: torch.Tensor
    """float32: cosine of the chosen class less that of plain CLIP's, both steered: how clearly it changed its mind."""
    touched: torch.Tensor
    """bool: whether the gate let the row be steered."""


class Mover(NamedTuple):
    """A latent that moved an image from one class to another."""

    latent: int
    value: float
    """Its value on that image."""
    push: float
    """What it adds to the new class's logit over the old one's, see [`VS2Explanation`]; negative where it held against
    the change."""


@torch.no_grad()
def predict(
    model: VS2CLIPForZeroShot, rows: Rows, class_embeds: torch.Tensor, batch_size: int, progress: bool = False
) -> Predictions:
    """Both answers for every row, by replaying the tail; `class_embeds` `(num_classes, projection_dim)`, unit rows."""
    plain, steered, lead, touched = [], [], [], []
    for _, batch in blocks(rows, batch_size, "Answers", progress):
        with model.steering(enabled=False):
            before = _cosines(model.image_features_from_cls(batch).features, class_embeds).argmax(-1)
        output = model.image_features_from_cls(batch)
        after = _cosines(output.features, class_embeds)
        best = after.max(-1)
        plain.append(before.cpu())
        steered.append(best.indices.cpu())
        lead.append((best.values - after.gather(-1, before.unsqueeze(-1)).squeeze(-1)).cpu())
        assert output.steered is not None
        touched.append(output.steered.cpu())
    return Predictions(torch.cat(plain), torch.cat(steered), torch.cat(lead), torch.cat(touched))


def class_gains(predictions: Predictions, labels: torch.Tensor, num_classes: int) -> list[dict[str, Any]]:
    """Accuracy of each class that has images, with plain and with steered CLIP, in %: `index`, `support`, `plain`,
    `steered`."""
    found = class_changes(predictions.plain, predictions.steered, labels, num_classes)
    names = ("support", "plain", "steered")
    return [{"index": i} | {name: one[name] for name in names} for i, one in enumerate(found) if one["support"]]


def clearest_changes(
    predictions: Predictions, labels: torch.Tensor, fixed: bool, number: int, per_class: int = 2
) -> list[int]:
    """Rows that steering fixed (or broke), the clearest change first, at most `per_class` of one true class."""
    before, after = predictions.plain == labels, predictions.steered == labels
    wanted = (~before & after) if fixed else (before & ~after)
    rows = wanted.nonzero().squeeze(-1)
    ranked = rows[predictions.lead[rows].argsort(descending=True, stable=True)].tolist()
    return few_of_each(ranked, lambda row: int(labels[row]), number, per_class)


@torch.no_grad()
def movers(
    model: VS2CLIPForZeroShot,
    rows: torch.Tensor,
    old: torch.Tensor,
    new: torch.Tensor,
    class_embeds: torch.Tensor,
    number: int,
) -> list[list[Mover]]:
    """
    The latents that moved each row from class `old` to class `new`, the largest push (by size) first.

    Args:
        rows: CLS rows `(n, hidden_size)`.
        old, new: class indices `(n,)`.
        class_embeds: unit class embeddings `(num_classes, projection_dim)`.
        number: latents a row, at most.
    """
    found = []
    for row, before, after in zip(rows, old, new, strict=True):
        pair = class_embeds[torch.stack([before, after]).to(class_embeds.device)]
        explanation = explain_rows(model.steerer, row.unsqueeze(0), pair, ["old", "new"], {}, {})
        latents = explanation.top("new", number, against="old")
        found.append([Mover(one["latent"], one["value"], one["contribution"]) for one in latents])
    return found


def _cosines(features: torch.Tensor | None, class_embeds: torch.Tensor) -> torch.Tensor:
    assert features is not None
    return unit_embeds(features) @ class_embeds.to(features.device).float().T
