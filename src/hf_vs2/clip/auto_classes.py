"""Importing this module registers the configs, models and processor with transformers' Auto classes, and (with its
module) the pipeline."""

from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, CLIPProcessor

from ..config.sae import SAEConfig
from ..config.vs2_clip import VS2CLIPConfig
from ..sae.modeling import SAEModel
from . import pipeline  # noqa: F401  which registers itself
from .modeling import VS2CLIPForZeroShot


AutoConfig.register(SAEConfig.model_type, SAEConfig, exist_ok=True)
AutoModel.register(SAEConfig, SAEModel, exist_ok=True)
AutoConfig.register(VS2CLIPConfig.model_type, VS2CLIPConfig, exist_ok=True)
AutoModel.register(VS2CLIPConfig, VS2CLIPForZeroShot, exist_ok=True)
AutoModelForZeroShotImageClassification.register(VS2CLIPConfig, VS2CLIPForZeroShot, exist_ok=True)
# Without it AutoProcessor finds the tokenizer alone.
AutoProcessor.register(VS2CLIPConfig, CLIPProcessor, exist_ok=True)

__all__: list[str] = []
