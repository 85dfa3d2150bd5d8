"""SAE training with accelerate: cached activations in, a calibrated checkpoint out."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup
from transformers.utils import logging

from . import __version__
from .calibration import activation_statistics, as_rows, calibrate, split_rows
from .configuration_sae import SAEConfig
from .modeling_sae import SAEModel
from .training_args import SAETrainingArguments


if TYPE_CHECKING:
    from .activations import ActivationStore

logger = logging.get_logger(__name__)

LOG_NAME = "training_log.json"
_CHECKPOINT_PREFIX = "checkpoint-"


class BatchPlan:
    """Which rows make up each batch: consecutive slices of an endless chain of seeded permutations.

    A pure function of the batch number, so that resuming needs no sampler state, and that any number of processes see the same
    global batches. Every row comes once an epoch; a batch may span two epochs.
    """

    def __init__(self, rows: torch.Tensor, batch_size: int, seed: int):
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._cached: tuple[int, torch.Tensor] = (-1, rows)

    def __getitem__(self, number: int) -> torch.Tensor:
        start, needed, parts = number * self.batch_size, self.batch_size, []
        while needed:
            epoch, offset = divmod(start, len(self.rows))
            part = self._epoch(epoch)[offset : offset + needed]
            parts.append(part)
            start, needed = start + len(part), needed - len(part)
        return torch.cat(parts)

    def _epoch(self, epoch: int) -> torch.Tensor:
        if self._cached[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._cached = (epoch, self.rows[torch.randperm(len(self.rows), generator=generator)])
        return self._cached[1]


class _Progress:
    """What a training checkpoint holds besides weights and optimizer: registered with accelerate."""

    def __init__(self, num_latents: int, plan: dict[str, Any]):
        self.step = 0
        self.steps_since_active = torch.zeros(num_latents, dtype=torch.int64)
        self.log: list[dict[str, float]] = []
        self.plan = plan

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        changed = [name for name, value in self.plan.items() if state["plan"].get(name) != value]
        if changed:
            name = changed[0]
            raise ValueError(
                f"This checkpoint was trained with {name}={state['plan'].get(name)}, now it is {self.plan[name]}: the run can't be "
                "continued exactly. Use the same settings, or train anew in another output_dir."
            )
        vars(self).update(state)


class SAETrainer:
    """
    Trains a [`SAEModel`] on cached CLS activations, calibrates it and saves it.

    Works on one process or many (`accelerate launch`, `torchrun`); for the same global batch the result is the same up to
    float error. No labels are used.

    Args:
        model (`SAEModel` or `SAEConfig`): a model to go on training, or the configuration of a new one (`hidden_size` must be the
            activations'). Which CLIP and layer the rows come from is copied into its config from the store.
        args (`SAETrainingArguments`): how to train.
        train_rows (`ActivationStore` or `torch.Tensor` of shape `(rows, hidden_size)`): the activations.
        layer (`int`, *optional*): which layer of a store that holds several.

    Raises:
        `ValueError`: on a width that differs from the model's, or too few rows.

    Example:

    ```python
    >>> trainer = SAETrainer(SAEConfig(hidden_size=768, top_k=64), SAETrainingArguments(output_dir="sae"), store)
    >>> trainer.train()
    >>> model = VS2CLIPForZeroShot(clip, trainer.model, gate=0.99)
    ```
    """

    def __init__(
        self,
        model: SAEModel | SAEConfig,
        args: SAETrainingArguments,
        train_rows: ActivationStore | torch.Tensor,
        layer: int | None = None,
    ):
        self.args = args
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to,
            project_dir=args.output_dir,
            # The only buffer, the mean, never changes: nothing to broadcast at each step.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        set_seed(args.seed)
        self.model = SAEModel(model) if isinstance(model, SAEConfig) else model
        self.rows = _LayerRows(train_rows, layer) if hasattr(train_rows, "metadata") else as_rows(train_rows)
        width = self.rows.take(torch.zeros(1, dtype=torch.int64)).shape[1]
        if width != self.model.config.hidden_size:
            raise ValueError(
                f"The activations are {width} wide, the SAE reads {self.model.config.hidden_size}. Use SAEConfig(hidden_size={width})."
            )
        self.train_indices, self.held_out_indices = split_rows(len(self.rows), args.calibration_share, args.seed)
        if len(self.train_indices) < 2:
            raise ValueError(f"{len(self.rows)} activation rows are too few to train an SAE on.")
        self._record_origin(train_rows, layer)

    @property
    def batch_size(self) -> int:
        """Rows of one forward pass over all processes."""
        return self.args.per_device_train_batch_size * self.accelerator.num_processes

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.args.num_steps(len(self.train_indices), self.batch_size * self.args.gradient_accumulation_steps)

    def train(self) -> dict[str, float]:
        """
        Train, calibrate on the held-out rows, save to `args.output_dir`.

        Returns:
            `dict`: `fvu` and `l0` on the held-out rows (on training rows if none were held out), `dead_share`, `steps`,
            `train_rows`, `held_out_rows`, `seconds`. The same is written to `training_log.json`, with the log.
        """
        started = time.perf_counter()
        if self.model.config.total_variance is None:
            self.model.set_statistics(*activation_statistics(self.rows, self.train_indices))
        progress = self._optimize()
        metrics: dict[str, Any] = self._calibrate()
        metrics["dead_share"] = _dead(progress, self.args.dead_latent_threshold).float().mean().item()
        metrics |= {
            "steps": progress.step,
            "train_rows": len(self.train_indices),
            "held_out_rows": len(self.held_out_indices),
        }
        self.model.config.training_metrics = metrics
        self.save_model()
        metrics = metrics | {"seconds": round(time.perf_counter() - started, 3)}
        if self.accelerator.is_main_process:
            log = {"metrics": metrics, "args": asdict(self.args), "log": progress.log}
            write_atomically(self.args.output_path / LOG_NAME, json.dumps(log, indent=2) + "\n")
        self.accelerator.end_training()
        return metrics

    def save_model(self, output_dir: str | os.PathLike | None = None) -> None:
        """Write the SAE checkpoint (main process only); each file appears whole or not at all."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            target = Path(output_dir or self.args.output_dir)
            target.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target) as scratch:
                self.model.save_pretrained(scratch)
                # Weights first: a folder without config.json is not taken for a checkpoint.
                for file in sorted(Path(scratch).iterdir(), key=lambda path: path.name == "config.json"):
                    os.replace(file, target / file.name)
        self.accelerator.wait_for_everyone()

    def _record_origin(self, train_rows: Any, layer: int | None) -> None:
        config = self.model.config
        config.hf_vs2_version = __version__
        config.training_data = {"num_rows": len(self.rows), "seed": self.args.seed}
        if isinstance(self.rows, _LayerRows):
            for name, value in self.rows.origin.items():
                setattr(config, name, value)
            config.training_data |= self.rows.dataset

    def _optimize(self) -> _Progress:
        args, accelerator = self.args, self.accelerator
        steps = self.num_steps
        optimizer = torch.optim.Adam(self.model.parameters(), lr=args.learning_rate, fused=True)
        schedule = get_linear_schedule_with_warmup(optimizer, round(args.warmup_ratio * steps), steps)
        plan = {
            "rows": len(self.rows),
            "global_batch_size": self.batch_size * args.gradient_accumulation_steps,
            "steps": steps,
        }
        plan |= {"seed": args.seed, "learning_rate": args.learning_rate, "calibration_share": args.calibration_share}
        progress = _Progress(self.model.config.num_latents, plan)
        model, optimizer = accelerator.prepare(self.model, optimizer)
        accelerator.register_for_checkpointing(progress, schedule)
        if args.resume_from_checkpoint:
            accelerator.load_state(str(self._checkpoint_to_resume()))
        progress.steps_since_active = progress.steps_since_active.to(accelerator.device)
        if args.report_to != "none":
            accelerator.init_trackers("hf_vs2", config=asdict(args))

        batch_plan = BatchPlan(self.train_indices, self.batch_size, args.seed)
        meter = _Meter(self.model.config.total_variance or 1.0, accelerator)
        model.train()
        with self._bar(progress.step, steps) as bar:
            for step in range(progress.step, steps):
                active = torch.zeros_like(progress.steps_since_active)
                dead = _dead(progress, args.dead_latent_threshold) if step >= args.dead_latent_threshold else None
                for micro in range(args.gradient_accumulation_steps):
                    x = self._batch(batch_plan[step * args.gradient_accumulation_steps + micro])
                    with accelerator.accumulate(model):
                        out = model(x, dead_latents=dead)
                        accelerator.backward(out.loss)
                        if accelerator.sync_gradients:
                            self.model.remove_parallel_decoder_gradient()
                            if args.max_grad_norm:
                                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                        optimizer.step()
                        optimizer.zero_grad()
                    meter.add(x, out)
                    active.scatter_reduce_(
                        0, out.latent_indices.flatten(), (out.latent_values != 0).flatten().long(), reduce="amax"
                    )
                schedule.step()
                self.model.normalize_decoder()
                # Reduced by hand: each process has seen only its part of the batch.
                active = accelerator.reduce(active, "sum")
                progress.steps_since_active = torch.where(active > 0, 0, progress.steps_since_active + 1)
                progress.step = step + 1
                bar.update()
                if progress.step % args.logging_steps == 0 or progress.step == steps:
                    self._log(progress, meter, schedule.get_last_lr()[0], bar)
                if args.save_steps and progress.step % args.save_steps == 0 and progress.step < steps:
                    self._save_checkpoint(progress.step)
        return progress

    def _batch(self, indices: torch.Tensor) -> torch.Tensor:
        """This process's part of a global batch, on its device."""
        size = self.args.per_device_train_batch_size
        mine = indices[self.accelerator.process_index * size :][:size]
        return self.rows.take(mine).to(self.accelerator.device, non_blocking=True)

    def _calibrate(self) -> dict[str, float]:
        self.model.eval()
        if len(self.held_out_indices):
            return calibrate(self.model, self.rows, self.held_out_indices)
        logger.warning(
            "calibration_share=0: no rows were held out, so the SAE has no gate. Calibrate it on fresh rows."
        )
        return {}

    def _log(self, progress: _Progress, meter: _Meter, learning_rate: float, bar: tqdm) -> None:
        dead_share = _dead(progress, self.args.dead_latent_threshold).float().mean().item()
        entry = {**meter.read(), "dead_share": dead_share, "learning_rate": learning_rate}
        if not entry["loss"] < float("inf"):
            raise ValueError(
                f"The loss is {entry['loss']} at step {progress.step}. Lower learning_rate, or check the activations for NaN."
            )
        progress.log.append({"step": progress.step, **entry})
        bar.set_postfix(loss=f"{entry['loss']:.4f}", fvu=f"{entry['fvu']:.4f}", dead=f"{dead_share:.1%}")
        if self.args.report_to != "none":
            self.accelerator.log(entry, step=progress.step)

    def _bar(self, initial: int, total: int) -> tqdm:
        hidden = self.args.disable_tqdm or not self.accelerator.is_local_main_process
        return tqdm(desc="Training SAE", initial=initial, total=total, unit="step", disable=hidden)

    def _save_checkpoint(self, step: int) -> None:
        """Everything needed to continue exactly, under a temporary name until it is whole; older ones are removed."""
        output = self.args.output_path
        final, partial = output / f"{_CHECKPOINT_PREFIX}{step}", output / f".{_CHECKPOINT_PREFIX}{step}.partial"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            for old in self._checkpoints()[: -self.args.save_total_limit or None]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _checkpoints(self) -> list[Path]:
        found = [path for path in self.args.output_path.glob(f"{_CHECKPOINT_PREFIX}*") if path.is_dir()]
        return sorted(found, key=lambda path: int(path.name.removeprefix(_CHECKPOINT_PREFIX)))

    def _checkpoint_to_resume(self) -> Path:
        wanted = self.args.resume_from_checkpoint
        if wanted != "latest":
            path = Path(str(wanted))
            if not path.is_dir():
                raise ValueError(f"resume_from_checkpoint={wanted}: there is no such folder.")
            return path
        found = self._checkpoints()
        if not found:
            raise ValueError(
                f"resume_from_checkpoint=latest: {self.args.output_dir} holds no {_CHECKPOINT_PREFIX}* folder."
            )
        return found[-1]


