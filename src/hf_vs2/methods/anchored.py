"""Anchored prototypes: CLIP's own scores, and beside them what unlabelled rows teach, as far as the rows support
it."""

from collections.abc import Sequence

import torch

from ..functional.anchored import anchored_scores, fit_anchored_prototypes
from ..functional.label_free import LabelFit
from .base import Method, UnlabelledRows, register


def fit(classes: torch.Tensor, rows: UnlabelledRows) -> LabelFit:
    return fit_anchored_prototypes(rows.embeds(), classes, rows.temperature())


def score(
    embeds: torch.Tensor, classes: torch.Tensor, known: LabelFit, views: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    return anchored_scores(embeds, classes, known)


register(
    Method(
        "anchored_prototypes",
        "anchored prototypes",
        "CLIP's scores, and what unlabelled images add as far as they can be trusted; else plain CLIP, bit for bit.",
        fit=fit,
        score=score,
        needs_rows=True,
        needs_softmax=True,
        compared=True,
        headline=True,
        candidate=True,
    )
)
