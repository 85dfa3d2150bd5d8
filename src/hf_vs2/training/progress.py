"""Where a training is, in a folder that it can be continued from: written, and looked at before it is believed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers.utils import SAFE_WEIGHTS_NAME

from ..files.digests import file_digest, is_of_digest
from ..files.json_files import read_json, write_json
from ..files.weight_files import WeightFiles, check_numbers
from ..functional.shards import own_part
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
            state = _read_state(folder / STATE_NAME, self.plan["steps"])
        if difference := differing(state["plan"], self.plan):
            raise ValueError(
                f"{folder} can't be continued from exactly: {difference}. Use the same rows and settings, or train "
                "anew in another output_dir."
            )
        for name, digest in state["files"].items():
            with _naming(folder / name):
                _demand(is_of_digest(folder / name, digest), "it is not the file that was saved")
        with _naming(folder / COUNTERS_NAME):
            counters = load_file(folder / COUNTERS_NAME)["steps_since_active"]
            _check_counters(counters, self.steps_since_active, state["step"])
        if not accelerator.is_fsdp2:
            WeightFiles.find(folder, {}).check(model.config.tensor_shapes)
        settings = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        with _naming(folder):
            accelerator.load_state(str(folder))
        check_numbers(
            ((name, own_part(tensor)) for name, tensor in model.state_dict().items()), folder / SAFE_WEIGHTS_NAME
        )
        with _naming(folder / _OPTIMIZER_NAME):
            for group, chosen in zip(optimizer.param_groups, settings, strict=True):
                group.update(chosen)  # the plan's: no file is asked for them
            for name, parameter in model.named_parameters():
                _check_adam(name, parameter, optimizer.state[parameter], state["step"])
        _advance(schedule, state["step"])
        self.steps_since_active = counters.to(accelerator.device)
        self.step, self.log = state["step"], state["log"]


def differing(before: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    """Says in which setting an earlier plan is another; empty where it is the same."""
    for name, now in plan.items():
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


def _demand(holds: bool | torch.Tensor, fault: str) -> None:
    if not holds:
        raise ValueError(fault)


def _read_state(path: Path, steps: int) -> dict[str, Any]:
    """The JSON file, if it is what was written there."""
    state = read_json(path)
    for name, is_right in _STATE_CHECKS.items():
        _demand(isinstance(state, dict) and is_right(state.get(name)), f"{name} is missing or damaged")
    digest = state.pop("digest")
    _demand(digest == _state_digest(state), "it is not what was saved")
    _demand(0 < state["step"] < steps or state["plan"].get("steps") != steps, f"step {state['step']} of {steps}")
    return state


def _is_log(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, dict) and "step" in entry and all(_is_number(number) for number in entry.values())
        for entry in value
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_file_list(value: Any) -> bool:
    # Names alone: no path may lead out of the folder.
    return isinstance(value, dict) and all(
        Path(name).name == name and isinstance(digest, str) for name, digest in value.items()
    )


_STATE_CHECKS: dict[str, Callable[[Any], bool]] = {
    "digest": lambda value: isinstance(value, str),
    "plan": lambda value: isinstance(value, dict),
    "step": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "log": _is_log,
    "files": lambda value: _is_file_list(value) and {COUNTERS_NAME, _OPTIMIZER_NAME} <= value.keys(),
}


def _check_counters(found: torch.Tensor, expected: torch.Tensor, step: int) -> None:
    kinds = [(tensor.dtype, tuple(tensor.shape)) for tensor in (found, expected)]
    _demand(kinds[0] == kinds[1], f"the counters are {kinds[0]} instead of {kinds[1]}")
    lowest, highest = found.aminmax()
    _demand(lowest >= 0 and highest <= step, f"counters from {lowest} to {highest} after {step} steps")


def _check_adam(name: str, parameter: torch.Tensor, state: dict[str, Any], step: int) -> None:
    """Adam itself takes what it is given: a moment of another shape would be read past its end."""
    _demand(state.keys() == {"step", *_ADAM_MOMENTS}, f"Adam's state of {name} holds {sorted(map(str, state))}")
    for moment in _ADAM_MOMENTS:
        tensor = state[moment]
        kinds = [
            (part.dtype, tuple(part.shape)) if isinstance(part, torch.Tensor) else type(part)
            for part in (tensor, parameter)
        ]
        _demand(kinds[0] == kinds[1], f"{moment} of {name} is {kinds[0]} instead of {kinds[1]}")
        lowest = 0.0 if moment == "exp_avg_sq" else -math.inf
        own = own_part(tensor)
        _demand((own.isfinite() & (own >= lowest)).all(), f"{moment} of {name} holds impossible numbers")
    # Fewer than steps where half precision has overflowed: those are left out.
    _demand(float(state["step"]) in range(step + 1), f"Adam counts {float(state['step'])} steps after {step}")


def _advance(schedule: torch.optim.lr_scheduler.LambdaLR, step: int) -> None:
    """The schedule after so many steps: a function of the step, so that no file is asked for it."""
    rates = [base * rate(step) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    after = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    schedule.load_state_dict(schedule.state_dict() | after)
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _state_digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
