"""Anchored prototypes: CLIP's own scores kept whole, and beside them what unlabelled rows teach, as far as the rows
themselves support it.

Shapes: `embeds` is `(n, projection_dim)`, unit image embeddings `f`; `classes` is `(num_classes, projection_dim)`,
unit class embeddings `W`; `temperature` is the CLIP's `T = exp(logit_scale)`. Fitting is worked out in float64, where
neither the order of the rows nor the device shows. Nothing is modified in place.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import normalize

from .label_free import LabelFit, exact


STRENGTH = 22.0
"""Nats that a unit of cosine to a prototype adds to a logit, where everything is trusted (beta)."""
ROWS = 20.0
"""A prototype that rests on so many rows counts half (kappa)."""
ROUNDS = 2
# Rows of a label that make its mean count half in the centre.
_CENTRE_ROWS = 5.0
# A label with a smaller share of the rows counts as having this one when rows are dealt out.
_LEAST_SHARE = 0.1
_SHARE_STEPS = 20
# The part of the text's answer that the other rows explain: nothing is trusted up to the first, everything from the
# second.
_EXPLAINED = (0.5, 0.6)
# Share of the commonest label: everything is trusted up to the first, nothing from the second.
_COMMONEST = (0.4, 0.6)
# Fewer nats than this change no answer worth the name: plain CLIP, bit for bit.
_LEAST_NATS = 0.1
_NEWTON_STEPS, _SHARPEST = 30, 100.0
# Of squared lengths that are divided by.
_TINY = 1e-12


def fit_anchored_prototypes(embeds: torch.Tensor, classes: torch.Tensor, temperature: float) -> LabelFit:
    """
    Fit prototypes to unlabelled rows for one label set, and how far they may be trusted.

    With `l_ic = T f_i . W_c`, `p = softmax(l)`:

    1. *Who has how many rows.* `r_i = softmax(l_i + log max(s, 0.1))` and `s_c = mean_i r_ic`, in turns (expectation
       maximisation): a label that has more than a tenth of the rows may claim the more of them. Without this the
       rarest labels of rows that are mostly of one label are made of that label's rows.
    2. *Centre.* `m = sum_c a_c mu_c / sum_c a_c`, `mu_c = sum_i r_ic f_i / n_c`, `n_c = sum_i r_ic`, `a_c = n_c / (n_c
       + 5)`: each label counts alike. `x_i = norm(f_i - m)`.
    3. *What the other rows say.* `v_ic = x_i . norm(sum_{j != i} r_jc x_j)`: no row judges its own prototype.
    4. *Trust.* `R = 1 - min_b H(b) / log C`, where `H(b)` is the cross-entropy of `softmax(b v_i)` to `r_i`, each
       label counted alike (weights `r_ic / (n_c + 5)`): how much of what the text says of a row the other rows tell
       too. Where they tell less than half, `h = 0`; from 0.6 on `h = 1`. Where one label has more than 0.4 of the
       rows, h falls, to 0 at 0.6.
    5. Twice: `r_i = softmax(l_i + log max(s, 0.1) + 22 h w_ic (v_ic - u_i))`, `w_ic = (n_c - r_ic) / (n_c - r_ic +
       20)`, where `u_i = sum_c p_ic w_ic v_ic / sum_c p_ic w_ic` is what prototypes say on average of the labels that
       the text sees: a label with few rows is neither favoured nor punished. Then `P_c = norm(sum_i r_ic x_i)`, `w_c =
       n_c / (n_c + 20)`.

    All constants are in nats, rows or shares, so that they mean the same for every CLIP whose softmax is a
    probability; docs/true-clip.md says where each comes from. Rows that are exactly alike count once. Labels that a
    model scores by a sigmoid have no such softmax: don't fit them.

    Args:
        embeds: unit embeddings of unlabelled images.
        classes: unit class embeddings.
        temperature: `exp(logit_scale)`, 100 for OpenAI's CLIPs.

    Returns:
        [`LabelFit`] for [`anchored_scores`]: `weights` are `n_c / (n_c + 20)`, `scale` is `22 h / T` (0: plain CLIP),
        and `facts` holds the `temperature`, `explained` (R; at most 0.5: plain CLIP), `commonest`, the share of the
        commonest label (at least 0.6: plain CLIP), and
        `trust`, which is h, or 0 where it would change next to nothing: plain CLIP, bit for bit.
    """
    rows, texts = exact(embeds).unique(dim=0), exact(classes)
    logits = temperature * rows @ texts.T
    seen = logits.softmax(-1)
    shares, prior = _shares(logits)
    received = shares.sum(0)
    commonest = received.amax() / max(1, len(rows))
    counted = received / (received + _CENTRE_ROWS)
    means = (shares.T @ rows) / received.clamp_min(_TINY).unsqueeze(-1)
    mean = (counted.unsqueeze(-1) * means).sum(0) / counted.sum().clamp_min(_TINY)
    queries = normalize(rows - mean, dim=-1)
    cosines, left = _without_own(shares, queries)
    explained = _explained(cosines, shares / (received + _CENTRE_ROWS))
    nats = STRENGTH * _ramp(explained, *_EXPLAINED) * (1 - _ramp(commonest, *_COMMONEST))
    for number in range(ROUNDS):
        if number:
            cosines, left = _without_own(shares, queries)
        shares = (logits + prior + nats * _relative(cosines, left / (left + ROWS), seen)).softmax(-1)
    received = shares.sum(0)
    weights = received / (received + ROWS)
    nats = torch.where(nats * weights.amax() < _LEAST_NATS, 0.0, nats)
    prototypes = normalize(shares.T @ queries, dim=-1)
    facts = {"temperature": temperature, "explained": explained.item(), "commonest": commonest.item()}
    facts["trust"] = nats.item() / STRENGTH
    parts = [part.to(classes) for part in (mean, prototypes, weights, received, nats / temperature)]
    return LabelFit(parts[0], parts[1], parts[2], parts[3], parts[4], facts=facts)


def anchored_scores(embeds: torch.Tensor, classes: torch.Tensor, fit: LabelFit) -> torch.Tensor:
    """
    `(batch, num_classes)` scores on the scale of plain cosines, to be multiplied by the temperature as those are.

    `e . W_c + scale w_c (v_c - u)` with `v_c = norm(e - m) . P_c` and `u = sum_c p_c w_c v_c / sum_c p_c w_c`, `p =
    softmax(T e W^T)`. What is added is 0 on average over the labels that the text sees, so scores stay where they
    were; with a scale of 0 they are plain CLIP's, bit for bit.
    """
    plain = embeds @ classes.T
    cosines = normalize(embeds - fit.mean, dim=-1) @ fit.prototypes.T
    added = fit.scale * _relative(cosines, fit.weights, (fit.facts["temperature"] * plain).softmax(-1))
    return torch.where(fit.scale != 0, plain + added, plain)


def _shares(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows dealt out, `(n, num_classes)`, and the logarithm of what each label counts for, `(num_classes,)`."""
    shares = logits.softmax(-1)
    for _ in range(_SHARE_STEPS):
        prior = (shares.sum(0) / max(1, len(logits))).clamp_min(_LEAST_SHARE).log()
        shares = (logits + prior).softmax(-1)
    return shares, prior


