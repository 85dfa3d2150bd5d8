"""Loss terms that let labels shape an SAE while it is trained. At inference no label is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias

import torch

from ..functional.equations import prototype_alignment
from ..sae.modeling import SAEOutput


LabelLoss: TypeAlias = Callable[[SAEOutput, torch.Tensor], torch.Tensor]
"""From the SAE's output for a batch and its labels `(batch,)` int64, -1 where unknown, to a scalar in squared units of
the activations: the trainer divides it by their total variance, as it does with the reconstruction error."""


@dataclass(frozen=True)
class PrototypeAlignment:
    """
    PASS (appendix L of arXiv 2506.01247): draws the latents of a row towards the mean latents of its class.

    The class means are those of the rows that one process sees in one forward pass, so `per_device_train_batch_size`
    should hold several rows a class: a row that is alone with its class adds nothing.

    Args:
        weight (`float`, *optional*, defaults to 0.8): the paper's `w_aux`. More of it gives tighter classes and a
            worse reconstruction.

    Raises:
        `ValueError`: if `weight` is negative or not finite.
    """

    weight: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"The weight of the prototype alignment must be a number from 0, not {self.weight}.")

    def __call__(self, out: SAEOutput, labels: torch.Tensor) -> torch.Tensor:
        assert out.latent_values is not None and out.latent_indices is not None
        return self.weight * prototype_alignment(out.latent_values, out.latent_indices, labels)


def describe_label_loss(label_loss: LabelLoss) -> dict[str, Any]:
    """What checkpoints record of a term: its name and, of a dataclass, the fields that JSON can hold."""
    record: dict[str, Any] = {"name": getattr(label_loss, "__name__", type(label_loss).__name__)}
    if is_dataclass(label_loss):
        values = {field.name: getattr(label_loss, field.name) for field in fields(label_loss)}
        record |= {name: value for name, value in values.items() if isinstance(value, (bool, int, float, str))}
    return record
