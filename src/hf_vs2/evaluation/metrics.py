"""Figures of answers against true classes: the one place that counts hits, gains with their intervals, and accuracy by
class."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..files.report import SampleOutputs
from ..functional.finite import first_broken_row


def paired_bootstrap(
    fixed: int, broken: int, n: int, num_resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of a gain in points, from the bootstrap over images that keeps each image's two results
    paired.

    An image changes the difference of two accuracies by -1, 0 or +1. Drawing `n` images with replacement is then
    exactly one multinomial draw of (broken, same, fixed), which makes any number of resamples cheap.
    """
    share = np.array([broken, n - fixed - broken, fixed]) / n
    draws = np.random.default_rng(seed).multinomial(n, share, size=num_resamples)
    gains = 100 * (draws[:, 2] - draws[:, 0]) / n
    low, high = np.quantile(gains, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Gain:
    """What a method does to plain CLIP's answers: how many it fixes and breaks of `n`, in points, with the 95 %
    interval."""

    fixed: int
    broken: int
    n: int
    interval: tuple[float, float]

    @classmethod
    def of(cls, right: torch.Tensor, plain: torch.Tensor, num_resamples: int = 10_000, seed: int = 0) -> Gain:
        """From which images are right, bool `(n,)`, with the method and with plain CLIP."""
        fixed, broken, n = int((right & ~plain).sum()), int((plain & ~right).sum()), len(right)
        return cls(fixed, broken, n, paired_bootstrap(fixed, broken, n, num_resamples, seed=seed))

    @property
    def points(self) -> float:
        return 100 * (self.fixed - self.broken) / self.n


def gain_text(points: float, interval: Sequence[float]) -> str:
    """`+1.2 [+0.3, +2.1]`."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(points, *interval)


@dataclass
class Tally:
    """What is collected batch by batch of one method and label set."""

    predictions: list[torch.Tensor] = field(default_factory=list)
    fvu: list[torch.Tensor] = field(default_factory=list)
    steered: list[torch.Tensor] = field(default_factory=list)
    right5: int | None = None
    """Images with their class among the top five; `None` among five classes or fewer, where all are."""
    seconds: float = 0.0

    def add(
        self,
        scores: torch.Tensor,
        target: torch.Tensor,
        fvu: torch.Tensor | None = None,
        steered: torch.Tensor | None = None,
    ) -> None:
        """Scores `(batch, num_classes)` of images with classes `target` `(batch,)`; `steered` is `None` where all
        are."""
        scores = scores.cpu()
        broken = first_broken_row(scores)
        if broken is not None:
            number = sum(map(len, self.predictions)) + broken
            raise ValueError(f"The scores of row {number} are not finite: extract the activations again in float32.")
        self.predictions.append(scores.argmax(-1))
        self.steered.append(torch.ones(len(scores), dtype=torch.bool) if steered is None else steered.cpu())
        self.fvu += [] if fvu is None else [fvu.float().cpu()]
        if scores.shape[-1] > 5:
            hits = scores.topk(5, dim=-1).indices == target.unsqueeze(-1)
            self.right5 = (self.right5 or 0) + int(hits.sum())

    def samples(self) -> SampleOutputs:
        fvu = torch.cat(self.fvu) if self.fvu else None
        return SampleOutputs(torch.cat(self.predictions), fvu, torch.cat(self.steered))


def row_figures(
    samples: SampleOutputs,
    right5: int | None,
    target: torch.Tensor,
    plain: torch.Tensor,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Accuracy, gain, coverage and FVU of one row of a table, see [`EvaluationResult`].

    Args:
        samples, right5: of a [`Tally`].
        target: true classes `(n,)`. plain: which images plain CLIP has right, bool `(n,)`.
        num_resamples, seed: of the gain's interval.
    """
    right = samples.predictions == target
    n, gain = len(target), Gain.of(right, plain, num_resamples, seed)
    fvu = None if samples.fvu is None else samples.fvu.double().mean().item()
    return {
        "top1": round(100 * int(right.sum()) / n, 4),
        "top5": None if right5 is None else round(100 * right5 / n, 4),
        "gain": round(gain.points, 4),
        "gain_ci": [round(bound, 4) for bound in gain.interval],
        "fixed": gain.fixed,
        "broken": gain.broken,
        "coverage": round(samples.steered.double().mean().item(), 6),
        # A row that sits exactly on the training mean has an infinite FVU, which JSON cannot hold.
        "mean_fvu": fvu if fvu is not None and math.isfinite(fvu) else None,
        "n": n,
    }


def few_of_each(ranked: Iterable[int], group: Callable[[int], Any], most: int, per_group: int) -> list[int]:
    """The first `most` rows of a ranking, at most `per_group` of each group."""
    seen: Counter[Any] = Counter()
    chosen: list[int] = []
    for row in ranked:
        seen[group(row)] += 1
        if seen[group(row)] <= per_group and len(chosen) < most:
            chosen.append(row)
    return chosen


def count_by_class(target: torch.Tensor, num_classes: int, chosen: torch.Tensor | None = None) -> list[int]:
    """How many images each class has; with `chosen`, bool `(n,)`, how many of those."""
    return torch.bincount(target if chosen is None else target[chosen], minlength=num_classes).tolist()


def accuracy_by_class(predictions: torch.Tensor, target: torch.Tensor, num_classes: int) -> list[float | None]:
    """In %, `None` for a class without images."""
    support, hits = count_by_class(target, num_classes), count_by_class(target, num_classes, predictions == target)
    return [100 * hit / n if n else None for hit, n in zip(hits, support, strict=True)]


def class_changes(
    plain: torch.Tensor, steered: torch.Tensor, target: torch.Tensor, num_classes: int
) -> list[dict[str, Any]]:
    """Of each class, in label order: `support` (its images), accuracy `plain` and `steered` (%), `gain` (points); the
    last three are `None` for a class without images."""
    columns = (accuracy_by_class(predictions, target, num_classes) for predictions in (plain, steered))
    return [
        {"support": n, "plain": before, "steered": after, "gain": None if None in (before, after) else after - before}
        for n, before, after in zip(count_by_class(target, num_classes), *columns, strict=True)
    ]


def mean_per_class(predictions: torch.Tensor, target: torch.Tensor, num_classes: int) -> float:
    """Accuracy of each class that has images, averaged over those classes (%): the metric of CLIP's paper for some
    data sets."""
    shares = [share for share in accuracy_by_class(predictions, target, num_classes) if share is not None]
    return sum(shares) / len(shares)


def per_class_table(
    samples: Sequence[SampleOutputs], target: torch.Tensor, class_names: Sequence[str]
) -> dict[str, Any]:
    """`class_names`, `support` and `accuracy` (a list a row of the table), as [`EvaluationResult`] holds them."""
    accuracy = [accuracy_by_class(one.predictions, target, len(class_names)) for one in samples]
    rounded = [[None if share is None else round(share, 4) for share in row] for row in accuracy]
    support = count_by_class(target, len(class_names))
    return {"class_names": list(class_names), "support": support, "accuracy": rounded}
