"""The paper's equations as pure tensor functions (Chatzoudis et al., arXiv 2506.01247).

Shapes: `x` is `(batch, hidden_size)`, a batch of CLS activations; `values` and `indices` are `(batch, top_k)`, the
active latents of each row; `decoder` is `(num_latents, hidden_size)`, one decoder direction `d_i` a row. `gamma` is a
number or one factor a latent, `(num_latents,)`. Everything differentiable stays differentiable; nothing is modified in
place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .sparse_ops import sparse_decode


ACTIVATIONS = ("relu", "absolute")


def top_k(pre_activations: torch.Tensor, k: int, activation: str = "relu") -> tuple[torch.Tensor, torch.Tensor]:
    """TopK of eq. 1: the `k` entries of each row that stay, as `(values, indices)`, each `(batch, k)`.

    `"absolute"` keeps the entries of largest absolute value with their sign, as eq. 1 is printed. `"relu"` applies
    ReLU first, as the released training code (EleutherAI's `sparsify`) does; a row with fewer than `k` positive
    entries then has values of exactly zero, which contribute nothing.
    """
    if activation == "relu":
        # ReLU keeps the order, so it can wait for the few that are left: no second `(batch, num_latents)` tensor.
        values, indices = pre_activations.topk(k, dim=-1, sorted=False)
        return torch.relu(values), indices
    if activation == "absolute":
        indices = pre_activations.abs().topk(k, dim=-1, sorted=False).indices
        return pre_activations.gather(-1, indices), indices
    raise ValueError(f"activation must be one of {ACTIVATIONS}, not {activation!r}")


def amplify(values: torch.Tensor, indices: torch.Tensor, gamma: float | torch.Tensor) -> torch.Tensor:
    """The amplified code `gamma * c` of eq. 2, as values on the same indices: `(batch, top_k)`."""
    return values * (gamma[indices] if isinstance(gamma, torch.Tensor) and gamma.ndim else gamma)


def steering_vector(
    values: torch.Tensor, indices: torch.Tensor, decoder: torch.Tensor, gamma: float | torch.Tensor
) -> torch.Tensor:
    """Eq. 2: `v = D(gamma c) - D(c) = sum_i (gamma_i - 1) c_i d_i`, `(batch, hidden_size)`. The decoder's bias
    cancels."""
    return sparse_decode(amplify(values, indices, gamma) - values, indices, decoder)


def contrastive_direction(
    values: torch.Tensor,
    indices: torch.Tensor,
    positive: torch.Tensor,
    decoder: torch.Tensor,
    gamma: float | torch.Tensor,
) -> torch.Tensor:
    """Eq. 5 (VS2++): `(gamma - 1) W_dec (mean c over positives - mean c over negatives)`, `(batch, hidden_size)`.

    The arguments are those of [`contrastive_change`].
    """
    return sparse_decode(*contrastive_change(values, indices, positive, gamma), decoder)


def contrastive_change(
    values: torch.Tensor, indices: torch.Tensor, positive: torch.Tensor, gamma: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What eq. 5 adds to the code: `(change, indices)`, each `(batch, neighbours * top_k)`. A latent may occur several
    times.

    `values` and `indices` are the codes of each row's neighbours, `(batch, neighbours, top_k)`; `positive` is bool
    `(batch, neighbours)`, the others are the negatives; an empty set has mean 0. It is one sum over active latents,
    each weighted `1 / |positives|` or `-1 / |negatives|`: nothing of width `num_latents` is formed.
    """
    size = positive.sum(-1, keepdim=True)
    size = torch.where(positive, size, size - positive.shape[-1])  # the negatives' count, negative as their weight
    weighted = values / size.unsqueeze(-1)
    change = amplify(weighted, indices, gamma) - weighted
    return change.flatten(1), indices.flatten(1)


def edited_change(
    values: torch.Tensor,
    indices: torch.Tensor,
    change: torch.Tensor,
    changed: torch.Tensor,
    edits: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    A change of the code with some latents changed by hand, as `(change, indices)`, each `(batch, m + num_edits)`.

    Args:
        values, indices: the code, `(batch, top_k)`.
        change, changed: what a method adds to the code and to which latents, `(batch, m)`. At edited latents it is
            replaced by 0.
        edits: the edited latents, factors and targets, each `(num_edits,)`: the value `c` of such a latent, 0 where it
            is not active, becomes `factor * c + target`.
    """
    latents, factors, targets = edits
    here = indices.unsqueeze(-1) == latents
    value = torch.where(here, values.unsqueeze(-1), 0).sum(1)
    by_hand = factors.to(value.dtype) * value + targets.to(value.dtype) - value
    kept = torch.where((changed.unsqueeze(-1) == latents).any(-1), 0, change)
    return torch.cat([kept, by_hand], dim=1), torch.cat([changed, latents.expand(changed.shape[0], -1)], dim=1)


class ScoreParts(NamedTuple):
    """Class scores before and after steering, and the parts of the difference; see [`score_parts`]. All but the last
    are `(batch, num_classes)`."""

    plain: torch.Tensor
    steered: torch.Tensor
    normalisation: torch.Tensor
    replacement: torch.Tensor
    contributions: torch.Tensor
    """`(batch, num_classes, m)`: of each changed latent."""


def score_parts(
    x: torch.Tensor,
    start: torch.Tensor,
    change: torch.Tensor,
    directions: torch.Tensor,
    scale: torch.Tensor,
    tail: tuple[torch.Tensor, torch.Tensor, float | None],
    length: tuple[torch.Tensor, torch.Tensor],
) -> ScoreParts:
    """
    Cosine scores of steered rows as sums over latents: `plain + normalisation + replacement + sum_j contributions_j =
    steered`.

    Steering makes `y = s (start + sum_j w_j d_j)` of a row `x`. With a bar for a row less its own mean, `A = C W
    diag(g)` and `a = C W b` (LayerNorm's weight `g` and bias `b`, projection `W`, unit class embeddings `C`), the
    cosines with the classes are

        (A y_bar / sigma(y) + a) / n(y),  sigma(y) = sqrt(var(y) + eps),  n(y) = ||W LN(y)||

    Given the two normalisers of the steered row, `sigma(y)` and `n(y)`, and `s`, this is affine in the row, and so,
    exactly,

        contributions_j = s w_j A d_j_bar / (sigma(y) n(y))
        replacement     = s A (start - x)_bar / (sigma(y) n(y)),  0 where the method moves `x` itself
        normalisation   = s A x_bar / (sigma(y) n(y)) + a / n(y), less the plain score of `x`

    The last is what `x` scores with the steered row's normalisers, less what it scores with its own.

    Args:
        x, start: `(batch, hidden_size)`.
        change: the `w`, `(batch, m)`.
        directions: the `d`, `(batch, m, hidden_size)`.
        scale: the `s`, `(batch,)`.
        tail: `(A, a, eps)`, of shapes `(num_classes, hidden_size)` and `(num_classes,)`; without an `eps` there is no
            LayerNorm: rows are not centred, and `sigma` is 1.
        length: `(W diag(g), W b)`, of shapes `(projection_dim, hidden_size)` and `(projection_dim,)`, for `n`.
    """
    weight, bias, eps = tail
    if eps is not None:  # A of a row less its mean is A less its own mean of the row
        weight = weight - weight.mean(-1, keepdim=True)
    moved = scale.unsqueeze(-1) * (start + torch.einsum("bm,bmh->bh", change, directions))

    def normalisers(row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if eps is None:
            centred, deviation = row, row.new_ones(len(row), 1)
        else:
            centred = row - row.mean(-1, keepdim=True)
            deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        embeds = F.linear(centred / deviation, *length)
        norm = embeds.norm(dim=-1, keepdim=True)
        # An embedding of length 0 scores 0, as in the model.
        return 1 / deviation, torch.where(norm > 0, 1 / norm, 0)

    before, after = normalisers(x), normalisers(moved)
    plain = (F.linear(x, weight) * before[0] + bias) * before[1]
    slope = scale.unsqueeze(-1) * after[0] * after[1]
    towards = torch.einsum("bmh,ch->bcm", directions, weight)
    return ScoreParts(
        plain=plain,
        steered=(F.linear(moved, weight) * after[0] + bias) * after[1],
        # As differences, so that it is exactly 0 for a row that did not move.
        normalisation=F.linear(x, weight) * (slope - before[0] * before[1]) + bias * (after[1] - before[1]),
        replacement=F.linear(start - x, weight) * slope,
        contributions=towards * (slope * change).unsqueeze(1),
    )


def prototype_alignment(values: torch.Tensor, indices: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """PASS (appendix L): the mean over rows of `||z_i - mean z of class(i)||^2`, a scalar.

    The class means are those of these rows. `labels` is `(batch,)` int64; rows with a negative one are left out, and
    without any labelled row the result is 0. It is taken as `(sum_i ||z_i||^2 - sum_c n_c ||m_c||^2) / n`, so that
    only the classes that are present get a dense row of latents; the indices of a row must differ, as those of top-k
    do. At least float32.
    """
    known = labels >= 0
    values, indices = values[known].to(torch.promote_types(values.dtype, torch.float32)), indices[known]
    if not len(values):
        return values.sum()
    classes, class_of, sizes = labels[known].unique(return_inverse=True, return_counts=True)
    num_latents = int(indices.max()) + 1
    cells = class_of[:, None] * num_latents + indices
    sums = values.new_zeros(len(classes) * num_latents)
    # Not index_add: on a GPU it adds in an order that changes from run to run.
    sums = sums.index_put((cells.flatten(),), values.flatten(), accumulate=True)
    between = sums.view(len(classes), num_latents).square().sum(-1) / sizes
    return (values.square().sum() - between.sum()) / len(values)


def keep_norm(moved: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Algorithm 1, last step: `moved` rescaled row by row to the norm of `x`. A row moved to exactly 0 stays 0.

    Squares are summed in the rows' dtype: in float32 a row shorter than about 1e-22 counts as 0, and one longer than
    1.8e19 gives what is not finite. [`VS2CLIPForZeroShot`] leaves such a row as it was.
    """
    moved_norm = moved.norm(dim=-1, keepdim=True)
    # Divided by infinity, the row would be 0: finite, and wrong.
    scale = (x.norm(dim=-1, keepdim=True) / moved_norm).masked_fill(moved_norm.isinf(), torch.nan)
    return moved * torch.where(moved_norm > 0, scale, torch.zeros_like(scale))


def steer(x: torch.Tensor, direction: torch.Tensor, lambda_: float) -> torch.Tensor:
    """Eq. 3: `(x + lambda v) * ||x|| / ||x + lambda v||`."""
    return keep_norm(x + lambda_ * direction, x)


def centroid_steer(x: torch.Tensor, centroid: torch.Tensor, alpha: float) -> torch.Tensor:
    """The control that proposition 3.1 calls for: `x + alpha (x - mu)`, norm kept, no SAE involved.

    VS2 with a perfect reconstruction equals this with `alpha = lambda (gamma - 1)` and `mu = b_pre`.
    """
    return keep_norm(x + alpha * (x - centroid), x)


def fvu_per_sample(x: torch.Tensor, reconstruction: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """`||x~ - x||^2 / ||x - mu||^2` for each row, float32 `(batch,)`; `mean` is that of the TRAINING activations.

    A row that sits exactly on the mean has no variance to explain: its FVU is infinite unless it is reconstructed
    exactly. So is that of a row too large for float32, whose squares overflow. A row with a NaN or infinity has a NaN
    FVU, which no gate lets through; no other row has.
    """
    x = x.float()
    error = (reconstruction.float() - x).square().sum(-1)
    spread = (x - mean.float()).square().sum(-1)
    fvu = torch.where(error == 0, torch.zeros_like(error), error / spread)
    return torch.where(fvu.isnan() & x.isfinite().all(-1), torch.full_like(fvu, torch.inf), fvu)


def gate(fvu: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which rows to steer: those with `FVU(x) <= tau`, bool `(batch,)`. The rest keep plain CLIP's result exactly.

    tau 0 passes exact reconstructions alone, an infinite tau every row whose FVU is a number.
    """
    return fvu <= threshold
