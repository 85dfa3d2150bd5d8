"""Measuring a cell: a method's scores against the true classes and plain CLIP, or what a cell without rows is
about."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from ..evaluation.grid import steering_grid
from ..evaluation.metrics import Tally, mean_per_class, row_figures
from ..files.report import SampleOutputs
from .bench import BATCH, Bench
from .cost import measure_cost
from .methods import Scored, run_of
from .plan import COSINE, COST, GRID
from .results.catalog import study_methods
from .results.cells import Cell, Outputs


@torch.no_grad()
def measure(bench: Bench, cell: Cell, plain: Outputs | None) -> tuple[dict[str, Any], Outputs | None]:
    """
    The figures of a cell, and the outcome of every image.

    Args:
        bench, cell: what to measure.
        plain (`Outputs`, *optional*): plain CLIP's outcomes on the same data set and prompts; `None` when this cell is
            plain CLIP itself, or no row of a table.
    """
    special = {GRID: _grid, COST: _cost, COSINE: _cosine}
    if cell.method in special:
        return special[cell.method](bench, cell), None
    method = study_methods()[cell.method]
    labels, chosen = bench.labels(cell.encoder, cell.dataset), None
    if "inner" in method.settings:
        chosen = bench.limited(cell.dataset, "test", cell.params["test_limit"])
        labels = labels[chosen]
        assert plain is not None
        plain = plain.at(chosen)
    sae = None
    if method.seeded and "inner" not in method.settings:
        sae = bench.sae(cell.encoder, bench.spec(cell))  # now, so that its training is not part of the method's time
    started = time.perf_counter()
    samples, right5 = _collect(run_of(cell.method)(bench, cell), labels)
    seconds = time.perf_counter() - started
    outputs = Outputs(labels, samples.predictions, samples.fvu, samples.steered, chosen)
    figures = row_figures(samples, right5, labels, (outputs if plain is None else plain).right)
    figures["mean_per_class"] = round(
        mean_per_class(outputs.predictions, labels, len(bench.class_names(cell.dataset))), 4
    )
    figures["seconds"] = round(seconds, 4)
    if sae is not None:
        figures["held_out_fvu"] = (sae.config.training_metrics or {}).get("fvu")
        if "gate" in method.settings:
            figures["gate"] = sae.config.usable_gate(cell.params["gate"])
    return figures, outputs


def _collect(scored: Iterator[Scored], labels: torch.Tensor) -> tuple[SampleOutputs, int | None]:
    """Outcomes of all batches, and how many images have their class among the top five."""
    tally, start = Tally(), 0
    for batch in scored:
        target = labels[start : start + len(batch.scores)]
        start += len(batch.scores)
        tally.add(batch.scores, target, batch.fvu, batch.steered)
    return tally.samples(), tally.right5


def _grid(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Accuracy of VS2 for each gamma and lambda."""
    labels, gammas, lambdas = bench.labels(cell.encoder, cell.dataset), cell.params["gammas"], cell.params["lambdas"]
    rows = bench.rows(cell.encoder, cell.dataset, "test")
    found = steering_grid(bench.model(cell), rows, labels, bench.classes(cell), gammas, lambdas, batch_size=BATCH)
    settings = bench.config.steering
    return {
        "gamma": gammas,
        "lambda": lambdas,
        "top1": [[round(value, 4) for value in line] for line in found.top1.tolist()],
        "plain": round(found.plain, 4),
        "default": [settings.gamma, settings.lambda_],
        "n": len(labels),
    }


def _cosine(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Mean cosine, over the test rows, between the steering vectors of different SAEs, and the centroid's direction `x
    - mu`."""
    specs = {f"seed {seed}": {"seed": seed} for seed in cell.params["seeds"]}
    first = cell.params["seeds"][0]
    table = cell.params["top_k"]
    specs |= {f"k {top_k}": {"seed": first, "top_k": top_k} for top_k in cell.params["top_ks"] if top_k != table}
    saes = []
    for settings in specs.values():
        params = dict(cell.params) | {name: value for name, value in settings.items() if name != "seed"}
        saes.append(
            bench.sae(cell.encoder, bench.spec(Cell(cell.encoder, cell.dataset, "vs2", "", settings["seed"], params)))
        )
    mean = bench.mean(cell.encoder, cell.dataset)
    names = [*specs, "centroid"]
    total = torch.zeros(len(names), len(names), dtype=torch.float64)
    count = 0
    for rows in bench.batches(cell):
        vectors = [sae.decode(*sae.encode(rows)) - sae.b_pre for sae in saes] + [rows - mean]
        for i, one in enumerate(vectors):
            for j, other in enumerate(vectors):
                total[i, j] += cosine_similarity(one, other, dim=-1).double().sum().cpu()
        count += len(rows)
    return {
        "names": names,
        "cosine": [[round(value, 6) for value in row] for row in (total / count).tolist()],
        "n": count,
    }


def _cost(bench: Bench, cell: Cell) -> dict[str, Any]:
    return measure_cost(bench.encoder(cell.encoder).clip, bench.sae(cell.encoder, bench.spec(cell)))
