"""Models inside the wrappers of other libraries: the model itself, and weights kept elsewhere between calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def unwrapped(model: Any) -> Any:
    """The model inside the wrappers of `torch.compile`, peft and data-parallel training; anything else as it is.

    Layers of a LoRA stand inside the model, and go on working. What `torch.compile` made of the whole model does not
    run where parts of it are called: to compile the vision tower alone, use `clip.vision_model.compile()`.
    """
    while isinstance(model, nn.Module):
        inner = model._modules.get("_orig_mod")  # torch.compile
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        elif inner is None and hasattr(type(model), "get_base_model"):  # peft
            inner = model.get_base_model()  # type: ignore[operator]
        if inner is None:
            return model
        model = inner
    return model


def weights_of(module: nn.Module, *names: str) -> tuple[torch.Tensor, ...]:
    """Parameters and buffers of a module by name, be it that accelerate keeps them on the disk or in the host's memory
    between calls (`cpu_offload`, `disk_offload`, a `device_map`)."""
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
    found = tuple(getattr(module, name) for name in names)
    if hook is not None:
        hook.post_forward(module, None)
    return found


def device_of(model: Any) -> torch.device:
    """Where a model runs, which is not where accelerate may keep its weights between calls."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    runs_on = (getattr(hook, "execution_device", None) for hook in hooks)
    found = next((device for device in runs_on if device is not None), None)
    return model.device if found is None else torch.device(found)


def is_offloaded(model: nn.Module) -> bool:
    """Whether some of its weights are on the disk or in the host's memory between calls."""
    return any(parameter.is_meta for parameter in model.parameters())


def is_quantised(weight: torch.Tensor) -> bool:
    """Whether it is no plain tensor of floats, as torchao's and bitsandbytes' are not."""
    return not weight.is_floating_point() or type(weight).__module__.partition(".")[0] == "torchao"
