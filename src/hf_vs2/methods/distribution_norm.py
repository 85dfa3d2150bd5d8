"""Distribution norm: the means of images and texts are subtracted (arXiv 2302.11084), a quarter of them or in full."""

import torch

from ..functional.label_free import LabelFit, balanced_mean, norm_fit
from .base import Method, UnlabelledRows, register


def fit(classes: torch.Tensor, rows: UnlabelledRows) -> LabelFit:
    """`norm(e - c mean e) . norm(W - c mean W)`, c the setting `coefficient`. The authors' code has c = 0.25 too, but
    does not bring embeddings to unit length first."""
    found = norm_fit(classes, rows.mean(), rows.coefficient)
    return found._replace(facts={"coefficient": rows.coefficient})


def full_fit(classes: torch.Tensor, rows: UnlabelledRows) -> LabelFit:
    return norm_fit(classes, rows.mean())


def balanced_fit(classes: torch.Tensor, rows: UnlabelledRows) -> LabelFit:
    """With the mean in which each label counts alike, see [`balanced_mean`]."""
    return norm_fit(classes, balanced_mean(rows.embeds(), classes))


register(
    Method(
        "distribution_norm",
        "distribution norm",
        "A quarter (`coefficient`) of the mean image and of the mean text is subtracted.",
        fit=fit,
        shows=("coefficient",),
        compared=True,
        headline=True,
        candidate=True,
    )
)
register(
    Method(
        "full_distribution_norm",
        "full distribution norm",
        "The mean image and the mean text are subtracted in full.",
        fit=full_fit,
        compared=True,
        candidate=True,
    )
)
register(
    Method(
        "balanced_norm",
        "balanced norm",
        "The same with a mean image in which each label counts alike.",
        fit=balanced_fit,
        needs_rows=True,
        compared=True,
        candidate=True,
    )
)
