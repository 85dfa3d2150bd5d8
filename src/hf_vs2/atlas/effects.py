"""What steering with one latent alone does to the classes, on the images that its page shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..clip.modeling import VS2CLIPForZeroShot
from ..data.stores.rows import Rows
from ..encoders.tail import probabilities
from ..functional.equations import keep_norm


NUM_MOVED = 5


class Effect(NamedTuple):
    """The change that one latent makes on some images."""

    images: int
    classes: list[tuple[int, float]]
    """Classes and the mean change of their probability in points, the largest rises, then the largest falls."""
    changes: list[tuple[int, int, int]]
    """`(class before, class after, images)` of answers that change, the commonest first."""


@torch.no_grad()
def effect_of(
    model: VS2CLIPForZeroShot, rows: Rows, chosen: Sequence[int], latent: int, class_embeds: torch.Tensor
) -> Effect | None:
    """
    Steers rows by VS2 with one latent alone, ungated.

    Args:
        chosen: numbers of rows on which the latent is active; `None` is returned where there are none.
        class_embeds: unit class embeddings `(num_classes, projection_dim)`.
    """
    if not chosen:
        return None
    now, sae = model.steering_settings, model.sae
    gamma = now.gamma[latent] if isinstance(now.gamma, tuple) else now.gamma
    x = rows.take(torch.as_tensor(chosen)).to(sae.W_dec.device, torch.float32)
    code = sae(x)
    value = torch.where(code.latent_indices == latent, code.latent_values, 0).sum(-1, keepdim=True).float()
    moved = keep_norm(x + now.lambda_ * (gamma - 1) * value * sae.W_dec[latent].float(), x)
    with model.steering(enabled=False):
        features = [model.image_features_from_cls(some) for some in (x, moved)]
        logits = [model.class_logits(one, class_embeds.to(x.device).float()) for one in features]
    before, after = (probabilities(one, model.clip) for one in logits)
    change = 100 * (after - before).mean(0).cpu()
    order = change.argsort(descending=True).tolist()
    most = [one for one in order[:NUM_MOVED] if change[one] > 0]
    least = [one for one in order[::-1][:NUM_MOVED] if change[one] < 0]
    answers = zip(before.argmax(-1).tolist(), after.argmax(-1).tolist(), strict=True)
    changes = Counter(pair for pair in answers if pair[0] != pair[1]).most_common(NUM_MOVED)
    moved_classes = [(one, change[one].item()) for one in [*most, *least]]
    return Effect(len(x), moved_classes, [(*pair, number) for pair, number in changes])
