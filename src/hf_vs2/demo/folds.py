"""One result out of several folds: every image counted once, as evaluated by the SAE that had not seen it."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from ..evaluation.metrics import paired_bootstrap, per_class_table
from ..files.report import EvaluationResult, SampleOutputs


T = TypeVar("T")


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
    labels = torch.cat([labels_of(result) for result in results])[order]
    samples = [_join([samples_of(result)[row] for result in results], order) for row in range(len(results[0].rows))]
    rows = [_pool_row([result.rows[row] for result in results], results[0].meta) for row in range(len(samples))]
    per_class = per_class_table(samples, labels, results[0].per_class["class_names"])
    return EvaluationResult(rows, results[0].meta | {"n": len(labels)}, per_class, labels, samples)


def labels_of(result: EvaluationResult) -> torch.Tensor:
    """The labels of a result that comes from `evaluate`; a `ValueError` for one that was read from a file."""
    return _in_memory(result.labels)


def samples_of(result: EvaluationResult) -> list[SampleOutputs]:
    """The per-image outcomes of a result that comes from `evaluate`; a `ValueError` for one that was read from a
    file."""
    return _in_memory(result.samples)


def _in_memory(part: T | None) -> T:
    if part is None:
        raise ValueError("This result was read from a file, which holds no outcomes of single images: evaluate again.")
    return part


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
