"""Visual Sparse Steering (VS2) for CLIP in the Hugging Face ecosystem.

Importing the package registers its models with transformers' Auto classes, and its pipeline; it loads nothing else.
Public names are imported when first used. The command line puts the registration off until a command runs, so that its
help needs no torch.
"""

import logging
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import moved
from .version import __version__ as __version__


if TYPE_CHECKING:  # `x as x` tells type checkers that a name is public
    from .adaptation import adapt as adapt
    from .atlas import build_atlas as build_atlas
    from .clip.classifier import zero_shot_classifier as zero_shot_classifier
    from .clip.modeling import VS2CLIPForZeroShot as VS2CLIPForZeroShot
    from .clip.pipeline import VS2ZeroShotImageClassificationPipeline as VS2ZeroShotImageClassificationPipeline
    from .config.latent_edits import LatentEdits as LatentEdits
    from .config.sae import SAEConfig as SAEConfig
    from .config.steering import Steering as Steering
    from .config.vs2_clip import VS2CLIPConfig as VS2CLIPConfig
    from .data.labels.prompts import class_embeddings as class_embeddings
    from .data.load import load_images as load_images
    from .data.registry import DatasetInfo as DatasetInfo
    from .data.registry import dataset_info as dataset_info
    from .data.stores.activations import ActivationStore as ActivationStore
    from .data.stores.activations import extract_activations as extract_activations
    from .evaluation.comparison import EvaluationResult as EvaluationResult
    from .evaluation.comparison import evaluate as evaluate
    from .evaluation.grid import plot_grid as plot_grid
    from .evaluation.grid import steering_grid as steering_grid
    from .evaluation.recommendation import Recommendation as Recommendation
    from .evaluation.recommendation import recommend as recommend
    from .explain.explanation import VS2Explanation as VS2Explanation
    from .files.sharing.hub import push_to_hub as push_to_hub
    from .files.sharing.model_card import create_model_card as create_model_card
    from .files.sharing.model_card import write_model_card as write_model_card
    from .sae.modeling import SAEModel as SAEModel
    from .sae.modeling import SAEOutput as SAEOutput
    from .sae.statistics import DomainStatistics as DomainStatistics
    from .steering.corpus import RetrievalCorpus as RetrievalCorpus
    from .steering.outputs import VS2CLIPOutput as VS2CLIPOutput
    from .training.arguments import SAETrainingArguments as SAETrainingArguments
    from .training.calibration import calibrate as calibrate
    from .training.domain import measure_statistics as measure_statistics
    from .training.label_losses import PrototypeAlignment as PrototypeAlignment
    from .training.trainer import SAETrainer as SAETrainer

_HOMES = {
    "ActivationStore": "data.stores.activations",
    "extract_activations": "data.stores.activations",
    "adapt": "adaptation",
    "build_atlas": "atlas",
    "calibrate": "training.calibration",
    "SAEConfig": "config.sae",
    "Steering": "config.steering",
    "VS2CLIPConfig": "config.vs2_clip",
    "RetrievalCorpus": "steering.corpus",
    "load_images": "data",
    "measure_statistics": "training.domain",
    "DomainStatistics": "sae.statistics",
    "EvaluationResult": "evaluation",
    "evaluate": "evaluation",
    "VS2Explanation": "explain.explanation",
    "plot_grid": "evaluation.grid",
    "steering_grid": "evaluation.grid",
    "push_to_hub": "files.sharing.hub",
    "PrototypeAlignment": "training.label_losses",
    "LatentEdits": "config.latent_edits",
    "create_model_card": "files.sharing.model_card",
    "write_model_card": "files.sharing.model_card",
    "SAEModel": "sae.modeling",
    "SAEOutput": "sae.modeling",
    "VS2CLIPForZeroShot": "clip.modeling",
    "VS2CLIPOutput": "steering.outputs",
    "VS2ZeroShotImageClassificationPipeline": "clip.pipeline",
    "zero_shot_classifier": "clip.classifier",
    "class_embeddings": "data.labels.prompts",
    "Recommendation": "evaluation.recommendation",
    "recommend": "evaluation.recommendation",
    "DatasetInfo": "data.registry",
    "dataset_info": "data.registry",
    "SAETrainer": "training.trainer",
    "SAETrainingArguments": "training.arguments",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import_module(".clip.auto_classes", __name__)  # if the command line has put it off
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name in moved.MOVED:  # `hf_vs2.prompts.class_embeddings`, without an import of it
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_command_line() -> bool:
    """Whether Python was started as `hf-vs2` or `python -m hf_vs2.cli`, which register when they run a command.

    Where that is not certain (a process that a command spawns, a debugger, a launcher of another name), the answer is
    no, and costs the time that torch takes to import.
    """
    # What Python was told to run stands as far from the end as there are arguments. While it looks for a module to
    # run, it calls itself "-m".
    if not 1 <= len(sys.argv) <= len(sys.orig_argv):
        return False
    started = sys.orig_argv[-len(sys.argv)]
    if sys.argv[0] == "-m":
        return started == "hf_vs2.cli"
    return started == sys.argv[0] and os.path.basename(started) in ("hf-vs2", "hf-vs2.exe")


# Messages go where those of transformers go, and its verbosity is ours.
logging.getLogger(__name__).parent = logging.getLogger("transformers")
moved.install()
if not _is_command_line():
    import_module(".clip.auto_classes", __name__)
