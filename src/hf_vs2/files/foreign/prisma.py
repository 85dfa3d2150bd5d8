"""Checkpoints of ViT-Prisma: `config.json`, and weights that are a pickle unless somebody has turned them into
safetensors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers.utils import CONFIG_NAME

from ..weight_files import unpickled
from .checkpoint import ForeignCheckpoint, as_weights
from .parts import Converted, Parts, convert, layer_of
from .sae_lens import fold_normalization


_HUB_NAME = "weights.pt"
"""What the repositories of ViT-Prisma's authors call it."""


def load(
    name_or_path: str | os.PathLike,
    *,
    weights_name: str | None = None,
    scaling_factor: float | None = None,
    **options: Any,
) -> Converted:
    """See [`SAEModel.from_prisma`]."""
    weights_name = weights_name or _weights_of(name_or_path, options.get("subfolder"))
    checkpoint = ForeignCheckpoint.find("prisma", name_or_path, options, CONFIG_NAME, weights_name)
    parts = _parts(checkpoint)
    fold_normalization(parts, checkpoint, scaling_factor)
    setting = checkpoint.setting
    known = checkpoint.told.layer is not None
    hook = None if known else f"blocks.{setting('hook_point_layer', int)}.{setting('layer_subtype', str)}"
    notes: tuple[str, ...] = ()
    if not setting("cls_token_only", bool, False):
        tokens = "patch tokens alone" if setting("use_patches_only", bool, False) else "CLS and patch tokens"
        notes = (f"It was trained on {tokens}; here it reads the CLS token.",)
    return convert(parts, checkpoint, layer_of(checkpoint, hook), notes)


def _weights_of(name_or_path: str | os.PathLike, subfolder: str | None) -> str:
    """The one file of weights in a folder, safetensors before a pickle."""
    folder = Path(name_or_path, subfolder or "")
    if not folder.is_dir():
        return _HUB_NAME
    for pattern in ("*.safetensors", "*.pt"):
        files = sorted(path.name for path in folder.glob(pattern))
        if len(files) > 1:
            raise ValueError(f"{folder} holds {files[0]} and {files[1]}: say which with weights_name=.")
        if files:
            return files[0]
    return _HUB_NAME


def _parts(checkpoint: ForeignCheckpoint) -> Parts:
    setting = checkpoint.setting
    if setting("is_transcoder", bool, False):
        checkpoint.refuse("is_transcoder", "a transcoder reads one place and predicts another")
    if setting("architecture", str, "standard") != "standard":
        checkpoint.refuse("architecture", "only standard can: a gate has weights of its own, a threshold is no top-k")
    if checkpoint.config.get("hook_point_head_index") is not None:
        checkpoint.refuse("hook_point_head_index", "it reads one attention head, hf_vs2 a whole row")
    top_k = None
    activation = setting("activation_fn_str", str)
    if activation == "topk":
        options = setting("activation_fn_kwargs", dict, {})
        if options.keys() != {"k"} or not isinstance(options["k"], int) or isinstance(options["k"], bool):
            checkpoint.refuse("activation_fn_kwargs", "expected a whole number k and nothing else")
        top_k = options["k"]
    elif activation != "relu":
        checkpoint.refuse("activation_fn_str", "only relu and topk can")
    hidden_size = setting("d_in", int)
    num_latents = hidden_size * setting("expansion_factor", int)
    is_pickle = not checkpoint.weights_path.endswith(".safetensors")
    tensors = _unpickled(checkpoint.weights_path) if is_pickle else checkpoint.tensors()
    parts = Parts.of_columns(checkpoint, tensors, hidden_size, num_latents)
    parts.top_k = top_k
    return parts


def _unpickled(path: str) -> dict[str, torch.Tensor]:
    """Tensors by torch's reader that runs no code. What ViT-Prisma's `save_model` writes holds an object of its own:
    a `ValueError` says how to turn it into safetensors."""
    content = unpickled(
        path,
        "If you trust it, write its tensors beside it once, where ViT-Prisma is installed: found = torch.load(path, "
        "weights_only=False); safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in "
        "found['state_dict'].items()}, 'weights.safetensors'). Then convert again.",
    )
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path} holds no tensors by name. Expected W_enc, b_enc, W_dec and b_dec.")
    return as_weights(content, path)