def _without_own(shares: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines of each row to the prototypes of all other rows, and how many rows these rest on, both `(n,
    num_classes)`."""
    sums = shares.T @ queries
    dots = queries @ sums.T
    squares = sums.square().sum(-1) - 2 * shares * dots + shares.square()
    return (dots - shares) / squares.clamp_min(_TINY).sqrt(), (shares.sum(0) - shares).clamp_min(0)


def _relative(cosines: torch.Tensor, weights: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """`w (v - u)`: what the prototypes say, less what they say on average of the labels that the text sees."""
    looked = seen * weights
    average = (looked * cosines).sum(-1, keepdim=True) / looked.sum(-1, keepdim=True).clamp_min(_TINY)
    return weights * (cosines - average)


def _explained(cosines: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`1 - min_b H(b) / log C`, a scalar; H is convex in b, so Newton finds it."""
    num_classes = cosines.shape[1]
    if num_classes == 1 or not len(cosines):
        return cosines.new_zeros(())
    each, total = targets.sum(-1, keepdim=True), targets.sum()
    wanted = (targets * cosines).sum()
    sharpness = cosines.new_tensor(8.0)
    for _ in range(_NEWTON_STEPS):
        guesses = (sharpness * cosines).softmax(-1)
        average = (guesses * cosines).sum(-1, keepdim=True)
        slope = (each * average).sum() - wanted
        curve = (each * (guesses * (cosines - average).square()).sum(-1, keepdim=True)).sum()
        step = (slope / curve.clamp_min(_TINY)).clamp(-8, 8)
        sharpness = (sharpness - step).clamp(0, _SHARPEST)
        if step.abs() < 1e-6:
            break
    entropy = -(targets * (sharpness * cosines).log_softmax(-1)).sum() / total.clamp_min(_TINY)
    return 1 - entropy / math.log(num_classes)


def _ramp(value: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return ((value - low) / (high - low)).clamp(0, 1)


__all__ = ["anchored_scores", "fit_anchored_prototypes"]
