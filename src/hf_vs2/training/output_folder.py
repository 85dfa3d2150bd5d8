"""The folder that a training writes to: what is there, and whether it is of the same training."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from transformers.utils import CONFIG_NAME, logging

from ..config.sae import SAEConfig
from ..files.atomic import failing_as, remove_folder, remove_leftovers, replace_folder
from ..files.checkpoint_folder import TRAINING_LOG_NAME
from ..files.json_files import read_json, write_json
from .arguments import SAETrainingArguments
from .progress import STATE_NAME, TrainingProgress, differing


logger = logging.get_logger(__name__)

CHECKPOINT_PREFIX = "checkpoint-"
_LOCK_NAME = ".training.lock"
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


def digest_of(numbers: torch.Tensor) -> str:
    """What of many numbers a plan notes."""
    return hashlib.sha256(numbers.numpy().tobytes()).hexdigest()[:16]


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


def warn_of_finished(folder: Path, asked: SAEConfig, trained: SAEConfig) -> None:
    """Says that a training is finished, and which settings that it does not depend on are others than asked for."""
    wanted = {name: getattr(asked, name) for name in ("gate", "gamma", "lambda_", "method")}
    wanted["gate"] = None if asked.gate is None else trained.usable_gate(asked.gate)
    stay = [
        f" Its {name} stays {getattr(trained, name)}, not {value}: set it on the model."
        for name, value in wanted.items()
        if getattr(trained, name) != value
    ]
    logger.warning(
        f"{folder} holds this training, finished: there is nothing to do. overwrite_output_dir trains it again."
        f"{''.join(stay)}"
    )


@contextlib.contextmanager
def alone_in(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """
    Hold a folder for one training: two would tear each other's checkpoints. The system drops the lock when a process
    dies. What a killed training left half written is removed.

    Raises:
        `OSError`: in all processes, when another training holds the folder.
    """
    from huggingface_hub.utils import WeakFileLock

    with contextlib.ExitStack() as held:
        taken = torch.zeros(1, device=accelerator.device)
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(WeakFileLock(folder / _LOCK_NAME, timeout=0.1))
                remove_leftovers(folder)
                for partial in folder.glob(f".{CHECKPOINT_PREFIX}*.partial"):
                    shutil.rmtree(partial)
            except TimeoutError:
                taken += 1
        if accelerator.reduce(taken, "sum").item():
            raise OSError(
                f"Another training is writing to {folder}. Wait for it, or choose another output_dir. If none is "
                f"running (some file systems keep the lock of a process that died), remove {_LOCK_NAME} in it."
            )
        yield


def save_checkpoint(folder: Path, accelerator: Accelerator, progress: TrainingProgress, limit: int) -> None:
    """Everything needed to continue exactly, under a temporary name until it is whole; of the training checkpoints in
    the folder the newest `limit` stay."""
    final = folder / f"{CHECKPOINT_PREFIX}{progress.step}"
    partial = final.with_name(f".{final.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        with failing_as(final, RuntimeError):
            accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with failing_as(final, RuntimeError):
                progress.save(partial)
                replace_folder(partial, final)
    finally:
        if accelerator.is_main_process:  # nothing stays on a full disk
            shutil.rmtree(partial, ignore_errors=True)
    if accelerator.is_main_process:
        for old in checkpoints(folder)[:-limit]:
            remove_folder(old)
    accelerator.wait_for_everyone()


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
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
