"""Which of the paper's orders of methods hold in a study, and whether VS2 beats the controls without an SAE."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..results.cells import CellResult
from ..results.view import distinct
from .markdown import mean, spread, table
from .result_view import ResultView


ORDER = (
    ("vs2", "clip"),
    ("vs2", "amplify"),
    ("amplify", "reconstruct"),
    ("clip", "reconstruct"),
    ("vs2++", "vs2"),
    ("vs2++oracle", "vs2++"),
    ("vs2", "vs2_last2"),
    ("vs2_last2", "vs2_last3"),
)
"""What the paper's figures say on each of its data sets: the first of each pair is better."""
CONTROLS = ("centroid", "distribution_norm_0.5", "distribution_norm_1", "mean_logit")
"""Controls without an SAE, which a gain of VS2 must beat to be the SAE's."""
DICTIONARIES = (
    ("vs2", "vs2_random"),
    ("vs2", "vs2_pca"),
    ("prototypes+sae", "prototypes"),
    ("prototypes+sae", "prototypes+random"),
    ("prototypes+sae", "prototypes+pca"),
    ("corrected+distribution_norm", "distribution_norm_1"),
)
"""A rule of the SAE, and the same without it or with a dictionary that nobody trained."""
HOLDS, FAILS, OPEN = "holds", "does not hold", "within noise"


@dataclass(frozen=True)
class Compared:
    """One claim, `better` > `worse`, on one encoder, data set and prompt set."""

    better: str
    worse: str
    place: tuple[str, str, str]
    figures: tuple[str, str]
    difference: float
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        if self.interval is not None and self.interval[0] <= 0 <= self.interval[1]:
            return OPEN
        return HOLDS if self.difference > 0 else FAILS


def order(view: ResultView) -> str:
    """The claims with their counts, and in a table those that fail or are open; `""` if no claim could be tried."""
    claims = [(better, worse) for better, worse in ORDER]
    controls = [("vs2", control) for control in CONTROLS]
    dictionaries = list(DICTIONARIES)
    found = compare(view, claims + controls + dictionaries)
    if not found:
        return ""
    parts = [
        "## Where the paper's order holds, and where it does not",
        "Differences are in points, on the same images, averaged over seeds; the interval is a 95 % one over images "
        f"(normal approximation), not over SAEs. A difference whose interval holds 0 is called {OPEN}; without an "
        "interval (the files of outcomes are gone) its sign decides.",
    ]
    headings = (
        "In the paper's figures each of these holds:",
        "VS2 against controls without an SAE, which the paper does not have:",
        "What the SAE adds: its rules against the same ones without it, with random directions, or with principal "
        "components:",
    )
    for heading, wanted in zip(headings, (claims, controls, dictionaries), strict=True):
        lines = [_counted(view, claim, found) for claim in wanted if any((o.better, o.worse) == claim for o in found)]
        if lines:
            parts += [heading, "\n".join(lines)]
    open_ = [one for verdict in (FAILS, OPEN) for one in found if one.verdict == verdict]
    if open_:
        parts += [f"Those that do not hold or are {OPEN}:", _details(view, open_)]
    return "\n\n".join(parts)


def compare(view: ResultView, claims: Sequence[tuple[str, str]]) -> list[Compared]:
    """Each claim in each place where both methods were measured, claim by claim."""
    places = distinct((one.cell.encoder, one.cell.dataset, one.cell.prompts) for one in view.table_cells)
    found = []
    for better, worse in claims:
        for place in places:
            encoder, dataset, prompts = place
            left, right = (view.seeds_of(encoder, dataset, prompts, method) for method in (better, worse))
            if left and right:
                shown = [spread([one.figures["top1"] for one in side]) for side in (left, right)]
                found.append(Compared(better, worse, place, (shown[0], shown[1]), *difference(view, left, right)))
    return found


def difference(
    view: ResultView, left: Sequence[CellResult], right: Sequence[CellResult]
) -> tuple[float, tuple[float, float] | None]:
    """Points by which `left` is better, and its interval over images where both judged the same ones."""
    images: list[torch.Tensor] = []
    for one, other in ((one, other) for one in left for other in right if _same_seed(one, other)):
        first, second = view.outputs(one), view.outputs(other)
        if first is None or second is None:
            images = []
            break
        # Methods that run the whole model on images may have seen some of them only.
        shared = first.images if first.images is not None else second.images
        first, second = first.at(shared), second.at(shared)
        images.append(first.right.double() - second.right.double())
    if not images:
        # The gains are each over plain CLIP on the method's own images.
        return mean(one.figures["gain"] for one in left) - mean(one.figures["gain"] for one in right), None
    mean_of_seeds = 100 * torch.stack(images).mean(0)
    points = float(mean_of_seeds.mean())
    half = 1.96 * float(mean_of_seeds.std(correction=0)) / math.sqrt(len(mean_of_seeds))
    return points, (points - half, points + half)


def _counted(view: ResultView, claim: tuple[str, str], found: Sequence[Compared]) -> str:
    verdicts = Counter(one.verdict for one in found if (one.better, one.worse) == claim)
    counts = ", ".join(f"{word} in {verdicts[word]}" for word in (HOLDS, OPEN, FAILS) if verdicts[word])
    return f"- **{_claim(view, *claim)}**: {counts} of {verdicts.total()}."


def _details(view: ResultView, found: Sequence[Compared]) -> str:
    several = len({one.cell.encoder for one in view.table_cells}) > 1
    rows = []
    for one in found:
        encoder, dataset, prompts = one.place
        place = [view.title(dataset), *([encoder] if several else []), f'"{prompts}"']
        between = "" if one.interval is None else f"{one.interval[0]:+.2f} to {one.interval[1]:+.2f}"
        claim = _claim(view, one.better, one.worse)
        rows.append([claim, ", ".join(place), *one.figures, f"{one.difference:+.2f}", between, one.verdict])
    return table(["claim", "where", "first", "second", "difference", "95 %", "verdict"], rows)


def _claim(view: ResultView, better: str, worse: str) -> str:
    return f"{view.label(better, mark=False)} > {view.label(worse, mark=False)}"


def _same_seed(one: CellResult, other: CellResult) -> bool:
    return one.cell.seed is None or other.cell.seed is None or one.cell.seed == other.cell.seed
