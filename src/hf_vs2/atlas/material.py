"""What an atlas is made of, measured and checked, before any of it becomes a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..clip.modeling import VS2CLIPForZeroShot
from ..data.labels.lists import Names
from ..data.labels.names import clean_class_names
from ..data.stores.rows import Rows
from ..evaluation.grid import steering_grid
from ..evaluation.inputs import class_labels, named_labels
from ..files.json_files import read_json
from ..files.report import EvaluationResult, Results, method_name
from .effects import Effect
from .flips import Mover, Predictions, class_gains, clearest_changes, movers, predict
from .names import Words
from .statistics import NUM_INTERVALS, LatentStatistics, Spread, codes


GAMMAS = (1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
LAMBDAS = (0.3, 0.6, 0.9, 1.2, 1.5, 1.8, 2.1, 2.4, 2.7, 3.0)
NUM_EXAMPLES = 12
NUM_MOVERS = 5


@dataclass
class Truth:
    """The classes of the images, where they are known."""

    labels: torch.Tensor | None
    """int64 `(n,)`, each below the number of class names; `None` without."""
    class_names: list[str]
    missing: str
    """Why there are no labels; empty where there are."""

    @cached_property
    def support(self) -> torch.Tensor:
        """Images a class, int64 `(num_classes,)`."""
        assert self.labels is not None
        return self.labels.bincount(minlength=len(self.class_names))


@dataclass
class Example:
    """One image that steering fixed or broke."""

    row: int
    old: int
    new: int
    movers: list[Mover]


@dataclass
class Replay:
    """What labels make possible: answers with and without steering."""

    predictions: Predictions
    classes: list[dict[str, Any]]
    fixed: list[Example]
    broken: list[Example]
    gammas: list[float]
    lambdas: list[float]
    grid: list[list[float]]
    """Top-1 in %, one list a gamma."""
    grid_plain: float


@dataclass
class Material:
    """Everything that the pages show."""

    model: VS2CLIPForZeroShot
    statistics: LatentStatistics
    spread: Spread
    companions: list[list[tuple[int, int]]]
    nearest: tuple[torch.Tensor, torch.Tensor]
    truth: Truth
    image_indices: list[int]
    """Row of the data set that each row was made from."""
    words: Words
    effects: list[Effect | None]
    """What each latent alone does to the classes; `None` each without two class names."""
    images: dict[int, ImageFacts]
    """Of each row whose image is shown."""
    replay: Replay | None
    training: dict[str, Any]
    """`steps` and curves, or `missing`."""
    results: dict[str, Any]
    """`rows`, or `missing`."""
    facts: dict[str, Any] = field(default_factory=dict)


class ImageFacts(NamedTuple):
    """What the SAE makes of one image."""

    fvu: float
    code: list[tuple[int, float]]
    """Its active latents and their values, the largest first."""


def rows_on_pages(statistics: LatentStatistics, spread: Spread, latent: int) -> list[int]:
    """The rows that the page of a latent shows, each once: its strongest ones, then some of each interval."""
    intervals = range(latent * NUM_INTERVALS, (latent + 1) * NUM_INTERVALS)
    rows = [*statistics.strongest.of(latent), *(row for one in intervals for row in spread.examples.of(one))]
    return list(dict.fromkeys(rows))


@torch.no_grad()
def image_facts(model: VS2CLIPForZeroShot, rows: Rows, shown: list[int], batch_size: int) -> dict[int, ImageFacts]:
    """Codes and FVU of the rows that are shown."""
    found = {}
    for start, code in codes(model, rows, batch_size, "Images", False, torch.tensor(shown)):
        for at, (fvu, values, indices) in enumerate(
            zip(code.fvu.tolist(), code.latent_values.tolist(), code.latent_indices.tolist(), strict=True)
        ):
            pairs = [pair for pair in zip(indices, values, strict=True) if pair[1] != 0]
            found[shown[start + at]] = ImageFacts(fvu, sorted(pairs, key=lambda pair: -abs(pair[1])))
    return found


def truth_of(rows: Rows, labels: Any, class_names: Names | None, clean: bool) -> Truth:
    """Labels and class names, given or the store's, or why there are none.

    Raises:
        ValueError, TypeError: labels or names that were given do not fit the rows.
    """
    given = labels is not None
    found, labels = named_labels(rows, labels, class_names)
    names = [] if found is None else clean_class_names(found, clean)
    if labels is None:
        return Truth(None, names, "The images have no labels.")
    if not names:
        return Truth(None, names, "The labels have no class names: give them (class_names, or --labels).")
    if not given and bool((torch.as_tensor(labels) < 0).any()):
        return Truth(None, names, "Some of the images have no label.")
    return Truth(class_labels(rows, labels, len(names)), names, "")


@torch.no_grad()
def replay_of(
    model: VS2CLIPForZeroShot,
    rows: Rows,
    truth: Truth,
    embeds: torch.Tensor | None,
    batch_size: int,
    progress: bool,
) -> Replay | None:
    """Answers, gains and the heat map; `None` without labels or class embeddings `(num_classes, projection_dim)`."""
    if truth.labels is None or embeds is None:
        return None
    with model.steering(enabled=True, method="vs2"):
        predictions = predict(model, rows, embeds, batch_size, progress)
        classes = class_gains(predictions, truth.labels, len(truth.class_names))
        fixed, broken = (_examples(model, rows, predictions, truth.labels, embeds, which) for which in (True, False))
    gammas, lambdas = _axes(model)
    with model.steering(enabled=True, method="vs2", gate=None, fvu_threshold=None, edits=None):
        grid = steering_grid(model, rows, truth.labels, embeds, gammas, lambdas, batch_size=batch_size)
    return Replay(predictions, classes, fixed, broken, gammas, lambdas, grid.top1.tolist(), grid.plain)


def _examples(
    model: VS2CLIPForZeroShot,
    rows: Rows,
    predictions: Predictions,
    labels: torch.Tensor,
    embeds: torch.Tensor,
    fixed: bool,
) -> list[Example]:
    chosen = clearest_changes(predictions, labels, fixed, NUM_EXAMPLES)
    if not chosen:
        return []
    taken = rows.take(torch.tensor(chosen))
    old, new = predictions.plain[chosen], predictions.steered[chosen]
    found = movers(model, taken, old, new, embeds, NUM_MOVERS)
    return [Example(*one) for one in zip(chosen, old.tolist(), new.tolist(), found, strict=True)]


def _axes(model: VS2CLIPForZeroShot) -> tuple[list[float], list[float]]:
    """The heat map's axes, with the model's own setting among them."""
    now = model.steering_settings
    own = [] if isinstance(now.gamma, tuple) else [float(now.gamma)]
    return sorted({*GAMMAS, *own}), sorted({*LAMBDAS, float(now.lambda_)})


def training_curves(log: str | PathLike | None) -> dict[str, Any]:
    """`steps` and what was logged at each, from the `training_log.json` that the trainer writes; `missing` without
    one.

    Raises:
        ValueError: the file is not such a log. OSError: it cannot be read.
    """
    if log is None:
        return {"missing": "There is no training_log.json beside the checkpoint."}
    try:
        content = read_json(Path(log))
        entries = [entry for entry in content["log"] if isinstance(entry["step"], int)]
        curves = {
            name: [None if entry.get(name) is None else float(entry[name]) for entry in entries]
            for name in ("fvu", "dead_share", "learning_rate")
        }
        metrics = content.get("metrics", {})
        held_out = {
            name: float(metrics[name]) for name in ("fvu", "l0", "dead_share") if metrics.get(name) is not None
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{log} is not a training log of hf_vs2: JSON with a list 'log' of steps was expected."
        ) from error
    if not entries:
        return {"missing": "The training log has no steps."}
    return {"steps": [entry["step"] for entry in entries], **curves, "metrics": held_out}


def results_table(results: Results | None) -> dict[str, Any]:
    """The evaluated rows of a result, or of its file, for the comparison table; `missing` without one."""
    if results is None:
        return {"missing": "There is no results.json: hf-vs2 evaluate writes one."}
    result = results if isinstance(results, EvaluationResult) else EvaluationResult.from_json(results)
    if not result.rows:
        return {"missing": "The result file has no rows."}
    names = ("prompts", "top1", "top5", "gain", "gain_ci", "coverage", "mean_fvu", "n", "gamma", "lambda")
    dataset = result.meta.get("dataset")
    split = dataset.get("split") if isinstance(dataset, Mapping) else None
    return {
        "rows": [
            {
                "method": method_name(row, label=True),
                "plain": row["method"] == "clip",
                **{name: row.get(name) for name in names},
            }
            for row in result.rows
        ],
        "dataset": " ".join(str(part) for part in (result.meta.get("dataset_id"), split) if part),
    }
