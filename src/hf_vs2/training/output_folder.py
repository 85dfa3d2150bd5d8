"""The folder that a training writes to: what is there, and whether it is of the same training."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from transformers.utils import CONFIG_NAME

from ..config.sae import SAEConfig
from ..files.atomic import remove_folder
from ..files.checkpoint_folder import TRAINING_LOG_NAME
from ..files.json_files import read_json, write_json
from .arguments import SAETrainingArguments
from .progress import STATE_NAME, differing


CHECKPOINT_PREFIX = "checkpoint-"
# What must not change between a training and the run that continues it.
_PLANNED_CONFIG = ("num_latents", "top_k", "activation", "aux_k", "aux_k_coefficient")
_PLANNED_ARGUMENTS = (
    "seed",
    "learning_rate",
    "warmup_ratio",
    "max_grad_norm",
    "dead_latent_threshold",
    "calibration_share",
    "sketch_rows",
)


def planned_settings(config: SAEConfig, args: SAETrainingArguments) -> dict[str, Any]:
    """The part of a training's plan that is known before any row is read."""
    plan = {"steps": args.max_steps} if args.max_steps is not None else {}
    plan |= {name: getattr(config, name) for name in _PLANNED_CONFIG}
    return plan | {name: getattr(args, name) for name in _PLANNED_ARGUMENTS}


def standing(
    folder: Path, plan: Mapping[str, Any], overwrite: bool = False
) -> Literal["none", "interrupted", "finished"]:
    """
    How far the training of a plan, or of the part of it that is known, has come in a folder.

    Args:
        overwrite (`bool`): what is of another training may be replaced, and a finished one trained again.

    Raises:
        `ValueError`: if the folder holds a model or training checkpoints of another training, and `overwrite` is not
            set.
    """
    log, found = _read(folder / TRAINING_LOG_NAME), checkpoints(folder)
    plans = [log.get("plan"), *(_read(path / STATE_NAME).get("plan") for path in found[-1:])]
    differences = [differing(before, plan) for before in plans if isinstance(before, dict)]
    holds_sae = (folder / CONFIG_NAME).is_file()
    if "" in differences:
        is_finished = log.get("metrics") and holds_sae and any(folder.glob("model*.safetensors"))
        return "interrupted" if not is_finished else "none" if overwrite else "finished"
    if (holds_sae or found) and not overwrite:
        how = differences[0] if differences else "it is not on record how it was trained"
        raise ValueError(
            f"{folder} holds {'the SAE' if holds_sae else 'a training checkpoint'} of another training ({how}), which "
            "is kept. Use the same rows and settings, train in another output_dir, or give overwrite_output_dir to "
            "replace it."
        )
    return "none"


def claim(folder: Path, plan: Mapping[str, Any], args: Mapping[str, Any], kept: Collection[Path] = ()) -> None:
    """Make a folder that of a training that begins or goes on; other training checkpoints than the `kept` are removed.
    An SAE that is there stays until the new one takes its place."""
    for checkpoint in checkpoints(folder):
        if checkpoint.resolve() not in [path.resolve() for path in kept]:
            remove_folder(checkpoint)
    write_log(folder, plan, args, None, [])


def write_log(
    folder: Path, plan: Mapping[str, Any], args: Mapping[str, Any], metrics: dict[str, Any] | None, log: list[Any]
) -> None:
    """`metrics` are `None` until the training is finished."""
    write_json(folder / TRAINING_LOG_NAME, {"metrics": metrics, "args": args, "plan": plan, "log": log}, indent=2)


def finished_metrics(folder: Path) -> dict[str, Any]:
    """What the training that is finished in a folder has measured."""
    return _read(folder / TRAINING_LOG_NAME)["metrics"]


def checkpoints(folder: Path) -> list[Path]:
    """The training checkpoints in a folder, by their steps."""
    states = folder.glob(f"{CHECKPOINT_PREFIX}*/{STATE_NAME}")
    found = {path.parent.name.removeprefix(CHECKPOINT_PREFIX): path.parent for path in states}
    return [found[step] for step in sorted(filter(str.isdecimal, found), key=int)]


def checkpoint_to_resume(folder: Path, wanted: str | None, is_same: bool = True) -> Path | None:
    """The training checkpoint to go on from: the one asked for, `"latest"`, or with `None` the latest if there is one.

    Args:
        is_same (`bool`): whether the training checkpoints in the folder are of the same training.

    Raises:
        `ValueError`: if there is none where one is asked for.
    """
    if wanted not in (None, "latest"):
        path = Path(str(wanted))
        if not path.is_dir():
            raise ValueError(f"resume_from_checkpoint={wanted}: there is no such folder.")
        return path
    found = checkpoints(folder) if is_same else []
    if not found and wanted:
        raise ValueError(
            f"resume_from_checkpoint=latest: {folder} holds no {CHECKPOINT_PREFIX}* folder of this training."
        )
    return found[-1] if found else None


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    try:
        found = read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


__all__ = [
    "CHECKPOINT_PREFIX",
    "checkpoint_to_resume",
    "checkpoints",
    "claim",
    "finished_metrics",
    "planned_settings",
    "standing",
    "write_log",
]
