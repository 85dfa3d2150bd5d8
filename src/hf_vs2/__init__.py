"""Visual Sparse Steering (VS2) for CLIP in the Hugging Face ecosystem.

Importing the package registers its models with transformers' Auto classes, and its pipeline; it loads nothing else. Public names
are imported when first used. The command line puts the registration off until a command runs, so that its help needs no torch.
"""

__version__ = "0.1.0.dev0"  # first: the modules below record it in what they write

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .activations import ActivationStore, extract_activations
    from .atlas import build_atlas
    from .calibration import calibrate
    from .configuration_sae import SAEConfig
    from .configuration_vs2_clip import Steering, VS2CLIPConfig
    from .corpus import RetrievalCorpus
    from .data import load_images
    from .domain import measure_statistics
    from .domain_statistics import DomainStatistics
    from .evaluation import EvaluationResult, evaluate
    from .explanation import VS2Explanation
    from .grid import steering_grid
    from .hub import push_to_hub
    from .label_losses import PrototypeAlignment
    from .latent_edits import LatentEdits
    from .model_card import create_model_card, write_model_card
    from .modeling_sae import SAEModel, SAEOutput
    from .modeling_vs2_clip import VS2CLIPForZeroShot
    from .pipeline import VS2ZeroShotImageClassificationPipeline, zero_shot_classifier
    from .prompts import class_embeddings
    from .recommendation import Recommendation, recommend
    from .registry import DatasetInfo, dataset_info
    from .trainer import SAETrainer
    from .training_args import SAETrainingArguments
    from .vs2_outputs import VS2CLIPOutput

_HOMES = {
    "ActivationStore": "activations",
    "extract_activations": "activations",
    "build_atlas": "atlas",
    "calibrate": "calibration",
    "SAEConfig": "configuration_sae",
    "Steering": "configuration_vs2_clip",
    "VS2CLIPConfig": "configuration_vs2_clip",
    "RetrievalCorpus": "corpus",
    "load_images": "data",
    "measure_statistics": "domain",
    "DomainStatistics": "domain_statistics",
    "EvaluationResult": "evaluation",
    "evaluate": "evaluation",
    "VS2Explanation": "explanation",
    "steering_grid": "grid",
    "push_to_hub": "hub",
    "PrototypeAlignment": "label_losses",
    "LatentEdits": "latent_edits",
    "create_model_card": "model_card",
    "write_model_card": "model_card",
    "SAEModel": "modeling_sae",
    "SAEOutput": "modeling_sae",
    "VS2CLIPForZeroShot": "modeling_vs2_clip",
    "VS2CLIPOutput": "vs2_outputs",
    "VS2ZeroShotImageClassificationPipeline": "pipeline",
    "zero_shot_classifier": "pipeline",
    "class_embeddings": "prompts",
    "Recommendation": "recommendation",
    "recommend": "recommendation",
    "DatasetInfo": "registry",
    "dataset_info": "registry",
    "SAETrainer": "trainer",
    "SAETrainingArguments": "training_args",
}

__all__ = [
    "ActivationStore",
    "DatasetInfo",
    "DomainStatistics",
    "EvaluationResult",
    "LatentEdits",
    "PrototypeAlignment",
    "Recommendation",
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
    "VS2Explanation",
    "VS2ZeroShotImageClassificationPipeline",
    "build_atlas",
    "calibrate",
    "class_embeddings",
    "create_model_card",
    "dataset_info",
    "evaluate",
    "extract_activations",
    "load_images",
    "measure_statistics",
    "push_to_hub",
    "recommend",
    "steering_grid",
    "write_model_card",
    "zero_shot_classifier",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import_module(".auto_classes", __name__)  # if the command line has put it off
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_command_line() -> bool:
    """Whether Python was started as `hf-vs2` or `python -m hf_vs2.cli`, which register when they run a command.

    Where that is not certain (a process that a command spawns, a debugger, a launcher of another name), the answer is no, and
    costs the time that torch takes to import.
    """
    # What Python was told to run stands as far from the end as there are arguments. While it looks for a module to run, it
    # calls itself "-m".
    if not 1 <= len(sys.argv) <= len(sys.orig_argv):
        return False
    started = sys.orig_argv[-len(sys.argv)]
    if sys.argv[0] == "-m":
        return started == "hf_vs2.cli"
    return started == sys.argv[0] and os.path.basename(started) in ("hf-vs2", "hf-vs2.exe")


if not _is_command_line():
    import_module(".auto_classes", __name__)
