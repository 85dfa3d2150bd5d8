"""What the demo measured, and how it tells it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..data.labels.prompts import SINGLE_TEMPLATE
from ..data.stores.activations import ActivationStore
from ..evaluation.comparison import EvaluationResult
from ..evaluation.table import terminal_table, wrapped
from .data import DIGIT_NAMES


NUM_FOLDS = 3


@dataclass
class ForeignSet:
    """Images of another kind, seen by the gate of every fold's SAE."""

    name: str
    relative_fvu: torch.Tensor
    """`(num_folds * num_images,)`: per-sample FVU divided by that gate's threshold; up to 1 an image is steered."""

    @property
    def coverage(self) -> float:
        """Share of the images that would be steered."""
        return (self.relative_fvu <= 1).double().mean().item()


@dataclass
class DemoResult:
    """What the demo measured, and where it put it."""

    output_dir: Path
    evaluation: EvaluationResult
    """All images, each by the SAE of the fold that had not seen it, in the order of the data set."""
    relative_fvu: torch.Tensor
    """`(num_images,)`: per-sample FVU divided by the gate's threshold of the same fold."""
    foreign: list[ForeignSet]
    store: ActivationStore
    seconds: float = 0.0

    @property
    def results_path(self) -> Path:
        return self.output_dir / "results.json"

    @property
    def figure_path(self) -> Path:
        return self.output_dir / "demo.png"

    @property
    def model_path(self) -> Path:
        return self.output_dir / "model"

    @property
    def sae_path(self) -> Path:
        return self.output_dir / "sae"

    def __str__(self) -> str:
        return "\n".join([*self._measured(), "", *self._places(), "", *self._next_lines()])

    def _measured(self) -> list[str]:
        meta = self.evaluation.meta
        foreign = [f"{group.name} {group.coverage:.0%}" for group in self.foreign]
        low, high = meta["plain_accuracy_by_fvu"]["lower half"], meta["plain_accuracy_by_fvu"]["upper half"]
        covered = self.evaluation.row("vs2+gate")["coverage"]
        return [
            *wrapped(
                f"A CLIP trained on typefaces reads {meta['n']:,} handwritten digits; {NUM_FOLDS} folds, one SAE "
                "each, no labels:"
            ),
            "",
            terminal_table(self.evaluation, others="in results.json"),
            "",
            *wrapped(f"The gate lets {covered:.0%} of the digits pass; of foreign images: {', '.join(foreign)}."),
            *wrapped(
                f"FVU tells where CLIP errs: it is right on {low:.1f} % of the half that the SAE reconstructs best, "
                f"and on {high:.1f} % of the rest."
            ),
        ]

    def _places(self) -> list[str]:
        places = {
            "picture": self.figure_path,
            "every figure": self.results_path,
            "SAE checkpoint": self.sae_path,
            "steered CLIP": self.model_path,
            "activations": self.store.path,
        }
        return [f"Done in {self.seconds:.0f} s. Written:", *(f"  {what:<15} {path}" for what, path in places.items())]

    def _next_lines(self) -> list[str]:
        image = str(self.output_dir / "digit.png")
        return [
            "Use it in Python:",
            "  import hf_vs2, transformers",
            f'  classify = transformers.pipeline("zero-shot-image-classification", model={str(self.model_path)!r})',
            f"  classify({image!r}, candidate_labels={list(DIGIT_NAMES)}, hypothesis_template={SINGLE_TEMPLATE[0]!r})",
        ]
