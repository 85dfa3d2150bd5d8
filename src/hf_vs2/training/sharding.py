"""FSDP as accelerate configures it, for an SAE whose weights, gradients and optimizer state are too many for one
device."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from ..sae.modeling import SAEModel


def refuse_unfit_fsdp() -> None:
    """Raises `ValueError` under an FSDP configuration that would fail later, or extract rows with weights left out."""
    if not _is_on("ACCELERATE_USE_FSDP"):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("This accelerate configuration asks for FSDP version 1: set fsdp_version: 2 in it.")
    if _is_on("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        # It leaves the weights of every model, the CLIP's too, unset on all processes but the first.
        raise ValueError(
            "This accelerate configuration has fsdp_cpu_ram_efficient_loading, which accelerate assumes where it is "
            "not said: set fsdp_cpu_ram_efficient_loading: false in it."
        )
    if os.environ.get("FSDP_STATE_DICT_TYPE") != "FULL_STATE_DICT":
        # Torch keeps a pickle in the other kind, and accelerate 1.10 forgets Adam's state when it reads it.
        raise ValueError(
            "This accelerate configuration has sharded training checkpoints: set fsdp_state_dict_type: "
            "FULL_STATE_DICT."
        )


def apply_fsdp(accelerator: Accelerator) -> None:
    """Make an FSDP configuration hold on CPU processes too, and keep the precision of what the loss is measured
    against."""
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU and _is_on("ACCELERATE_USE_FSDP"):
        # accelerate heeds it with GPUs and their like only: each process would train a whole copy without a word.
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        if accelerator.mixed_precision != "no":
            state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
    if accelerator.is_fsdp2 and state.fsdp_plugin.mixed_precision_policy is not None:
        # Half precision is for the products. By default it would round the rows, the loss and the sum of gradients
        # too.
        state.fsdp_plugin.mixed_precision_policy = replace(
            state.fsdp_plugin.mixed_precision_policy,
            reduce_dtype=torch.float32,
            output_dtype=None,
            cast_forward_inputs=False,
        )


def whole_model(sharded: SAEModel) -> SAEModel:
    """A plain model with all the weights of one that FSDP has dealt out. Every process must ask at the same time."""
    weights = {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in sharded.state_dict().items()
    }
    with torch.device("meta"):
        whole = SAEModel(sharded.config)
    whole.load_state_dict(weights, assign=True)
    return whole


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1")