class _LayerRows:
    """One layer of an activation store, and where its rows come from, as the SAE's config records it."""

    def __init__(self, store: ActivationStore, layer: int | None):
        if layer is None and len(store.layers) > 1:
            raise ValueError(f"The store holds layers {list(store.layers)}: say which one to train on (layer=).")
        self.store = store
        self.layer = store.layers[0] if layer is None else layer

    def __len__(self) -> int:
        return len(self.store)

    def take(self, indices: torch.Tensor) -> torch.Tensor:
        return self.store.take(indices, layer=self.layer)

    @property
    def origin(self) -> dict[str, Any]:
        found = self.store.metadata
        return {
            "base_model_name_or_path": found["model"]["id"],
            "base_model_revision": found["model"]["revision"],
            "base_model_num_layers": found["num_layers"],
            "base_model_fingerprint": found["base_model_fingerprint"],
            "layer": self.layer,
        }

    @property
    def dataset(self) -> dict[str, Any]:
        found = self.store.metadata
        return {"id": found["dataset_id"], **found["dataset"], "skipped": len(found["skipped"])}


class _Meter:
    """Loss and FVU since the last log entry; sums stay on the device, one reduction a log entry."""

    def __init__(self, total_variance: float, accelerator: Accelerator):
        self.total_variance, self.accelerator = total_variance, accelerator
        self._reset()

    def _reset(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64 if self.accelerator.device.type != "mps" else torch.float32)
        self.sums = self.sums.to(self.accelerator.device)

    @torch.no_grad()
    def add(self, x: torch.Tensor, out: Any) -> None:
        error = (x - out.reconstruction.float()).square().sum()
        self.sums += torch.stack([out.loss.detach() * len(x), error, torch.full_like(error, len(x))]).to(
            self.sums.dtype
        )

    def read(self) -> dict[str, float]:
        loss, error, count = self.accelerator.reduce(self.sums, "sum").tolist()
        self._reset()
        return {"loss": loss / count, "fvu": error / (count * self.total_variance)}


def _dead(progress: _Progress, threshold: int) -> torch.Tensor:
    return progress.steps_since_active >= threshold


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


__all__ = ["SAETrainer"]
