"""The control of proposition 3.1: away from the mean of the training rows, without the SAE."""

from .base import Batch, LatentStep, Method, register


def step(batch: Batch) -> LatentStep:
    """`x + alpha (x - mu)`, norm kept."""
    return batch.moved(start=batch.x + batch.alpha * (batch.x - batch.mean.to(batch.x.dtype)))


register(
    Method(
        "centroid",
        "centroid, no SAE",
        "Each image is moved away from the mean image: what VS2 would be with a perfect SAE (proposition 3.1).",
        step=step,
        one_direction=True,
        shows=("gamma", "lambda"),
        compared=True,
        headline=True,
    )
)
