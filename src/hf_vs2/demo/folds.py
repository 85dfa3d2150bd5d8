"""One result out of several folds: every image counted once, as evaluated by the SAE that had not seen it."""

from collections.abc import Sequence
from typing import Any

import torch

from ..evaluation.metrics import paired_bootstrap, per_class_table
from ..files.report import EvaluationResult, SampleOutputs


def pool_folds(results: Sequence[EvaluationResult], folds: Sequence[torch.Tensor]) -> EvaluationResult:
    """
    Put the folds' results together; per-image outcomes come out in the order of the data set.

    Args:
        results: one a fold, all with the same rows (methods and prompts) and with their `labels` and `samples`.
        folds: for each result the index of its images, together `0 .. n - 1`.

    Returns:
        [`EvaluationResult`]: `tau` is the mean of the folds' thresholds, `seconds` their sum; everything else is what
        one evaluation of all images gives.
    """
    order = torch.cat(list(folds)).argsort()
    labels_of_folds, samples_of_folds = zip(*map(outcomes, results), strict=True)
    labels = torch.cat(labels_of_folds)[order]
    samples = [_join(parts, order) for parts in zip(*samples_of_folds, strict=True)]
    rows = [_pool_row([result.rows[row] for result in results], results[0].meta) for row in range(len(samples))]
    per_class = per_class_table(samples, labels, results[0].per_class["class_names"])
    return EvaluationResult(rows, results[0].meta | {"n": len(labels)}, per_class, labels, samples)


def outcomes(result: EvaluationResult) -> tuple[torch.Tensor, list[SampleOutputs]]:
    """Labels and per-image outcomes of a result of `evaluate`."""
    assert result.labels is not None and result.samples is not None
    return result.labels, result.samples


def _join(parts: Sequence[SampleOutputs], order: torch.Tensor) -> SampleOutputs:
    fvu = [part.fvu for part in parts if part.fvu is not None]
    return SampleOutputs(
        torch.cat([part.predictions for part in parts])[order],
        torch.cat(fvu)[order] if fvu else None,
        torch.cat([part.steered for part in parts])[order],
    )


def _pool_row(parts: Sequence[dict[str, Any]], meta: dict[str, Any]) -> dict[str, Any]:
    n = sum(part["n"] for part in parts)
    fixed, broken = (sum(part[name] for part in parts) for name in ("fixed", "broken"))

    def mean(name: str) -> float | None:
        values = [part[name] for part in parts]
        return None if None in values else sum(part[name] * part["n"] for part in parts) / n

    return parts[0] | {
        **{name: mean(name) for name in ("top1", "top5", "coverage", "mean_fvu", "tau")},
        "gain": 100 * (fixed - broken) / n,
        "gain_ci": list(paired_bootstrap(fixed, broken, n, meta["num_resamples"], seed=meta["seed"])),
        "fixed": fixed,
        "broken": broken,
        "n": n,
        "seconds": sum(part["seconds"] for part in parts),
    }
