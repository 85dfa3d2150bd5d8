"""One optimizer step of an SAE's training: as it comes, or replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator

from ..sae.modeling import SAEModel, SAEOutput
from .arguments import SAETrainingArguments
from .graphed_step import GraphedStep
from .progress import TrainingProgress


Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]
"""Rows, and labels where they are used."""


class Meter:
    """Loss and FVU since the last log entry; sums stay on the device, one reduction a log entry."""

    def __init__(self, total_variance: float, accelerator: Accelerator):
        self.total_variance, self.accelerator = total_variance, accelerator
        dtype = torch.float64 if accelerator.device.type != "mps" else torch.float32
        self.sums = torch.zeros(3, dtype=dtype, device=accelerator.device)

    @torch.no_grad()
    def add(self, x: torch.Tensor, reconstruction: torch.Tensor, loss: torch.Tensor) -> None:
        error = (x - reconstruction.float()).square().sum()
        self.sums += torch.stack([loss.detach() * len(x), error, torch.full_like(error, len(x))]).to(self.sums.dtype)

    def read(self) -> dict[str, float]:
        """The means since the last call."""
        loss, error, count = self.accelerator.reduce(self.sums, "sum").tolist()
        self.sums.zero_()
        return {"loss": loss / count, "fvu": error / (count * self.total_variance)}


class TrainingStep:
    """
    Forward, backward and optimizer on the micro batches of one step. Counters of idle latents and the meter go along,
    in place; nothing waits for a GPU.

    Args:
        model, optimizer: as accelerate has prepared them.
        sae (`SAEModel`): the model itself.
        label_term (`Callable`): what labels add to the loss of a micro batch that has some.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        sae: SAEModel,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        args: SAETrainingArguments,
        label_term: Callable[[SAEOutput, torch.Tensor], torch.Tensor],
        progress: TrainingProgress,
        meter: Meter,
    ):
        self.model, self.sae, self.optimizer, self.accelerator, self.args = model, sae, optimizer, accelerator, args
        self.label_term, self.progress, self.meter = label_term, progress, meter

    def __call__(self, batches: Iterable[Batch], revive: bool) -> None:
        """`revive`: with the loss that revives dead latents. Before any can be dead it is left out."""
        idle = self.progress.steps_since_active
        active = torch.zeros_like(idle)
        dead = self.progress.dead(self.args.dead_latent_threshold) if revive else None
        for x, labels in batches:
            out = self._micro_batch(x, labels, dead)
            active.scatter_reduce_(
                0, out.latent_indices.flatten(), (out.latent_values != 0).flatten().long(), reduce="amax"
            )
        self.sae.normalize_decoder()
        # Reduced by hand: each process has seen only its part of the batch.
        active = self.accelerator.reduce(active, "sum")
        idle.add_(1).masked_fill_(active > 0, 0)

    def _micro_batch(self, x: torch.Tensor, labels: torch.Tensor | None, dead: torch.Tensor | None) -> Any:
        with self.accelerator.accumulate(self.model):
            out = self.model(x, dead_latents=dead)
            loss = out.loss if labels is None else out.loss + self.label_term(out, labels)
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.sae.remove_parallel_decoder_gradient()
                if self.args.max_grad_norm:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.meter.add(x, out.reconstruction, loss)
        return out


class GraphedTrainingStep:
    """The same [`TrainingStep`], of one micro batch without labels, replayed as a CUDA graph. Adam must be
    `capturable`."""

    def __init__(self, step: TrainingStep):
        self._step = step
        self._learning_rate = torch.zeros((), device=step.accelerator.device)
        self._graphs: dict[bool, GraphedStep] = {}

    @staticmethod
    def suits(accelerator: Accelerator, args: SAETrainingArguments, with_labels: bool) -> bool:
        """Whether the step never asks another process, and never looks at a number before it goes on."""
        return (
            not args.disable_cuda_graphs
            and accelerator.device.type == "cuda"
            and accelerator.num_processes == 1
            and args.gradient_accumulation_steps == 1
            and accelerator.mixed_precision != "fp16"  # whose scaler looks for infinities
            and not with_labels
        )

    def __call__(self, batches: Iterable[Batch], revive: bool) -> None:
        if revive not in self._graphs:
            # One at a time: each holds the memory of a step.
            self._graphs = {revive: GraphedStep(partial(self._take, revive=revive), self._learning_rate.device)}
        self._learning_rate.fill_(self._step.optimizer.param_groups[0]["lr"])
        ((rows, _),) = batches
        self._graphs[revive](rows)

    def _take(self, x: torch.Tensor, revive: bool) -> None:
        group = self._step.optimizer.param_groups[0]
        # A graph would keep the number that it was recorded with.
        number, group["lr"] = group["lr"], self._learning_rate
        try:
            self._step([(x, None)], revive)
        finally:
            group["lr"] = number
