"""SAEs of other libraries: their checkpoints read as those of a [`SAEModel`], and a [`SAEModel`] written as theirs.

One module a format, each with `load(name_or_path, ...)` and, where that library's loader takes it, `save(sae,
folder)`. Only what a top-k SAE computes exactly is converted; everything else is refused. docs/foreign.md has the
table.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from transformers.utils import CONFIG_NAME

from ..json_files import read_object
from ..place import look_for
from .checkpoint import CFG_NAME


FORMATS = ("sparsify", "sae_lens", "prisma")
"""Formats that can be read. All but `"prisma"` can be written."""


def detect(name_or_path: str | os.PathLike, place: Mapping[str, Any]) -> str:
    """Which library wrote a checkpoint in a folder, or on the Hub at a `place` (`revision`, `subfolder`, ...), by its
    configuration: one of [`FORMATS`], or `"hf_vs2"`. A `ValueError` if no format or more than one fits."""
    formats = []
    cfg, config = (look_for(name_or_path, name, place) for name in (CFG_NAME, CONFIG_NAME))
    if cfg is not None:
        content = read_object(cfg)
        if "d_sae" in content:
            formats.append("sae_lens")
        elif "d_in" in content:
            formats.append("sparsify")
    if config is not None:
        content = read_object(config)
        if content.get("model_type") == "vs2_sae":
            formats.append("hf_vs2")
        elif "d_in" in content and "activation_fn_str" in content:
            formats.append("prisma")
    if len(formats) != 1:
        what = f"could be of {' and of '.join(formats)}" if formats else "is of no format that is known here"
        raise ValueError(
            f"{name_or_path} {what}. Expected the {CFG_NAME} of sparsify or SAELens, or the {CONFIG_NAME} of "
            "ViT-Prisma or hf_vs2, in this folder. If the checkpoint lies in a folder below, name that; if you know "
            "the format, give it."
        )
    return formats[0]


__all__ = ["FORMATS", "detect"]
