"""What is computed from weights and kept for later calls, for as long as these weights stay as they were."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import nn


T = TypeVar("T")

# Entries of each weight that are compared by value.
_SAMPLE_SIZE = 8


class Kept(Generic[T]):
    """
    Values by key, all computed from one state of weights; the least recently used go first.

    Safe to use from several threads. A copy, and what another process receives, is empty. To ask costs a comparison of
    weights ([`weights_state`]), on a GPU a wait for it: a call with many batches asks once.

    Args:
        capacity (`int`): how large the values may be together; the latest is kept, however large.
        size: how large a value is. By default each counts as one.
    """

    def __init__(self, capacity: int, size: Callable[[T], int] | None = None):
        self.capacity = capacity
        self._size = size
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._state: Any = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.capacity, self._size)

    def __len__(self) -> int:
        return len(self._values)

    def clear(self) -> None:
        """Forget every value."""
        with self._lock:
            self._values.clear()

    def get(self, state: Any, key: Hashable, make: Callable[[], T]) -> T:
        """The value of `key`, made now unless it is kept. Values of another `state` (compared by `==`) are dropped."""
        # What an inference makes may serve a training step later: no inference tensors, and no graph (which leaving
        # the mode would switch on again).
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if state != self._state:
                self._values.clear()
                self._state = state
            if key not in self._values:
                self._values[key] = make()
            self._values.move_to_end(key)
            size = self._size or (lambda _: 1)
            while len(self) > 1 and sum(map(size, self._values.values())) > self.capacity:
                self._values.popitem(last=False)
            return self._values[key]


@torch.no_grad()
def weights_state(parameters: Iterable[nn.Parameter]) -> tuple[Any, ...]:
    """
    Compares equal as long as the weights are the same.

    Autograd's version counters tell of every ordinary change in place (an optimizer's step, `load_state_dict`),
    addresses, dtypes and devices of every move. Neither sees a write through `.data` (as exponential averages and
    adapter merging do), nor is an address never used twice: so a few entries of each weight are compared by value as
    well. All of it costs about a millisecond. Autocast is part of it, since it changes what the weights give.
    """
    parameters = list(parameters)
    kinds = {parameter.device.type for parameter in parameters} - {"meta"}
    autocast = tuple(torch.get_autocast_dtype(kind) for kind in sorted(kinds) if torch.is_autocast_enabled(kind))
    return autocast, weights_version(parameters), _sample(parameters)


def weights_version(parameters: Iterable[nn.Parameter]) -> tuple[Any, ...]:
    """The part of [`weights_state`] that costs nothing: it does not see a write through `.data`."""
    # Tensors made under `inference_mode` have no version counter.
    return tuple((p.data_ptr(), None if p.is_inference() else p._version, p.dtype, p.device) for p in parameters)


def _sample(parameters: Iterable[nn.Parameter]) -> tuple[float, ...]:
    """Evenly spaced entries of each weight; one copy from each device. Weights that are offloaded have none, nor have
    quantised ones."""
    entries: dict[torch.device, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.device.type != "meta" and type(parameter) in (torch.Tensor, nn.Parameter):
            step = max(1, parameter.numel() // _SAMPLE_SIZE)
            entries.setdefault(parameter.device, []).append(parameter.flatten()[::step])
    return tuple(value for found in entries.values() for value in torch.cat(found).tolist())
