"""VS2++: towards the latents that an image's neighbours of one pseudo-label share."""

from ..functional.equations import contrastive_change
from .base import Batch, LatentStep, Method, register


def step(batch: Batch) -> LatentStep:
    """Eq. 5: `lambda (gamma - 1) W_dec (mean c over positives - mean c over negatives)` is added, the norm kept."""
    change, latents = contrastive_change(*batch.neighbors(), batch.gamma)
    return batch.moved(batch.lambda_ * change, latents)


register(
    Method(
        "vs2++",
        "VS2++",
        "The paper's section 4.2: towards the latents that an image's neighbours in an unlabelled corpus share.",
        step=step,
        needs_corpus=True,
        explains=True,
        shows=("gamma", "lambda"),
    )
)
