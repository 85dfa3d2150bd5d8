"""VS2 whose centroid part is exact, so that a poor SAE does little harm."""

from .base import Batch, LatentStep, Method, register


def step(batch: Batch) -> LatentStep:
    """`x + alpha (x - mu) + alpha / 2 sum_i (z_i - z_mean_i) d_i`, norm kept; see [`corrected_steer`]."""
    x, alpha, statistics = batch.x, batch.alpha, batch.statistics()
    offset = statistics.latent_mean.to(x.dtype) @ batch.decoder.to(x.dtype)
    start = x + alpha * (x - statistics.mean.to(x.dtype)) - alpha / 2 * offset
    return batch.moved(alpha / 2 * batch.values, batch.indices, start=start)


register(
    Method(
        "corrected",
        "corrected VS2",
        "VS2 with an exact centroid part: the SAE adds only what its latents say beyond their means.",
        step=step,
        needs_statistics=True,
        one_direction=True,
        explains=True,
        shows=("gamma", "lambda"),
    )
)
