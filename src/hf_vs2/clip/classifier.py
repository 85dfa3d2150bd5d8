"""[`zero_shot_classifier`]: the pipeline in one line, from a checkpoint or a loaded model."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from transformers import CLIPModel, PreTrainedConfig, PreTrainedModel

from ..config.checks import read_config_dict
from ..config.sae import SAEConfig
from ..config.vs2_clip import VS2CLIPConfig
from ..encoders.families import FAMILIES
from ..encoders.loading import load_clip
from ..encoders.wrapped import unwrapped
from ..files.place import HUB_ARGUMENTS, at_one_commit
from .loading import find_processing
from .modeling import VS2CLIPForZeroShot
from .pipeline import TASK, VS2ZeroShotImageClassificationPipeline


_MODEL_OPTIONS = ("dtype", "torch_dtype", "device_map", "attn_implementation", "use_safetensors", "clip")


def zero_shot_classifier(
    model: str | os.PathLike | VS2CLIPForZeroShot | CLIPModel | nn.Module,
    *,
    tokenizer: Any = None,
    image_processor: Any = None,
    **kwargs: Any,
) -> VS2ZeroShotImageClassificationPipeline:
    """
    A ready [`VS2ZeroShotImageClassificationPipeline`] from one id, path or model.

    ```python
    >>> classifier = hf_vs2.zero_shot_classifier("user/sae-clip-vit-base-patch32-cifar100", batch_size=32)
    >>> classifier(images, ["cat", "dog"])
    ```

    Args:
        model: a VS2 checkpoint, an SAE checkpoint (the CLIP that it names is loaded) or a plain CLIP, by Hub id or
            path; or a model that is already loaded, also inside `torch.compile` or a peft model.
        tokenizer, image_processor (*optional*): by default those of the checkpoint, or else of the CLIP it names. A
            dict of label -> embedding in the place of the tokenizer gives the embeddings of the labels, which a model
            without texts needs.
        kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, `subfolder`, `dtype`,
            `device_map`, `attn_implementation`, `use_safetensors` and `clip` go to `from_pretrained`; everything else
            (`device`, `batch_size`, `top_k`, `gamma`, ...) to the pipeline.

    Raises:
        `ValueError`: if the checkpoint is of another kind, or a loaded model does not say where its tokenizer is.
        `OSError`: if files are missing.
    """
    place = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
    if isinstance(model, (str, os.PathLike)):
        loading = {name: kwargs.pop(name) for name in _MODEL_OPTIONS if name in kwargs}
        source = os.fspath(model)
        # Model, tokenizer and image processor of one commit, whatever happens to the branch meanwhile.
        place = at_one_commit(source, place)
        model = _load_model(source, place, loading)
    else:
        source = None
        if place:
            raise ValueError(f"{next(iter(place))}= is for a model given by its id; this one is already loaded.")
    if tokenizer is None or image_processor is None:
        found = find_processing(unwrapped(model), source, place)
        tokenizer = found[0] if tokenizer is None else tokenizer
        image_processor = found[1] if image_processor is None else image_processor
    return VS2ZeroShotImageClassificationPipeline(
        model=model, tokenizer=tokenizer, image_processor=image_processor, task=TASK, **kwargs
    )


def _load_model(source: str, place: dict[str, Any], loading: dict[str, Any]) -> PreTrainedModel:
    config, _ = read_config_dict(PreTrainedConfig.get_config_dict, source, **place)
    model_type = config.get("model_type")
    if model_type in (VS2CLIPConfig.model_type, SAEConfig.model_type):
        return VS2CLIPForZeroShot.from_pretrained(source, **place, **loading)
    family = FAMILIES.get(str(model_type))
    if (family is None or family.model_type != model_type) and model_type != "siglip2":  # which says more of itself
        raise ValueError(
            f"{source} holds a model of type {model_type!r}; expected a VS2 checkpoint "
            f"({VS2CLIPConfig.model_type!r}), an SAE checkpoint ({SAEConfig.model_type!r}) or a CLIP ('clip')."
        )
    if "clip" in loading:
        raise ValueError(f"clip= is for a VS2 or SAE checkpoint; {source} is a CLIP itself.")
    return load_clip(source, place, **loading)
