"""How large an SAE is trained and how long, from the number of images alone, and whether to trust what came out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..evaluation.recommendation import LEAST_IMAGES


IMAGES_PER_FEATURE = 500
"""Images for each latent that an SAE has per feature of the activations: 4, the paper's, from 2,000 images on."""
MOST_FVU = 0.6
"""On images held out from training: an SAE that leaves more than that of what tells images apart unexplained is not
trusted."""


@dataclass(frozen=True)
class SAEPlan:
    """
    Args:
        expansion_factor (`int`): latents per feature of the activations. top_k (`int`): latents active for one image.
        max_steps (`int`, *optional*): of training; `None` is what `hf-vs2 train` takes.
    """

    expansion_factor: int
    top_k: int
    max_steps: int | None


def sae_plan(num_images: int, hidden_size: int) -> SAEPlan:
    """
    The rule: a latent per feature for every 500 images, 1 to 4 of them; a twelfth of the features active, as in the
    paper (64 of 768); 1,500 steps or 5 passes over the images, whichever is more, but below 500 images 3 steps an
    image and at least 100. Fewer than 20 images train nothing: 1 step, for the file.
    """
    expansion = min(4, max(1, num_images // IMAGES_PER_FEATURE))
    steps = None if num_images >= 500 else max(100, 3 * num_images)
    return SAEPlan(expansion, max(1, hidden_size // 12), 1 if num_images < LEAST_IMAGES else steps)


def trust(num_images: int, metrics: dict[str, Any]) -> tuple[bool, str]:
    """Whether methods that read the SAE may be chosen, and why, in a sentence."""
    fvu = metrics.get("fvu")
    if num_images < LEAST_IMAGES:
        return False, (
            f"{num_images} images are too few to learn anything from (at least {LEAST_IMAGES} are needed; a few "
            "hundred are a start), so no sparse autoencoder (SAE) was trained."
        )
    if fvu is None or fvu > MOST_FVU:
        shown = "is not known" if fvu is None else f"is {fvu:.2f}"
        worse = " (1 is no better than the mean of the images)" if fvu is not None and fvu > 0.9 else ""
        return False, (
            f"The sparse autoencoder (SAE) is not to be trusted: on {metrics.get('held_out_rows', 0)} images that it "
            f"was not trained on, the part of an image that it leaves unexplained (FVU) {shown}{worse}, and "
            f"{MOST_FVU} is the limit. {num_images:,} images are too few for it. Methods that need it were left out; "
            "those that need only statistics of your images, and plain CLIP, were not."
        )
    return True, (
        f"The sparse autoencoder (SAE) explains {1 - fvu:.0%} of what tells images apart, on "
        f"{metrics['held_out_rows']:,} images that it was not trained on (FVU {fvu:.2f}; at most {MOST_FVU} is "
        "trusted)."
    )
