"""Where a training is, in a folder that it can be continued from: written, and looked at before it is believed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from ..files.digests import file_digest, is_of_digest
from ..files.json_files import read_json, write_json
from ..files.weight_files import WeightFiles
from ..sae.modeling import SAEModel


STATE_NAME = "trainer_state.json"
COUNTERS_NAME = "steps_since_active.safetensors"
_OPTIMIZER_NAME = "optimizer.bin"
_ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
_AGAIN = "Remove that training checkpoint to go on from the one before it, or train anew in another output_dir."


@dataclass
class TrainingProgress:
    """
    What a training checkpoint holds beside accelerate's files: JSON and safetensors.

    The digests of all its files tell damage; whoever makes digests that fit can choose the numbers, but runs no code.
    Of accelerate's files two are pickles (Adam's state and the random numbers'). They are read by torch's
    `weights_only` reader, which makes tensors and plain containers and calls nothing.
    """

    plan: dict[str, Any]
    """All that decides what a run computes; a checkpoint of another plan is not continued."""
    steps_since_active: torch.Tensor
    step: int = 0
    log: list[dict[str, float]] = field(default_factory=list)

    def dead(self, threshold: int) -> torch.Tensor:
        """The latents without activity for so many steps, bool `(num_latents,)`."""
        return self.steps_since_active >= threshold

    def save(self, folder: Path) -> None:
        """Add to what accelerate has written into `folder`, and seal all of it."""
        save_file({"steps_since_active": self.steps_since_active}, folder / COUNTERS_NAME)
        files = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
        state = {"plan": self.plan, "step": self.step, "log": self.log, "files": files}
        state["digest"] = _state_digest(state)
        write_json(folder / STATE_NAME, state, indent=None)

    def load(
        self,
        folder: Path,
        accelerator: Accelerator,
        model: SAEModel,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LambdaLR,
    ) -> None:
        """
        Continue from `folder`: weights, optimizer, schedule, counters and log.

        Raises:
            `ValueError`: if it is no training checkpoint, of another plan, damaged, or does not fit the model.
        """
        if not (folder / STATE_NAME).is_file():
            raise ValueError(f"resume_from_checkpoint={folder} is no training checkpoint: it has no {STATE_NAME}.")
        with _naming(folder / STATE_NAME):
            state = read_json(folder / STATE_NAME)
            _demand(state.pop("digest") == _state_digest(state), "it is not what was saved")
            plan, files, step, log = (state[name] for name in ("plan", "files", "step", "log"))
            kinds = isinstance(plan, dict) and isinstance(files, dict) and isinstance(log, list)
            _demand(kinds and isinstance(step, int), "it holds other things than were saved")
        if difference := differing(plan, self.plan):
            raise ValueError(
                f"{folder} can't be continued from exactly: {difference}. Use the same rows and settings, or train "
                "anew in another output_dir."
            )
        for name, digest in files.items():
            with _naming(folder / name):
                _demand(is_of_digest(folder / name, digest), "it is not the file that was saved")
        with _naming(folder / COUNTERS_NAME):
            counters = load_file(folder / COUNTERS_NAME)["steps_since_active"]
            _demand(counters.shape == self.steps_since_active.shape, f"it has {tuple(counters.shape)} counters")
        if not accelerator.is_fsdp2:
            WeightFiles.find(folder, {}).check(model.config.tensor_shapes)
        settings = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        with _naming(folder):
            accelerator.load_state(str(folder))
        with _naming(folder / _OPTIMIZER_NAME):
            for group, chosen in zip(optimizer.param_groups, settings, strict=True):
                group.update(chosen)  # the plan's: no file is asked for them
            for name, parameter in model.named_parameters():
                _check_adam(name, parameter, optimizer.state[parameter])
        _advance(schedule, step)
        self.steps_since_active = counters.to(accelerator.device)
        self.step, self.log = step, log


def differing(before: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    """Says in which setting an earlier plan is another; empty where it is the same."""
    for name, now in plan.items():
        if name == "some_rows" and name not in before:  # of an earlier version
            continue
        was = before.get(name)
        if was != now and not (
            isinstance(now, float) and isinstance(was, float) and math.isclose(was, now, rel_tol=1e-6)
        ):
            return f"it was trained with {name}={was}, now it is {now}"
    return ""


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What readers of damaged files raise, of any kind, leaves here as one `ValueError` that names the file."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        fault = "it is missing" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())[:300]
        raise ValueError(f"{path} can't be continued from ({fault or type(error).__name__}). {_AGAIN}") from error


def _demand(holds: bool, fault: str) -> None:
    if not holds:
        raise ValueError(fault)


def _check_adam(name: str, parameter: torch.Tensor, state: dict[str, Any]) -> None:
    """Adam itself takes what it is given: a moment of another shape would be read past its end."""
    for moment in _ADAM_MOMENTS:
        kinds = [(part.dtype, tuple(part.shape)) for part in (state[moment], parameter)]
        _demand(kinds[0] == kinds[1], f"{moment} of {name} is {kinds[0]} instead of {kinds[1]}")


def _advance(schedule: torch.optim.lr_scheduler.LambdaLR, step: int) -> None:
    """The schedule after so many steps: a function of the step, so that no file is asked for it."""
    rates = [base * rate(step) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    after = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    schedule.load_state_dict(schedule.state_dict() | after)
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _state_digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
