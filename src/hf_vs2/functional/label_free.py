"""What helps without labels beyond VS2, as pure tensor functions: means subtracted, prototypes fitted, views added.

Shapes: `embeds` is `(batch, projection_dim)`, unit image embeddings `e`; `classes` is `(num_classes, projection_dim)`,
unit class embeddings `W`; `x` is `(batch, hidden_size)`, CLS rows. Nothing is modified in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import normalize

from .equations import keep_norm
from .sparse_ops import sparse_decode


RIDGE = 0.05
"""Share of the mean variance that is added to each component's when rows are whitened."""
VIEW_WEIGHT = 2.0
"""How much a view counts beside the embedding, where a prototype rests on many rows."""
# Of `whitened`: rows that are all alike have no variance to divide by.
_LEAST_VARIANCE = 1e-12
# Of prototypes; one setting served 7 and 500 rows a class (docs/label-free.md).
_SHARPNESS, _ITERATIONS = 20.0, 8
_SHRINKAGE, _BALANCE, _BALANCE_STEPS = 200.0, 0.5, 3
_BALANCED_SHRINKAGE = 500.0
# Of `balanced_mean`.
_SUREST, _CONFIDENCE = 20, 100.0
# Numbers of one block of confidences.
_BLOCK = 2**24


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """In float64, on the CPU where the device has none: sums in which neither the order of the rows nor the device
    shows."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


# Means


def distribution_norm_scores(
    images: torch.Tensor,
    classes: torch.Tensor,
    image_mean: torch.Tensor,
    text_mean: torch.Tensor,
    coefficient: float = 0.5,
    score: str = "dot",
) -> torch.Tensor:
    """Distribution-normalised CLIP (Zhou et al., NeurIPS 2023, arXiv 2302.11084): `(batch, num_classes)` scores.

    With unit embeddings `phi`, `psi` and their means, the paper's first-order score is `S(x, y) = (phi(x) - mu_x /
    2)^T (psi(y) - mu_y / 2)`: coefficient 0.5, `score="dot"`. The text mean adds the same to every class there, so in
    classification the image mean alone decides. `score="cosine"` normalises both sides after the subtraction, as the
    authors' zero-shot code does (fengyuli-dev/distribution-normalization, where the coefficient is 0.25 and the
    embeddings are not normalised first); then the text mean counts too.

    Args:
        images: unit image embeddings `(batch, projection_dim)`; `image_mean` `(projection_dim,)` is the mean of such
            rows.
        classes: unit class embeddings `(num_classes, projection_dim)`; `text_mean` `(projection_dim,)` likewise.
    """
    images, classes = images - coefficient * image_mean, classes - coefficient * text_mean
    if score == "cosine":
        images, classes = normalize(images, dim=-1), normalize(classes, dim=-1)
    elif score != "dot":
        raise ValueError(f"score must be 'dot' or 'cosine', not {score!r}.")
    return images @ classes.T


def centred(embeds: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """`norm(e - mean)`, `(batch, projection_dim)`."""
    return normalize(embeds - mean, dim=-1)


def centred_classes(classes: torch.Tensor, coefficient: float = 1.0) -> torch.Tensor:
    """`P0 = norm(W - c mean W)`, `(num_classes, projection_dim)`. A single class is its own mean and stays as it
    is."""
    return classes if len(classes) == 1 else centred(classes, coefficient * classes.mean(0))


def balanced_mean(embeds: torch.Tensor, classes: torch.Tensor, surest: int = _SUREST) -> torch.Tensor:
    """
    A mean image in which each label counts alike, `(projection_dim,)`: that of the rows which CLIP is surest of, label
    by label.

    The plain mean takes the commonest label's own direction away where the rows are mostly of one label. Here a
    label's share of the rows does not matter; that some of its rows are recognised surely, does.

    Args:
        embeds: unit embeddings of unlabelled images.
        classes: unit class embeddings.
        surest: rows a label, weighted by their probability. A label that no row looks like counts little.
    """
    blocks = embeds.split(max(1, _BLOCK // len(classes)))
    texts = exact(classes)
    odds = torch.cat([_log_odds(_CONFIDENCE * exact(block) @ texts.T).to(embeds) for block in blocks]).T
    surest_odds, chosen = odds.topk(min(surest, len(embeds)), dim=-1)
    weights = torch.ones_like(surest_odds) if len(classes) == 1 else surest_odds.sigmoid()
    mass = weights.sum(-1, keepdim=True)
    means = torch.stack([weight @ embeds[rows] for weight, rows in zip(weights, chosen, strict=True)])
    trust = mass / (mass + 1)
    return (trust * means / mass.clamp_min(torch.finfo(mass.dtype).tiny)).sum(0) / trust.sum()


def _log_odds(logits: torch.Tensor) -> torch.Tensor:
    """`l_c - log sum_{k != c} exp l_k`, shaped as `logits`. Many probabilities are 1 as far as a float can say; their
    odds differ, so that neither the order of the rows nor the device decides which rows are the surest. A single
    label: its logits."""
    if logits.shape[1] == 1:
        return logits
    top = logits.argmax(-1, keepdim=True)
    others = logits.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
    sure = logits.log_softmax(-1)
    # All but the top have at most a half: what is left of 1 is exact for them.
    return (sure - (-sure.exp().clamp_max(0.5)).log1p()).scatter(-1, top, logits.gather(-1, top) - others)


def score_scale(mean: torch.Tensor, classes: torch.Tensor, coefficient: float = 1.0) -> torch.Tensor:
    """What centred cosines are multiplied by to spread as plain cosines do, a scalar.

    `q . P_c` is a cosine of what is left of two unit vectors, whose lengths are about `sqrt(1 - c (2 - c) ||mean||^2)`
    (the root mean square of `||e - c mean||` over the rows that the mean is of, c the coefficient) and `||W_c - c mean
    W||`. Their product puts the scores back on the scale that the model's temperature was trained for. The order of
    the classes does not depend on it.
    """
    left = (1 - coefficient * (2 - coefficient) * mean.square().sum()).clamp_min(0).sqrt()
    if len(classes) == 1:
        return left
    return left * (classes - coefficient * classes.mean(0)).norm(dim=-1).mean()


# Views of a row


class RowStatistics(NamedTuple):
    """What PCA knows of unlabelled CLS rows."""

    mean: torch.Tensor
    """`(hidden_size,)`."""
    components: torch.Tensor
    """`(hidden_size, hidden_size)`: a unit direction a row, of falling variance."""
    variances: torch.Tensor
    """`(hidden_size,)`."""


def whitened(x: torch.Tensor, statistics: RowStatistics) -> torch.Tensor:
    """`pc / sqrt(var + 0.05 mean var)`, `(batch, hidden_size)`: principal components, each scaled to unit variance or
    less."""
    mean, components, variances = (part.to(x.dtype) for part in statistics)
    return ((x - mean) @ components.T) / (variances + RIDGE * variances.mean()).clamp_min(_LEAST_VARIANCE).sqrt()


def row_distance(x: torch.Tensor, statistics: RowStatistics) -> torch.Tensor:
    """Mean square of the whitened components, `(batch,)` float32: on average over the rows of the statistics less than
    1, and the less the fewer directions they fill. Where no SAE is asked for an FVU, the gate takes this. NaN for a
    row that is not finite, which no gate lets through."""
    return whitened(x.float(), statistics).square().mean(-1)


def pca_view(x: torch.Tensor, statistics: RowStatistics) -> torch.Tensor:
    """The whitened row at unit length, `(batch, hidden_size)`."""
    return normalize(whitened(x, statistics), dim=-1)


def latent_view(
    values: torch.Tensor, indices: torch.Tensor, latent_mean: torch.Tensor, latent_frequency: torch.Tensor
) -> torch.Tensor:
    """
    The code less its mean, rare latents counted more, at unit length: `norm((z - z_mean) * idf)`, `(batch,
    num_latents)`, with `idf_i = -log p_i`.

    Args:
        values, indices: the code, `(batch, top_k)`.
        latent_mean: `(num_latents,)`, the mean value of each latent over unlabelled rows, zeros counted.
        latent_frequency: `(num_latents,)`, the share `p` of those rows in which it is active, `(n p + 1) / (n + 1)` of
            n rows.
    """
    dense = torch.zeros(values.shape[0], len(latent_mean), dtype=values.dtype, device=values.device)
    dense = dense.scatter_add(1, indices, values)
    return normalize((dense - latent_mean) * -latent_frequency.log(), dim=-1)


# Steering


def corrected_steer(
    x: torch.Tensor,
    mean: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    latent_mean: torch.Tensor,
    decoder: torch.Tensor,
    alpha: float,
) -> torch.Tensor:
    """
    `x + alpha (x - mu) + alpha / 2 sum_i (z_i - z_mean_i) d_i`, norm kept, `(batch, hidden_size)`.

    VS2 moves a row by `alpha (x~ - b_pre)` and so carries the SAE's error (proposition 3.1). Here the centroid part is
    exact, and the SAE only adds what its latents say beyond their own means: a poor SAE does little harm.
    """
    deviation = sparse_decode(values, indices, decoder).to(x.dtype) - latent_mean.to(x.dtype) @ decoder.to(x.dtype)
    return keep_norm(x + alpha * (x - mean) + alpha / 2 * deviation, x)


# Prototypes


class LabelFit(NamedTuple):
    """What scores images for one label set: `scale (q . P_c + 2 sum_v w_c^2 a_v . M_vc)`, `q = norm(e - mean)`."""

    mean: torch.Tensor
    """`(projection_dim,)`: taken from an image's unit embedding."""
    prototypes: torch.Tensor
    """`(num_classes, projection_dim)`, of unit length."""
    weights: torch.Tensor
    """`(num_classes,)`: how much each prototype rests on rows rather than on text, 0 to 1."""
    received: torch.Tensor
    """`(num_classes,)`: how many unlabelled rows each prototype rests on; shares of rows add up."""
    scale: torch.Tensor
    """A scalar, see [`score_scale`]."""
    views: tuple[torch.Tensor, ...] = ()
    """One matrix `(num_classes, d_v)` a view, with rows of unit length."""
    facts: Mapping[str, float] = {}
    """What else a method's scores need, or a user may want to know, by name."""

    @property
    def num_floats(self) -> int:
        return sum(part.numel() for part in (*self[:5], *self.views))

    def on(self, device: torch.device) -> LabelFit:
        """The same on a device."""
        mean, prototypes, weights, received, scale = (part.to(device) for part in self[:5])
        views = tuple(view.to(device) for view in self.views)
        return LabelFit(mean, prototypes, weights, received, scale, views, self.facts)


def label_scores(embeds: torch.Tensor, fit: LabelFit, views: Sequence[torch.Tensor] = ()) -> torch.Tensor:
    """`(batch, num_classes)` scores on the scale of plain cosines; `views` `(batch, d_v)` in the order of the
    fit's."""
    scores = centred(embeds, fit.mean) @ fit.prototypes.T
    return fit.scale * _with_views(scores, fit.weights, views, fit.views)


def _with_views(
    scores: torch.Tensor, weights: torch.Tensor, views: Sequence[torch.Tensor], means: Sequence[torch.Tensor]
) -> torch.Tensor:
    for view, mean in zip(views, means, strict=True):
        scores = scores + VIEW_WEIGHT * weights.square() * (view @ mean.T)
    return scores


def norm_fit(classes: torch.Tensor, mean: torch.Tensor, coefficient: float = 1.0) -> LabelFit:
    """Distribution norm as a [`LabelFit`]: `norm(e - c mean) . norm(W - c mean W)`, the classes' own directions, and
    no rows behind them. By default the means are subtracted in full, which is where prototypes begin."""
    none, scale = torch.zeros_like(classes[:, 0]), score_scale(mean, classes, coefficient)
    return LabelFit(coefficient * mean, centred_classes(classes, coefficient), none, none, scale)


def fit_prototypes(
    embeds: torch.Tensor, classes: torch.Tensor, mean: torch.Tensor, views: Sequence[torch.Tensor] = ()
) -> LabelFit:
    """
    KM-MAP: k-means from text anchors, each prototype shrunk towards its text by the rows that it received.

    Eight times: `r = softmax(20 scores)`; three times column c of r is divided by `(C mean r_c)^0.5` and rows are made
    to sum to 1 again; `n_c = sum r_c`, `w_c = n_c / (n_c + 200)`, `P_c = norm((1 - w_c) P0_c + w_c norm(sum r_c q))`,
    and for each view `M_c = norm(sum r_c a)`, which adds `2 w_c^2 a . M_c` to the scores. The division is a balance
    assumption: on rows that are mostly of one label it does harm, see `docs/label-free.md`. No row leaves the text's
    own directions: distribution norm.

    Args:
        embeds: unit embeddings of unlabelled images, `(n, projection_dim)`. A few thousand are enough, more are not
            better.
        classes: unit class embeddings.
        mean: what is subtracted from embeddings, `(projection_dim,)`.
        views: `(n, d_v)` each, of unit length.
    """
    everyone = torch.ones_like(embeds[:, :1])
    return _fit(embeds, norm_fit(classes, mean), views, everyone, _SHRINKAGE, _evened)


def fit_balanced_prototypes(embeds: torch.Tensor, classes: torch.Tensor) -> LabelFit:
    """
    Prototypes without a balance assumption, for rows that may be mostly of one label.

    As [`fit_prototypes`], but with the [`balanced_mean`], no division of columns, `w_c = n_c / (n_c + 500)`, and each
    row counted `u = sum_c r_c min(1, n / (C n_c))` times, with the r and n of distribution norm: no label starts with
    more than an even share of the rows, and a common one may still earn them.

    Args:
        embeds, classes: as there.
    """
    start = norm_fit(classes, balanced_mean(embeds, classes))
    shares = (_SHARPNESS * centred(embeds, start.mean) @ start.prototypes.T).softmax(-1)
    even = len(embeds) / len(classes)
    counted = (shares * (even / shares.sum(0)).clamp_max(1)).sum(-1, keepdim=True)
    return _fit(embeds, start, (), counted, _BALANCED_SHRINKAGE, lambda shares: shares)


def _fit(
    embeds: torch.Tensor,
    start: LabelFit,
    views: Sequence[torch.Tensor],
    counted: torch.Tensor,
    shrinkage: float,
    balance: Callable[[torch.Tensor], torch.Tensor],
) -> LabelFit:
    """`counted` `(n, 1)` says how often each row counts, `balance` changes its shares `(n, num_classes)`."""
    queries, anchors = centred(embeds, start.mean), start.prototypes
    fit = start._replace(views=tuple(view.new_zeros(len(anchors), view.shape[1]) for view in views))
    for _ in range(_ITERATIONS if len(embeds) else 0):
        scores = _with_views(queries @ fit.prototypes.T, fit.weights, views, fit.views)
        shares = (balance((_SHARPNESS * scores).softmax(-1)) * counted).T
        received = shares.sum(-1)
        weights = received / (received + shrinkage)
        own = weights.unsqueeze(-1)
        fit = fit._replace(
            prototypes=normalize((1 - own) * anchors + own * normalize(shares @ queries, dim=-1), dim=-1),
            weights=weights,
            received=received,
            views=tuple(normalize(shares @ view, dim=-1) for view in views),
        )
    return fit


def _evened(shares: torch.Tensor) -> torch.Tensor:
    num_classes = shares.shape[1]
    for _ in range(_BALANCE_STEPS):
        column = (num_classes * shares.mean(0)).clamp_min(torch.finfo(shares.dtype).tiny)
        shares = shares / column**_BALANCE
        shares = shares / shares.sum(-1, keepdim=True)
    return shares


__all__ = [
    "LabelFit",
    "RowStatistics",
    "balanced_mean",
    "centred",
    "centred_classes",
    "corrected_steer",
    "distribution_norm_scores",
    "fit_balanced_prototypes",
    "fit_prototypes",
    "label_scores",
    "latent_view",
    "norm_fit",
    "pca_view",
    "row_distance",
    "score_scale",
    "whitened",
]
