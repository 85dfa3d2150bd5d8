"""Which rows a training sees at each step, and how they reach the device."""

from __future__ import annotations

from collections.abc import Generator

import torch
from accelerate import Accelerator

from ..data.ahead import map_ahead
from ..data.stores.rows import Rows
from .step import Batch


class BatchPlan:
    """Which rows make up each batch: consecutive slices of an endless chain of seeded permutations.

    A pure function of the batch number, so that resuming needs no sampler state, and that any number of processes see
    the same global batches. Every row comes once an epoch; a batch may span two epochs.
    """

    def __init__(self, rows: torch.Tensor, batch_size: int, seed: int):
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._cached: tuple[int, torch.Tensor] = (-1, rows)

    def __getitem__(self, number: int) -> torch.Tensor:
        start, needed, parts = number * self.batch_size, self.batch_size, []
        while needed:
            epoch, offset = divmod(start, len(self.rows))
            part = self._epoch(epoch)[offset : offset + needed]
            parts.append(part)
            start, needed = start + len(part), needed - len(part)
        return torch.cat(parts)

    def _epoch(self, epoch: int) -> torch.Tensor:
        if self._cached[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._cached = (epoch, self.rows[torch.randperm(len(self.rows), generator=generator)])
        return self._cached[1]


def read_batches(
    rows: Rows,
    labels: torch.Tensor | None,
    plan: BatchPlan,
    accelerator: Accelerator,
    numbers: range,
) -> Generator[Batch, None, None]:
    """
    This process's part of each batch of the plan, read by a thread while the batch before is trained on.

    Yields:
        The rows, `(rows of one process, hidden_size)`, and their labels or `None`; in pinned memory where the device
        is a GPU, from where a copy does not wait for it.
    """
    device, size = accelerator.device, plan.batch_size // accelerator.num_processes
    first = accelerator.process_index * size

    def read(number: int) -> Batch:
        mine = plan[number][first : first + size]
        batch = rows.take(mine), None if labels is None else labels[mine]
        if device.type != "cuda":
            return batch
        with torch.cuda.device(device):  # a thread starts on the first GPU
            return batch[0].pin_memory(), None if batch[1] is None else batch[1].pin_memory()

    # One ahead, no more: memory stays what it is.
    return map_ahead(read, ([number] for number in numbers), lambda _, batches: batches[0], num_threads=1, ahead=1)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device; nothing waits for the copy."""
    rows, labels = batch
    return rows.to(device, non_blocking=True), None if labels is None else labels.to(device, non_blocking=True)
