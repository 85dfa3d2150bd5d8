"""Methods that move rows as one method does, and score them as another."""

from .base import then


then(
    "vs2",
    "full_distribution_norm",
    name="vs2+distribution_norm",
    label="VS2, then distribution norm",
    summary="VS2's step, then the means of the steered images and of the texts are subtracted.",
)
then(
    "corrected",
    "full_distribution_norm",
    name="corrected+distribution_norm",
    label="corrected VS2, then distribution norm",
    summary="The same after the step of corrected VS2.",
    compared=True,
)
