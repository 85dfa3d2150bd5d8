"""A mark that tells whether weights are still what they were when something was computed from them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


# Entries of each weight that are compared by value.
_SAMPLE_SIZE = 8


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
    return tuple(_identity(parameter) for parameter in parameters)


def _identity(parameter: nn.Parameter) -> tuple[Any, ...]:
    # Tensors made under `inference_mode` have no version counter.
    version = None if parameter.is_inference() else parameter._version
    return parameter.data_ptr(), version, parameter.dtype, parameter.device


def _sample(parameters: Iterable[nn.Parameter]) -> tuple[float, ...]:
    """Evenly spaced entries of each weight; one copy from each device. Weights that are offloaded have none, nor have
    quantised ones."""
    entries: dict[torch.device, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.device.type != "meta" and type(parameter) in (torch.Tensor, nn.Parameter):
            step = max(1, parameter.numel() // _SAMPLE_SIZE)
            entries.setdefault(parameter.device, []).append(parameter.flatten()[::step])
    return tuple(value for found in entries.values() for value in torch.cat(found).tolist())


__all__ = ["weights_state", "weights_version"]
