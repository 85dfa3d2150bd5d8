"""Importing this module registers the configs, models and processor with transformers' Auto classes, and (with its
module) the pipeline."""

import os
from typing import Any, NoReturn

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    CLIPProcessor,
    CLIPTokenizer,
)

from ..config.sae import SAEConfig
from ..config.vs2_clip import VS2CLIPConfig
from ..sae.modeling import SAEModel
from . import pipeline  # noqa: F401  which registers itself
from .modeling import VS2CLIPForZeroShot


class _NoTokenizer(CLIPTokenizer):
    """What `pipeline(task, model=...)` looks for in an SAE checkpoint."""

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            f"{name_or_path} is an SAE checkpoint, which holds no tokenizer and no image processor: use "
            f"hf_vs2.zero_shot_classifier({str(name_or_path)!r}), which takes those of its CLIP."
        )


class _SteeredBySAE(VS2CLIPForZeroShot):
    """The steered CLIP that an SAE checkpoint stands for."""

    config_class = SAEConfig

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return VS2CLIPForZeroShot.from_pretrained(*args, **kwargs)


AutoConfig.register(SAEConfig.model_type, SAEConfig, exist_ok=True)
AutoModel.register(SAEConfig, SAEModel, exist_ok=True)
AutoTokenizer.register(SAEConfig, fast_tokenizer_class=_NoTokenizer, exist_ok=True)
AutoModelForZeroShotImageClassification.register(SAEConfig, _SteeredBySAE, exist_ok=True)
AutoConfig.register(VS2CLIPConfig.model_type, VS2CLIPConfig, exist_ok=True)
AutoModel.register(VS2CLIPConfig, VS2CLIPForZeroShot, exist_ok=True)
AutoModelForZeroShotImageClassification.register(VS2CLIPConfig, VS2CLIPForZeroShot, exist_ok=True)
# Without it AutoProcessor finds the tokenizer alone.
AutoProcessor.register(VS2CLIPConfig, CLIPProcessor, exist_ok=True)
