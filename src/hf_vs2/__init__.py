"""Visual Sparse Steering (VS2) for CLIP in the Hugging Face ecosystem.

Importing the package registers its models with transformers' Auto classes, and its pipeline; it loads nothing else. The
data, training and evaluation parts are imported when first used.
"""

__version__ = "0.1.0.dev0"  # first: the modules below record it in what they write

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification

from .configuration_sae import SAEConfig
from .configuration_vs2_clip import Steering, VS2CLIPConfig
from .modeling_sae import SAEModel, SAEOutput
from .modeling_vs2_clip import VS2CLIPForZeroShot, VS2CLIPOutput
from .pipeline import VS2ZeroShotImageClassificationPipeline, zero_shot_classifier


if TYPE_CHECKING:
    from .activations import ActivationStore, extract_activations
    from .calibration import calibrate
    from .corpus import RetrievalCorpus
    from .data import load_images
    from .evaluation import EvaluationResult, evaluate
    from .hub import push_to_hub
    from .label_losses import PrototypeAlignment
    from .model_card import create_model_card, write_model_card
    from .prompts import class_embeddings
    from .registry import DatasetInfo, dataset_info
    from .trainer import SAETrainer
    from .training_args import SAETrainingArguments

_LAZY = {
    "push_to_hub": "hub",
    "create_model_card": "model_card",
    "write_model_card": "model_card",
    "ActivationStore": "activations",
    "extract_activations": "activations",
    "calibrate": "calibration",
    "RetrievalCorpus": "corpus",
    "PrototypeAlignment": "label_losses",
    "DatasetInfo": "registry",
    "dataset_info": "registry",
    "load_images": "data",
    "EvaluationResult": "evaluation",
    "evaluate": "evaluation",
    "class_embeddings": "prompts",
    "SAETrainer": "trainer",
    "SAETrainingArguments": "training_args",
}

__all__ = [
    "ActivationStore",
    "DatasetInfo",
    "EvaluationResult",
    "PrototypeAlignment",
    "RetrievalCorpus",
    "SAEConfig",
    "SAEModel",
    "SAEOutput",
    "SAETrainer",
    "SAETrainingArguments",
    "Steering",
    "VS2CLIPConfig",
    "VS2CLIPForZeroShot",
    "VS2CLIPOutput",
    "VS2ZeroShotImageClassificationPipeline",
    "calibrate",
    "class_embeddings",
    "create_model_card",
    "dataset_info",
    "evaluate",
    "extract_activations",
    "load_images",
    "push_to_hub",
    "write_model_card",
    "zero_shot_classifier",
]

AutoConfig.register(SAEConfig.model_type, SAEConfig, exist_ok=True)
AutoModel.register(SAEConfig, SAEModel, exist_ok=True)
AutoConfig.register(VS2CLIPConfig.model_type, VS2CLIPConfig, exist_ok=True)
AutoModel.register(VS2CLIPConfig, VS2CLIPForZeroShot, exist_ok=True)
AutoModelForZeroShotImageClassification.register(VS2CLIPConfig, VS2CLIPForZeroShot, exist_ok=True)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
