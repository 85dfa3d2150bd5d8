"""Checkpoints of EleutherAI's `sparsify`: `cfg.json` and `sae.safetensors`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..atomic import replace_files
from ..json_files import write_json
from .checkpoint import CFG_NAME, ForeignCheckpoint
from .parts import Converted, Parts, convert, refuse_hook


WEIGHTS_NAME = "sae.safetensors"
_RESIDUAL = re.compile(r"(?:.*\.)?layers\.(\d+)")
# Names of modules whose output is something else: one inside a layer, of the text tower, or before or after the
# layers.
_ELSEWHERE = re.compile(
    r"(?:.*\.)?(?:(?:layers?|h|blocks?|resblocks)\.\d+|text_model|vision_model|embed\w*|\w*lay\w*norm\d?|ln_\w+|mlp"
    r"|self_attn|attn|attention|fc\d|\w+_proj|\w+_projection)(?:\..*)?"
)


def load(name_or_path: str | os.PathLike, **options: Any) -> Converted:
    """See [`SAEModel.from_sparsify`]."""
    checkpoint = ForeignCheckpoint.find("sparsify", name_or_path, options, CFG_NAME, WEIGHTS_NAME)
    setting = checkpoint.setting
    if setting("transcode", bool, False):
        checkpoint.refuse("transcode", "a transcoder reads one place and predicts another")
    if setting("skip_connection", bool, False):
        checkpoint.refuse("skip_connection", "a skip connection adds what is not in the code")
    if setting("activation", str, "topk") != "topk":
        checkpoint.refuse("activation", "only top-k picks the largest latents of all")
    hidden_size = setting("d_in", int)
    # Defaults are those of its own reader.
    num_latents = setting("num_latents", int, 0) or hidden_size * setting("expansion_factor", int, 32)
    tensors = checkpoint.tensors()
    matrix = (num_latents, hidden_size)
    checkpoint.check(
        tensors, {"encoder.weight": matrix, "encoder.bias": (num_latents,), "W_dec": matrix, "b_dec": (hidden_size,)}
    )
    parts = Parts(
        W_enc=tensors["encoder.weight"],
        b_enc=tensors["encoder.bias"],
        W_dec=tensors["W_dec"],
        b_pre=tensors["b_dec"],
        top_k=setting("k", int, 32),
        # Of releases before 1.0: the largest by absolute value, without ReLU.
        activation="absolute" if setting("signed", bool, False) else "relu",
    )
    return convert(parts, checkpoint, _layer_of(checkpoint) if checkpoint.told.layer is None else None)


def _layer_of(checkpoint: ForeignCheckpoint) -> int | None:
    """The encoder layer by the name of the folder, which sparsify takes from the module whose output the SAE reads;
    `None` for a name that says nothing. The name of another module than a layer of the vision tower is refused."""
    name = Path(checkpoint.config_path).parent.name
    residual = None if "text_model" in name else _RESIDUAL.fullmatch(name)
    if residual is None and _ELSEWHERE.fullmatch(name):
        refuse_hook(checkpoint, name)
    return int(residual[1]) if residual else None


def save(sae: Any, folder: str | os.PathLike) -> None:
    """See [`SAEModel.save_sparsify`]."""
    config = sae.config
    if config.activation != "relu":
        raise ValueError(
            f"activation={config.activation!r} can't be saved for sparsify, whose encoder ends in a ReLU. SAELens has "
            "it: save_sae_lens."
        )
    num_latents, hidden_size = config.weight_shape
    norms = sae.W_dec.detach().float().norm(dim=-1)
    cfg = {
        "activation": "topk",
        "expansion_factor": config.expansion_factor,
        "normalize_decoder": torch.allclose(norms, torch.ones_like(norms), atol=1e-3),  # of further training
        "num_latents": num_latents,
        "k": config.top_k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": hidden_size,
    }
    tensors = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_pre}
    write_files(Path(folder), tensors, WEIGHTS_NAME, cfg)


def write_files(folder: Path, tensors: Mapping[str, torch.Tensor], weights_name: str, cfg: dict[str, Any]) -> None:
    """Weights and `cfg.json`, whole or not at all."""

    def write(scratch: Path) -> None:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, scratch / weights_name
        )
        write_json(scratch / CFG_NAME, cfg)

    replace_files(folder, write, CFG_NAME)
