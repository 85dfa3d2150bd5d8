"""Module paths of earlier versions, which go on working: `import hf_vs2.label_free` gives
`hf_vs2.functional.label_free`."""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


MOVED = {
    "activations": "data.stores.activations",
    "atomic": "files.atomic",
    "auto_classes": "clip.auto_classes",
    "base_model": "encoders.base_model",
    "calibration": "training.calibration",
    "card_edits": "files.sharing.card_edits",
    "card_results": "files.sharing.card_results",
    "checkpoint_config": "config.checks",
    "checkpoint_folder": "files.checkpoint_folder",
    "configuration_sae": "config.sae",
    "configuration_vs2_clip": "config.vs2_clip",
    "controls": "evaluation.controls",
    "corpus": "steering.corpus",
    "demo_data": "demo.data",
    "demo_figure": "demo.figure",
    "demo_folds": "demo.folds",
    "domain": "training.domain",
    "domain_statistics": "sae.statistics",
    "evaluation_methods": "evaluation.methods",
    "explanation": "explain.explanation",
    "explanation_figure": "explain.figure",
    "explanation_inputs": "explain.inputs",
    "extraction": "data.stores.extraction",
    "fingerprint": "data.stores.fingerprint",
    "foreign": "files.foreign",
    "graphed_step": "training.graphed_step",
    "grid": "evaluation.grid",
    "hub": "files.sharing.hub",
    "hub_push": "files.sharing.hub_push",
    "image_batches": "data.batches",
    "images": "data.images",
    "label_free": "functional.label_free",
    "label_losses": "training.label_losses",
    "label_scoring": "steering.label_sets",
    "latent_edits": "config.latent_edits",
    "latent_names": "explain.latent_names",
    "model_card": "files.sharing.model_card",
    "modeling_sae": "sae.modeling",
    "modeling_vs2_clip": "clip.modeling",
    "neighbors": "functional.neighbors",
    "packaged_code": "config.packaged_code",
    "pipeline": "clip.pipeline",
    "pipeline_inputs": "data.inputs",
    "processing": "encoders.processing",
    "prompts": "data.labels.prompts",
    "recommendation": "evaluation.recommendation",
    "registry": "data.registry",
    "report": "files.report",
    "retrieval": "steering.retrieval",
    "sharding": "training.sharding",
    "sparse_ops": "functional.sparse_ops",
    "sparse_triton": "functional.sparse_triton",
    "store": "data.stores.store",
    "tail": "encoders.tail",
    "trainer": "training.trainer",
    "training_args": "training.arguments",
    "training_progress": "training.progress",
    "training_rows": "data.stores.rows",
    "training_step": "training.step",
    "vision_tower": "encoders.vision_tower",
    "vs2_outputs": "steering.outputs",
    "vs2_parts": "clip.loading",
    "weight_files": "files.weight_files",
    "weight_state": "files.weight_state",
}
_STUDY = {
    "documents": "ablation_tables class_report cost_table markdown order published reports result_view tables",
    "results": "analysis catalog",
    "drawings": "figures figure_cells figure_images figure_sheets",
}
_COMMANDS = "adapt atlas calibrate classify convert demo evaluate explain extract push recommend study train"
MOVED |= {f"cli.{name}": f"cli.commands.{name}" for name in _COMMANDS.split()}
MOVED |= {f"study.{name}": f"study.{folder}.{name}" for folder, names in _STUDY.items() for name in names.split()}


class MovedModules(MetaPathFinder, Loader):
    """Answers for the old paths with the module at the new one: the same object, so that what is set on one is set on
    both."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == __package__ and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        sys.modules[name] = import_module(
            f"{__package__}.{MOVED[name.partition('.')[2]]}"
        )  # import returns what stands there


def install() -> None:
    """Make the old paths known to `import`, after everything that Python itself finds."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
