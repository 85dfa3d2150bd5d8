"""Accuracy over a grid of gamma and lambda in closed form: a cell costs a few operations a class score, no projection.

With one gamma, VS2 moves a row `x` along one direction, `r = W_dec^T c`, by `alpha = lambda (gamma - 1)`; the norm is
kept:

    y = s (x + alpha r),  s = ||x|| / ||x + alpha r||

What follows is linear but for one number a row, the standard deviation in `post_layernorm` (weight `g`, bias `b`).
With `W` the projection, `C` the class embeddings and a bar for a row less its own mean, the class scores are, but for
the positive norm of the image embedding, which changes no order,

    C W LN(y) = (P + alpha Q) s / sqrt(s^2 var(x + alpha r) + eps) + C W b,  P = C W (g * x_bar),  Q = C W (g * r_bar)

and `||x + alpha r||^2` and `var(x + alpha r)` are quadratic in alpha. So `P` and `Q`, `(n, num_classes)`, and six
numbers a row serve every cell, and cells of equal alpha are one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch

from ..clip.modeling import VS2CLIPForZeroShot
from ..data.stores.rows import RowSource
from ..encoders.tail import Tail, fold_tail, plain_embeds
from ..files.figure_style import (
    COLUMN,
    PAGE,
    check_drawing,
    draw_cells,
    frame_cell,
    new_figure,
    save_figure,
    style,
)
from ..functional.label_free import exact
from ..functional.sparse_ops import sparse_decode
from .inputs import check_replayable, class_labels, replayable_rows


SCORES_AT_ONCE = 2**20
"""Several steps in one operation: thousands of small ones would wait for each other's threads, or for a GPU to start
them."""


class SteeringGrid(NamedTuple):
    """Top-1 accuracy in percent."""

    top1: torch.Tensor
    """`(len(gammas), len(lambdas))` float64, on the CPU."""
    plain: float
    """Plain CLIP's, which every cell with gamma 1 or lambda 0 has too."""


@torch.no_grad()
def steering_grid(
    model: VS2CLIPForZeroShot,
    rows: RowSource,
    labels: torch.Tensor | Sequence[int] | None,
    class_embeds: torch.Tensor,
    gammas: Sequence[float],
    lambdas: Sequence[float],
    *,
    batch_size: int = 1024,
) -> SteeringGrid:
    """
    Accuracy of VS2 for each gamma and lambda, without a gate; the module's docstring has the equation.

    The predictions are those of [`VS2CLIPForZeroShot.image_features_from_cls`] in each cell, up to float rounding
    where two classes tie; plain CLIP's are its very own. Scores are summed in float64 and held in float32, whatever
    the CLIP's dtype.

    Args:
        model: the wrapper, with one SAE, on the last layer. Its own gamma and lambda do not matter; it is left as it
            was found.
        rows: CLS rows of the last layer `(n, hidden_size)`, before `post_layernorm`: a tensor or an activation store.
        labels: the class of each row, `(n,)`; `None` takes the store's.
        class_embeds: unit class embeddings `(num_classes, projection_dim)`, see [`class_embeddings`].
        gammas, lambdas: the axes.
        batch_size: rows at a time. Memory does not grow with the number of rows.

    Raises:
        ValueError, TypeError: on a model whose steering is not ungated `"vs2"` or whose tail was replaced, on an axis
            that is empty or not finite, on class embeddings of another shape, and on rows and labels as [`evaluate`]
            does.
    """
    check_replayable(model)
    _check_steering(model)
    rows = replayable_rows(model, rows, "rows")
    tail = fold_tail(model.clip, class_embeds)
    target = class_labels(rows, labels, len(class_embeds))
    lambdas = _axis("lambdas", lambdas)
    alphas = [[_alpha(gamma, lambda_) for lambda_ in lambdas] for gamma in _axis("gammas", gammas)]
    steps = sorted({alpha for line in alphas for alpha in line} - {0.0})
    device = tail.weight.device
    steps_on_device = torch.tensor(steps, dtype=torch.float64, device=device)
    right = torch.zeros(1 + len(steps), dtype=torch.int64, device=device)  # of plain CLIP, then of each step
    start = 0
    for block in rows.batches(batch_size):
        truth = target[start : start + len(block)].to(device)
        start += len(block)
        x = block.to(model.clip.device, model.clip.dtype)
        steered = scores_along(x, _direction(model, x), tail, steps_on_device)
        plain = plain_embeds(model.clip, x) @ class_embeds.to(x.device).float().T
        all_scores = chain([plain.unsqueeze(0).to(device)], steered)
        right += torch.cat([(scores.argmax(-1) == truth).sum(-1) for scores in all_scores])
    percent = 100 * right.cpu().double() / len(target)
    place = {0.0: 0} | {alpha: number for number, alpha in enumerate(steps, 1)}
    return SteeringGrid(
        percent[torch.tensor([[place[alpha] for alpha in line] for line in alphas])], percent[0].item()
    )


