"""What the outcome of every image says beyond one accuracy: by FVU, by class, by confusion, and from seed to seed.

Pure functions of [`Outputs`]; accuracies and risks are percentages, coverage is a share in [0, 1].
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch

from ...evaluation.metrics import class_changes, paired_bootstrap
from .cells import Outputs


MAX_POINTS = 200
"""Points of a risk-coverage curve: more than a figure can show."""


def fvu_deciles(fvu: Any, right_steered: Any, right_plain: Any, bins: int = 10) -> list[dict[str, Any]]:
    """
    Accuracy of steered and plain images by FVU: bins of equal count, images ranked by per-sample FVU.

    Args:
        fvu: per-sample FVU `(n,)`; infinite values rank last.
        right_steered, right_plain: whether the image is right with and without steering, bool `(n,)`.

    Returns:
        One dict a bin, ascending: `low` and `high` (the FVU of its first and last image), `n`, `steered` and `plain`
        (accuracy, %), `gain_ci` (95 % paired bootstrap interval of their difference, points). Sizes differ by one at
        most.
    """
    fvu, steered, plain = np.asarray(fvu, np.float64), np.asarray(right_steered, bool), np.asarray(right_plain, bool)
    table = []
    for chosen in np.array_split(np.argsort(fvu, kind="stable"), bins):
        fixed = int((steered[chosen] & ~plain[chosen]).sum())
        broken = int((plain[chosen] & ~steered[chosen]).sum())
        table.append(
            {
                "low": float(fvu[chosen[0]]),
                "high": float(fvu[chosen[-1]]),
                "n": len(chosen),
                "steered": 100 * float(steered[chosen].mean()),
                "plain": 100 * float(plain[chosen].mean()),
                "gain_ci": list(paired_bootstrap(fixed, broken, len(chosen))),
            }
        )
    return table


def risk_coverage(fvu: Any, right_steered: Any, right_plain: Any) -> dict[str, list[float]]:
    """
    What the gate would do at each threshold: images with FVU <= threshold are steered, the rest are plain CLIP's.

    Arguments as in [`fvu_deciles`].

    Returns:
        Lists of one length, at most [`MAX_POINTS`], coverage ascending from 0 to 1: `coverage` (share steered),
        `threshold` (`-inf` at coverage 0), `steered_risk` and `plain_risk` (errors among the admitted images with and
        without steering, %; NaN at coverage 0), `gated_accuracy` (all images, the admitted ones steered, %). Images of
        equal FVU are admitted together.
    """
    fvu, steered, plain = np.asarray(fvu, np.float64), np.asarray(right_steered, bool), np.asarray(right_plain, bool)
    n = len(fvu)
    order = np.argsort(fvu, kind="stable")
    ranked = fvu[order]
    steered_right = np.concatenate([[0], steered[order].cumsum()])
    plain_right = np.concatenate([[0], plain[order].cumsum()])
    # How many images each distinct threshold admits, from none to all.
    admitted = np.concatenate([[0], np.flatnonzero(ranked[1:] != ranked[:-1]) + 1, [n]])
    if len(admitted) > MAX_POINTS:
        admitted = admitted[np.linspace(0, len(admitted) - 1, MAX_POINTS).round().astype(int)]
    inside = np.where(admitted > 0, admitted, np.nan)
    return {
        "coverage": (admitted / n).tolist(),
        "threshold": [float(ranked[count - 1]) if count else -math.inf for count in admitted],
        "steered_risk": (100 * (1 - steered_right[admitted] / inside)).tolist(),
        "plain_risk": (100 * (1 - plain_right[admitted] / inside)).tolist(),
        "gated_accuracy": (100 * (steered_right[admitted] + plain_right[n] - plain_right[admitted]) / n).tolist(),
    }


def per_class(outputs: Outputs, plain_outputs: Outputs, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Accuracy of each class with a method and with plain CLIP: its `name`, and what [`class_changes`] says of it."""
    found = class_changes(plain_outputs.predictions, outputs.predictions, outputs.labels, len(class_names))
    return [{"name": name} | one for name, one in zip(class_names, found, strict=True)]


def fixed_confusions(
    outputs: Outputs, plain_outputs: Outputs, class_names: Sequence[str], top: int = 10
) -> dict[str, list[dict[str, Any]]]:
    """
    Which confusions a method fixed and which it made.

    Returns:
        `fixed`: images that plain CLIP got wrong and the method right, counted by true class and by what plain CLIP
            mistook
        them for; `broken`: the other way round, by what the method mistakes them for. Each the `top` most frequent
        as dicts of `true`, `mistaken_for` and `count`, ties in label order.
    """

    def count(chosen: torch.Tensor, mistaken_for: torch.Tensor) -> list[dict[str, Any]]:
        pairs = Counter(zip(outputs.labels[chosen].tolist(), mistaken_for[chosen].tolist(), strict=True))
        ranked = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:top]
        return [
            {"true": class_names[true], "mistaken_for": class_names[wrong], "count": n} for (true, wrong), n in ranked
        ]

    return {
        "fixed": count(outputs.right & ~plain_outputs.right, plain_outputs.predictions),
        "broken": count(plain_outputs.right & ~outputs.right, outputs.predictions),
    }


def agreement(outputs: Sequence[Outputs], plain_outputs: Outputs) -> dict[str, Any]:
    """
    How far the runs of one method, one a seed, decide alike, over all pairs of runs.

    Returns:
        `pairs` (their number), `same_prediction_mean` and `same_prediction_min` (share of images that both runs of a
        pair put in the same class, %), `fixed_jaccard_mean` and `fixed_jaccard_min` (intersection over union of the
        images that each run corrects plain CLIP on, %; two runs that correct nothing agree).
    """
    same, jaccard = [], []
    for left, right in combinations(outputs, 2):
        same.append(100 * float((left.predictions == right.predictions).double().mean()))
        left_fixed, right_fixed = (one.right & ~plain_outputs.right for one in (left, right))
        union = int((left_fixed | right_fixed).sum())
        jaccard.append(100 * int((left_fixed & right_fixed).sum()) / union if union else 100.0)
    return {
        "pairs": len(same),
        "same_prediction_mean": sum(same) / len(same),
        "same_prediction_min": min(same),
        "fixed_jaccard_mean": sum(jaccard) / len(jaccard),
        "fixed_jaccard_min": min(jaccard),
    }
