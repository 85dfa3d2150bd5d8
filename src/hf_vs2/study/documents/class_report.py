"""What a mean hides: the classes that VS2 helps and hurts, their confusions, and whether SAEs of other seeds do the
same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ...files.markdown import escaped
from ..results.analysis import agreement, fixed_confusions, per_class
from ..results.cells import Outputs
from . import published
from .markdown import table
from .result_view import ResultView


SHOWN_CLASSES = 5
SHOWN_CONFUSIONS = 5


def classes(view: ResultView) -> Iterator[str]:
    """For each encoder and data set, with the first prompts: the classes and confusions that VS2 changed most."""
    for encoder, dataset, prompts in _first_prompts(view):
        runs = view.pairs(view.seeds_of(encoder, dataset, prompts, "vs2"))
        if not runs:
            continue
        steered, repeated = map(_joined, zip(*runs, strict=True))
        names = view.meta["datasets"][dataset]["class_names"]
        found = [row for row in per_class(steered, repeated, names) if row["support"]]
        gains = published.class_gains(view.encoder_id(encoder), view.registry(dataset), prompts)
        better, worse = (sum(sign * row["gain"] > 0 for row in found) for sign in (1, -1))
        where = f"{view.title(dataset)}, {view.heading(encoder, prompts)}"
        support = sorted({row["support"] // len(runs) for row in found})
        images = f"{support[0]}" if len(support) == 1 else f"{support[0]} to {support[-1]}"
        yield (
            f"## Classes that VS2 helps and hurts: {where}\n\nAccuracy in %, gain in points, n = {len(runs)} SAE "
            f"seed{'s' if len(runs) > 1 else ''}, {images} test images a class; {better} of {len(found)} classes "
            f"gain, {worse} lose.\n\n{_class_table(found, gains)}"
        )
        confusions = fixed_confusions(steered, repeated, names, SHOWN_CONFUSIONS)
        rows = [
            [word, escaped(one["true"]), escaped(one["mistaken_for"]), f"{one['count'] / len(runs):.3g}"]
            for word, key in (("fixed", "fixed"), ("made", "broken"))
            for one in confusions[key]
        ]
        if rows:
            head = ["", "true class", "mistaken for", "images" if len(runs) == 1 else "images, mean of seeds"]
            yield f"### Most frequent confusions that VS2 fixed and made: {where}\n\n{table(head, rows)}"


def seeds(view: ResultView) -> Iterator[str]:
    """How far VS2 with SAEs of different seeds decides alike."""
    rows = []
    for encoder, dataset, prompts in _first_prompts(view):
        runs = view.pairs(view.seeds_of(encoder, dataset, prompts, "vs2"))
        if len(runs) < 2:
            continue
        found = agreement([steered for steered, _ in runs], runs[0][1])
        keys = ("same_prediction_mean", "same_prediction_min", "fixed_jaccard_mean", "fixed_jaccard_min")
        rows.append([f"{encoder}, {prompts}", view.title(dataset), *(f"{found[key]:.1f}" for key in keys)])
    if rows:
        head = ["encoder, prompts", "data set", "same prediction, mean", "least", "same images fixed, mean", "least"]
        yield (
            "## Agreement between seeds\n\nVS2 with SAEs of different seeds, over all pairs of seeds, in %: images "
            "that both put in the same class, and intersection over union of the images that each corrects plain CLIP "
            "on.\n\n" + table(head, rows)
        )


def cosines(view: ResultView) -> Iterator[str]:
    """How far SAEs of other seeds and sizes steer the same way."""
    for one in view.result.select("agreement", method="steering_cosine"):
        names, matrix = one.figures["names"], one.figures["cosine"]
        rows = [[escaped(name), *(f"{value:.3f}" for value in row)] for name, row in zip(names, matrix, strict=True)]
        yield (
            f"## Cosine between steering vectors: {view.title(one.cell.dataset)}, "
            f"{view.heading(one.cell.encoder)}\n\nMean over the test images, between VS2's steering vectors of two "
            f"SAEs; `centroid` is x - mu, the direction without an SAE.\n\n{table(['', *map(escaped, names)], rows)}"
        )


def _first_prompts(view: ResultView) -> list[tuple[str, str, str]]:
    """Each encoder and data set with VS2 in the table, with its first prompt set."""
    first: dict[tuple[str, str], str] = {}
    for one in view.table_cells:
        if one.cell.method == "vs2":
            first.setdefault((one.cell.encoder, one.cell.dataset), one.cell.prompts)
    return [(encoder, dataset, prompts) for (encoder, dataset), prompts in first.items()]


def _class_table(found: Sequence[dict[str, Any]], theirs: dict[str, float]) -> str:
    """The classes that gain and lose most, and those that the paper names."""
    ranked = sorted(found, key=lambda row: -row["gain"])
    half = min(SHOWN_CLASSES, len(ranked) // 2)
    edges = [*ranked[:half], *ranked[len(ranked) - half :]]
    shown = [row for row in ranked if row in edges or published.class_key(row["name"]) in theirs]
    rows = []
    for row in shown:
        gain = f"{row['gain']:+.1f}"
        key = published.class_key(row["name"])
        if key in theirs:
            gain += f" [{theirs[key]:+g}]"
        rows.append([escaped(row["name"]), f"{row['plain']:.1f}", f"{row['steered']:.1f}", gain])
    return table(["class", "CLIP", "VS2", "gain"], rows)


def _joined(runs: Sequence[Outputs]) -> Outputs:
    """The outcomes of several runs one after the other."""
    return Outputs(torch.cat([one.labels for one in runs]), torch.cat([one.predictions for one in runs]))
