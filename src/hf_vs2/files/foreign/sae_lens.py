"""Checkpoints of SAELens: `cfg.json` and `sae_weights.safetensors`."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from ...version import __version__
from ..checkpoint_folder import looks_like_hub_id
from .checkpoint import CFG_NAME, ForeignCheckpoint
from .parts import Converted, Parts, convert, layer_of
from .sparsify import write_files


WEIGHTS_NAME = "sae_weights.safetensors"
_LAYOUT = "6.0.0"
"""The release whose layout is written. SAELens takes a file without one for an older layout."""

_REFUSED = {
    "jumprelu": "a threshold for each latent is no top-k",
    "gated": "its gate has weights of its own",
    "batchtopk": "the latents of one row depend on the other rows of the batch",
    "matryoshka_batchtopk": "the latents of one row depend on the other rows of the batch",
    "matching_pursuit": "latents are chosen one after another, on what is left to reconstruct",
    "temporal": "a row is encoded from those before it",
}
_ROW_SCALES = {
    "layer_norm": "each row is scaled by its own deviation",
    "constant_norm_rescale": "each row is scaled by its own length",
    "covariance_whitening": "the whitening is not in the checkpoint. Fold it first, with SAELens' "
    "fold_activation_whitening",
}


def load(name_or_path: str | os.PathLike, *, scaling_factor: float | None = None, **options: Any) -> Converted:
    """See [`SAEModel.from_sae_lens`]."""
    checkpoint = ForeignCheckpoint.find("sae_lens", name_or_path, options, CFG_NAME, WEIGHTS_NAME)
    parts = _parts(checkpoint)
    fold_normalization(parts, checkpoint, scaling_factor)
    if not checkpoint.setting("apply_b_dec_to_input", bool, True):
        parts.fold_input_bias()
    # A plain ReLU has no such factor.
    if parts.top_k is not None and checkpoint.setting("rescale_acts_by_decoder_norm", bool, False):
        parts.fold_decoder_norms(checkpoint.weights_path)
    metadata = checkpoint.setting("metadata", dict, {})
    hook = metadata.get("hook_name", checkpoint.config.get("hook_name", checkpoint.config.get("hook_point")))
    return convert(parts, checkpoint, layer_of(checkpoint, hook))


def _parts(checkpoint: ForeignCheckpoint) -> Parts:
    setting = checkpoint.setting
    architecture, top_k = _architecture(checkpoint)
    if setting("reshape_activations", str, "none") != "none":
        checkpoint.refuse("reshape_activations", "it reads attention heads, hf_vs2 a row")
    hidden_size, num_latents = setting("d_in", int), setting("d_sae", int)
    tensors = checkpoint.tensors()
    factor = tensors.pop("scaling_factor", None)  # of releases before 6
    if factor is not None and not bool((factor == 1).all()):
        checkpoint.refuse(
            "finetuning_scaling_factor", "today's SAELens has no such factor, so its meaning is not certain"
        )
    parts = Parts.of_columns(checkpoint, tensors, hidden_size, num_latents)
    parts.top_k, parts.activation = top_k, "absolute" if architecture == "abstopk" else "relu"
    return parts


def _architecture(checkpoint: ForeignCheckpoint) -> tuple[str, int | None]:
    """`"topk"`, `"abstopk"` or `"standard"`, and k where it has one."""
    setting = checkpoint.setting
    architecture = setting("architecture", str, "standard")
    if architecture in ("topk", "abstopk"):
        return architecture, setting("k", int)
    if architecture != "standard":
        checkpoint.refuse("architecture", _REFUSED.get(architecture, "only topk, abstopk and standard can"))
    # Before release 6 the activation was a setting of its own.
    name = "activation_fn" if "activation_fn" in checkpoint.config else "activation_fn_str"
    activation = setting(name, str, "relu")
    if activation == "topk":
        k = setting("activation_fn_kwargs", dict, {}).get("k")
        if not isinstance(k, int) or isinstance(k, bool):
            raise ValueError(f"{checkpoint.config_path}: activation_fn_kwargs has no whole number k.")
        return "topk", k
    if activation != "relu":
        checkpoint.refuse(name, "only relu and topk can")
    return "standard", None


def fold_normalization(parts: Parts, checkpoint: ForeignCheckpoint, scaling_factor: float | None) -> None:
    """Fold the constant that activations were multiplied by. A `ValueError` if it is needed and not given, or given
    and not needed, and on normalisations of another kind."""
    kind = checkpoint.config.get("normalize_activations") or "none"
    kind = "expected_average_only_in" if kind is True else kind
    if kind == "none":
        if scaling_factor is not None:
            raise ValueError(
                f"scaling_factor={scaling_factor}: {checkpoint.config_path} says that activations are not normalised, "
                "or that the factor is folded in. Leave it out."
            )
        return
    if kind != "expected_average_only_in":
        checkpoint.refuse("normalize_activations", _ROW_SCALES.get(str(kind), "it is not known here"))
    if scaling_factor is None:
        checkpoint.refuse(
            "normalize_activations",
            "the constant that activations were multiplied by in training is not in the checkpoint. Give it as "
            "scaling_factor= (square root of the width, divided by the mean length of a row), 1 if the weights have "
            "it in them",
        )
    if not (math.isfinite(scaling_factor) and scaling_factor > 0):
        raise ValueError(f"scaling_factor={scaling_factor} must be a positive number.")
    parts.fold_scale(scaling_factor)


def save(sae: Any, folder: str | os.PathLike) -> None:
    """See [`SAEModel.save_sae_lens`]."""
    config = sae.config
    num_latents, hidden_size = config.weight_shape
    base, layer = config.base_model_name_or_path, config.layer
    metadata = {
        "sae_lens_version": _LAYOUT,
        "hf_vs2_version": __version__,
        "model_name": base if looks_like_hub_id(base) else None,  # no path of this machine
        "hook_name": None if layer is None else f"blocks.{layer}.hook_resid_post",
    }
    cfg = {
        "d_in": hidden_size,
        "d_sae": num_latents,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {name: value for name, value in metadata.items() if value is not None},
    }
    if config.activation == "relu" and config.top_k == num_latents:
        cfg |= {"architecture": "standard"}
    else:
        architecture = "topk" if config.activation == "relu" else "abstopk"
        cfg |= {"architecture": architecture, "k": config.top_k, "rescale_acts_by_decoder_norm": False}
    tensors = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_pre}
    write_files(Path(folder), tensors, WEIGHTS_NAME, cfg)
