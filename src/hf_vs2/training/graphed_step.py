"""A training step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch


_WARM_UP = 3
"""Steps taken as they come before one is recorded, so that what libraries set up on their first calls is not."""


class GraphedStep:
    """
    `step(x)`, taken by replaying its work as one CUDA graph.

    An SAE's step is some 150 small operations: at usual batch sizes Python takes longer to ask for them than a GPU to
    do them. The numbers are those of `step` itself (`tests/training/test_graphed_step.py`).

    Args:
        step (`Callable`): does its work on the rows `x`, whose shape and dtype never change. What it changes (weights,
            optimizer state, counters) it changes in place; it returns nothing and waits for nothing. Anything that it
            reads must be a tensor that stays where it is: a number would be replayed as it was when recorded.
        device (`torch.device`): the GPU.
    """

    def __init__(self, step: Callable[[torch.Tensor], None], device: torch.device):
        self._step, self._device = step, device
        self._stream = torch.cuda.Stream(device)
        self._taken = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._x = torch.empty(0)

    def __call__(self, x: torch.Tensor) -> None:
        """One step on `x`, on the GPU or in pinned memory. Returns before it is done."""
        if self._taken < _WARM_UP:
            self._taken += 1
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):  # where graphs are recorded: gradients must come from there
                self._step(x.to(self._device, non_blocking=True))
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            return
        if self._graph is None:
            self._x = torch.empty_like(x, device=self._device)
            self._graph = torch.cuda.CUDAGraph()
            # "thread_local": meanwhile another thread may read the next rows into pinned memory.
            with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                self._step(self._x)
        self._x.copy_(x, non_blocking=True)
        self._graph.replay()
