"""Visual Sparse Steering (VS2), the paper's method."""

from ..functional.equations import amplify
from .base import Batch, LatentStep, Method, register


def step(batch: Batch) -> LatentStep:
    """Eq. 2 and 3: amplify the active latents by gamma, decode the change, add lambda of it, keep the norm."""
    change = batch.lambda_ * (amplify(batch.values, batch.indices, batch.gamma) - batch.values)
    return batch.moved(change, batch.indices)


register(
    Method(
        "vs2",
        "VS2",
        "The paper's method (eq. 2 and 3): the active latents of an image are amplified.",
        step=step,
        explains=True,
        shows=("gamma", "lambda"),
        controls={"vs2_random": "random", "vs2_pca": "pca"},
        compared=True,
        headline=True,
        compared_gated=True,
        candidate=True,
    )
)