def scores_along(x: torch.Tensor, direction: torch.Tensor, tail: Tail, alphas: torch.Tensor) -> Iterator[torch.Tensor]:
    """Class scores of `x + alpha direction`, norm kept, for a few alphas at a time: `(some, batch, num_classes)`,
    float32.

    `x` and `direction` are `(batch, hidden_size)`, `alphas` `(steps,)` float64; in their order. A score is that of the
    projected row before it is normalised.
    """
    x, direction = exact(x), exact(direction)
    length = _quadratic(x, direction)
    # Without a LayerNorm rows are neither centred nor divided by their deviation.
    x_bar, direction_bar = (one if tail.eps is None else one - one.mean(-1, keepdim=True) for one in (x, direction))
    variance = [part / x.shape[-1] for part in _quadratic(x_bar, direction_bar)]
    p, q, bias = (part.float() for part in (x_bar @ tail.weight.T, direction_bar @ tail.weight.T, tail.bias))
    for some in alphas.unsqueeze(-1).split(max(1, SCORES_AT_ONCE // p.numel())):
        moved = _at(length, some)
        squared = torch.where(moved > 0, length[0] / moved, 0)  # s^2; a row moved to 0 stays 0, as `keep_norm` has it
        divisor = 1 if tail.eps is None else squared * _at(variance, some) + tail.eps
        scale = (squared / divisor).sqrt().float()
        yield torch.addcmul(p, q, some.float().unsqueeze(-1)).mul_(scale.unsqueeze(-1)).add_(bias)


def _quadratic(x: torch.Tensor, direction: torch.Tensor) -> list[torch.Tensor]:
    """Coefficients of `||x + alpha direction||^2` in alpha, lowest power first, each `(batch,)`."""
    return [x.square().sum(-1), 2 * (x * direction).sum(-1), direction.square().sum(-1)]


def _at(coefficients: list[torch.Tensor], alpha: torch.Tensor) -> torch.Tensor:
    """Its value at each alpha `(some, 1)`: `(some, batch)`."""
    constant, linear, square = coefficients
    return (constant + alpha * linear + alpha**2 * square).clamp_(min=0)  # rounding may take it below


def _direction(model: VS2CLIPForZeroShot, x: torch.Tensor) -> torch.Tensor:
    """`W_dec^T c` of each row, in at least float32, on the row's device."""
    sae = model.sae
    values, indices = sae.encode(x.to(sae.b_pre.device, torch.promote_types(x.dtype, torch.float32)))
    return sparse_decode(values, indices, sae.W_dec).to(x.device)


def _alpha(gamma: float, lambda_: float) -> float:
    """`lambda (gamma - 1)`, without the last digits, in which equal products may differ."""
    return float(f"{lambda_ * (gamma - 1):.9g}")


def _check_steering(model: VS2CLIPForZeroShot) -> None:
    now = model.steering_settings
    if now.edits is not None:
        raise ValueError("The grid is of VS2 alone; drop the latents' edits with model.set_steering(edits=None).")
    if now.method != "vs2" or not now.enabled or any(tau is not None for tau in model.fvu_thresholds.values()):
        raise ValueError(
            "The grid is of method='vs2' without a gate; set it with model.set_steering(method='vs2', enabled=True, "
            f"gate=None, fvu_threshold=None). Now: method={now.method!r}, enabled={now.enabled}, gate={now.gate}, "
            f"fvu_threshold={now.fvu_threshold}."
        )


def _axis(name: str, values: Sequence[float]) -> list[float]:
    numbers = [float(value) for value in values]
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} must be one or more finite numbers, not {numbers}.")
    return numbers


def plot_grid(
    grid: SteeringGrid,
    gammas: Sequence[float],
    lambdas: Sequence[float],
    path: str | PathLike,
    *,
    own: tuple[float, float] | None = None,
    title: str | None = None,
) -> Path:
    """
    Draw what [`steering_grid`] measured as gains over plain CLIP, blue where a setting gains, orange where it loses.

    Args:
        grid, gammas, lambdas: its result and its settings.
        path: a .png, .svg or .pdf file.
        own: a gamma and a lambda to frame, such as a checkpoint's.
        title: above the drawing; by default plain CLIP's accuracy.

    Raises:
        ImportError: matplotlib is missing. ValueError: another suffix, or a grid of other settings.
    """
    check_drawing(path)
    gain = grid.top1 - grid.plain
    if gain.shape != (len(gammas), len(lambdas)):
        raise ValueError(
            f"the grid has {gain.shape[0]} x {gain.shape[1]} cells, for {len(gammas)} gammas and {len(lambdas)} "
            "lambdas."
        )
    # What gamma below 1 or the largest steps cost can be so much that all other settings would look alike.
    limit = max(min(1.5 * float(gain.abs().quantile(0.9)), float(gain.abs().max())), 1e-9)
    with style():
        figure = new_figure(PAGE if len(lambdas) > 7 else COLUMN, 0.22 * len(gammas) + 0.9)
        axes = figure.add_subplot()
        mesh = draw_cells(axes, gain, gammas, lambdas, limit)
        if own is not None:
            frame_cell(axes, gammas, lambdas, own)
        axes.set_xlabel("lambda")
        axes.set_ylabel("gamma")
        axes.set_title(f"plain CLIP {grid.plain:.1f} %" if title is None else title, loc="left")
        bar = figure.colorbar(
            mesh, ax=axes, pad=0.02, aspect=25, extend="min" if bool(gain.min() < -limit) else "neither"
        )
        bar.set_label("gain, points")
        bar.outline.set_visible(False)
        return save_figure(figure, path)
