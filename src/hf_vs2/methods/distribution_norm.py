"""Distribution norm: the means of images and texts are subtracted (arXiv 2302.11084), after VS2's step or alone."""

import torch

from ..functional.label_free import LabelFit, balanced_mean, norm_fit
from .base import Method, UnlabelledRows, register


def fit(classes: torch.Tensor, rows: UnlabelledRows) -> LabelFit:
    return norm_fit(classes, rows.mean())


def balanced_fit(classes: torch.Tensor, rows: UnlabelledRows) -> LabelFit:
    """With the mean in which each label counts alike, see [`balanced_mean`]."""
    return norm_fit(classes, balanced_mean(rows.embeds(), classes))


register(
    Method(
        "distribution_norm",
        "distribution norm",
        "The mean image and the mean text are subtracted.",
        fit=fit,
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
