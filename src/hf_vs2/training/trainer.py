"""SAE training with accelerate: cached activations in, a calibrated checkpoint out."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from transformers import get_linear_schedule_with_warmup
from transformers.utils import logging

from ..config.sae import SAEConfig
from ..data.stores.extraction import naming_lost_partners
from ..data.stores.rows import RowSource, chosen_rows, rows_of, training_labels
from ..files.digests import tensor_digest
from ..files.progress import progress_bar
from ..files.sharing.model_card import write_model_card
from ..sae.modeling import SAEModel, SAEOutput
from ..version import __version__
from .arguments import SAETrainingArguments
from .batches import BatchPlan, read_batches, to_device
from .calibration import activation_statistics, calibrate, is_converted, split_rows
from .domain import measure_statistics
from .label_losses import LabelLoss, describe_label_loss
from .output_folder import (
    alone_in,
    checkpoint_to_resume,
    checkpoints,
    claim,
    digest_of,
    finished_metrics,
    planned_settings,
    save_checkpoint,
    standing,
    warn_of_finished,
    write_log,
)
from .progress import TrainingProgress
from .sharding import apply_fsdp, refuse_unfit_fsdp, whole_model
from .step import Batch, GraphedTrainingStep, Meter, TrainingStep
from .trackers import check_tracker


logger = logging.get_logger(__name__)


class SAETrainer:
    """
    Trains a [`SAEModel`] on cached CLS activations, calibrates it and saves it.

    Works on one process or many (`accelerate launch`, `torchrun`); for the same global batch the result is the same up
    to float error. Under an FSDP configuration of accelerate each process keeps a part of the latents, and of their
    gradients and optimizer state; after training, `trainer.model` is whole again on every process. No labels are used
    unless a `label_loss` is given.

    Args:
        model (`SAEModel` or `SAEConfig`): a model to go on training, or the configuration of a new one, which is
            copied (`hidden_size` must be the activations'). The model's config takes over from the store which CLIP
            and layer the rows come from.
        args (`SAETrainingArguments`): how to train.
        train_rows (`ActivationStore`, a list of them, or `torch.Tensor` of shape `(rows, hidden_size)`): the
            activations. The rows of several stores, of one CLIP and preprocessing, are trained on as one set; none are
            copied.
        layer (`int`, *optional*): which layer of a store that holds several.
        indices (`torch.LongTensor` of shape `(n,)`, *optional*): use only these rows, for training and for
            calibration.
        labels (`torch.LongTensor` of shape `(rows,)`, *optional*): for `label_loss`, the class of each row, -1 where
            unknown; the stores' own by default, where classes of stores with different class names are different
            classes.
        label_loss (`Callable`, *optional*): a term added to the loss, such as [`PrototypeAlignment`]. It is called
            with the [`SAEOutput`] and the labels of what one process sees in one forward pass; the scalar it returns
            is divided by `config.total_variance`, which gives it the units of the reconstruction loss (FVU). Labels
            are used in training only; `config.training_data` records that they were.

    Raises:
        `ValueError`: on a width that differs from the model's, too few rows, stores that do not belong together or are
            of an encoder that can't be steered, labels that are missing or do not fit, or an accelerate configuration
            that an SAE can't be trained under.

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
        train_rows: RowSource,
        layer: int | None = None,
        *,
        indices: torch.Tensor | Sequence[int] | None = None,
        labels: torch.Tensor | Sequence[int] | None = None,
        label_loss: LabelLoss | None = None,
    ):
        self.args = args
        check_tracker(args.report_to)
        refuse_unfit_fsdp()
        self.accelerator = Accelerator(
            # Without this, processes that torchrun starts on a machine without GPU would each train alone.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to,
            project_dir=args.output_dir,
            kwargs_handlers=[
                # The only buffer, the mean, never changes: nothing to broadcast at each step. And the gradients are
                # kept where they are exchanged from, not twice.
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
            ],
        )
        apply_fsdp(self.accelerator)
        set_seed(args.seed)
        is_given = isinstance(model, SAEModel)
        self.model = model if is_given else SAEModel(copy.deepcopy(model))
        # A converted SAE has been trained too, though nobody knows the variance of its rows.
        self._is_new = not is_given or (model.config.total_variance is None and not is_converted(model.config))
        self._start = [tensor_digest(part.cpu()) for part in self.model.parameters()] if is_given else None
        self._has_begun = False
        self.rows = rows_of(train_rows, layer)
        self.indices = chosen_rows(indices, len(self.rows))
        train, held_out = split_rows(len(self.indices), args.calibration_share, args.seed)
        if len(train) < 2:
            raise ValueError(f"{len(self.indices)} activation rows are too few to train an SAE on.")
        self.train_indices, self.held_out_indices = self.indices[train], self.indices[held_out]
        width = self.rows.take(torch.zeros(1, dtype=torch.int64)).shape[1]
        if width != self.model.config.hidden_size:
            raise ValueError(
                f"The activations are {width} wide, the SAE reads {self.model.config.hidden_size}. Use "
                f"SAEConfig(hidden_size={width})."
            )
        if labels is not None and label_loss is None:
            raise ValueError(
                "labels are given, but no label_loss that would use them. Training is label-free without one."
            )
        self.label_loss = label_loss
        self.labels = None if label_loss is None else training_labels(labels, self.rows)
        self._record_origin()

    @property
    def batch_size(self) -> int:
        """Rows of one forward pass over all processes."""
        return self.args.per_device_train_batch_size * self.accelerator.num_processes

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.args.num_steps(len(self.train_indices), self.batch_size * self.args.gradient_accumulation_steps)

    def train(self, resume_from_checkpoint: str | bool | None = None) -> dict[str, float]:
        """
        Train, calibrate on the held-out rows, save to `args.output_dir`. A training that was interrupted there goes
        on, to the same result; of one that is finished there, the model and figures are read.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): as in transformers, in the place of that of `args`;
                `True` is the latest. It need not be asked for.

        Returns:
            `dict`: `fvu` and `l0` on the held-out rows (missing if none were held out), `dead_share`, `steps`,
            `train_rows`, `held_out_rows`, `seconds`. The same is written to `training_log.json`, with the log.

        Raises:
            `ValueError`: on rows that are not finite or all the same, a loss that is not finite, or a checkpoint to
                resume from that is missing or was made with other rows or settings, or an `args.output_dir` that holds
                another training.
            `OSError`: when another training writes to `args.output_dir`, on a full disk, or when another process of
                this training has died.
        """
        if resume_from_checkpoint:
            given = "latest" if resume_from_checkpoint is True else resume_from_checkpoint
            self.args = replace(self.args, resume_from_checkpoint=given)
        with naming_lost_partners(), alone_in(self.args.output_path, self.accelerator):
            return self._train()

    def _train(self) -> dict[str, float]:
        started, args = time.perf_counter(), self.args
        self._set_statistics()
        plan = self._plan()
        wanted = args.resume_from_checkpoint
        is_inside = wanted not in (None, "latest") and Path(wanted).resolve().parent == args.output_path.resolve()
        reached = "interrupted" if is_inside else standing(args.output_path, plan, args.overwrite_output_dir)
        self.accelerator.wait_for_everyone()  # all have looked before the main process changes anything
        if reached == "finished" and wanted in (None, "latest"):
            trained = SAEModel.from_pretrained(args.output_path)
            warn_of_finished(args.output_path, self.model.config, trained.config)
            self._take_over(trained)
            return finished_metrics(args.output_path)
        checkpoint = checkpoint_to_resume(args.output_path, wanted, reached != "none")
        if self._has_begun and checkpoint is None:
            raise RuntimeError(
                "This trainer has trained its model already, and has no checkpoint to go back to: make it again."
            )
        if self.accelerator.is_main_process:
            kept = filter(None, [checkpoint]) if reached == "none" else checkpoints(args.output_path)
            claim(args.output_path, plan, asdict(args), [*kept])
        self.accelerator.wait_for_everyone()
        self._has_begun = True
        progress = self._optimize(plan, checkpoint)
        if self.accelerator.is_fsdp2:
            self.accelerator.free_memory()  # the optimizer's state makes room for the weights
            self.model = whole_model(self.model)
        metrics: dict[str, Any] = self._calibrate()
        metrics["dead_share"] = progress.dead(self.args.dead_latent_threshold).float().mean().item()
        metrics |= {
            "steps": progress.step,
            "train_rows": len(self.train_indices),
            "held_out_rows": len(self.held_out_indices),
        }
        self.model.config.training_metrics = metrics
        if self.accelerator.is_main_process:
            self._measure_domain()
        self.save_model()
        metrics = metrics | {"seconds": round(time.perf_counter() - started, 3)}
        if self.accelerator.is_main_process:
            write_log(args.output_path, plan, asdict(args), metrics, progress.log)
            write_model_card(self.args.output_path)  # again, now that the log tells the settings
        self.accelerator.wait_for_everyone()
        # Not `end_training()`: it would leave the process group too, which a second trainer in the same job still
        # needs.
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return metrics

    def _take_over(self, trained: SAEModel) -> None:
        """Makes the model that the trainer was given, which its caller goes on with, what training made of it."""
        self.model.config = trained.config
        self.model.load_state_dict(trained.state_dict())
        self.model.set_domain_statistics(trained.domain_statistics)
        self.model.to(self.accelerator.device)

    def save_model(self, output_dir: str | os.PathLike | None = None) -> None:
        """Write the SAE checkpoint (main process only), whole or not at all."""
        if self.accelerator.is_main_process:
            self.model.save_pretrained(output_dir or self.args.output_dir)

    def _set_statistics(self) -> None:
        """Mean and total variance of the training rows into the model; a new one's `b_pre` starts at the mean."""
        mean, total_variance = activation_statistics(self.rows, self.train_indices)
        if not total_variance > 0:
            raise ValueError(
                "All training rows are the same, or differ by rounding alone: there is nothing to learn. Check how "
                "they were extracted."
            )
        for _ in self.rows.batches(indices=self.held_out_indices):
            pass  # refuses rows that are not finite now, not in the calibration after the training
        if self._is_new:
            self.model.set_statistics(mean, total_variance)
        else:  # goes on from its own b_pre
            self.model.mean.copy_(mean)
            self.model.config.total_variance = total_variance
        self._is_new = False
        self.model.config.fvu_quantiles = self.model.config.num_calibration_rows = None
        self.model.set_domain_statistics(None)

    def _record_origin(self) -> None:
        config = self.model.config
        config.hf_vs2_version = __version__
        earlier = None if self._is_new else config.training_data
        data: dict[str, Any] = {"num_rows": len(self.indices), "seed": self.args.seed}
        for name, value in self.rows.origin.items():
            setattr(config, name, value)
        data |= self.rows.data(self.indices) or {}
        if len(self.indices) < len(self.rows):
            data["selected_from"] = len(self.rows)
        if self.label_loss is not None:
            data["label_loss"] = describe_label_loss(self.label_loss)
        for kept in ("label_loss", "converted_from"):  # what went into the weights that go on
            if earlier and kept in earlier:
                data.setdefault(kept, earlier[kept])
        config.training_data = data

    def _optimize(self, plan: dict[str, Any], checkpoint: Path | None) -> TrainingProgress:
        args, accelerator = self.args, self.accelerator
        accelerator.free_memory()  # of an earlier, perhaps interrupted, train()
        # accelerate keeps one value a process: another trainer may have been made since.
        accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps
        accelerator.step = 0  # micro batches: an earlier train() may have ended in the middle of a step
        steps = self.num_steps
        graphed = GraphedTrainingStep.suits(accelerator, args, with_labels=self.label_loss is not None)
        optimizer = torch.optim.Adam(self.model.parameters(), lr=args.learning_rate, fused=True, capturable=graphed)
        schedule = get_linear_schedule_with_warmup(optimizer, round(args.warmup_ratio * steps), steps)
        model, optimizer = accelerator.prepare(self.model, optimizer)
        never = torch.zeros(self.model.config.weight_shape[0], dtype=torch.int64, device=accelerator.device)
        progress = TrainingProgress(plan, steps_since_active=never)
        if checkpoint is not None:
            progress.load(checkpoint, accelerator, self.model, optimizer, schedule)
            accelerator.step = 0
        if args.report_to != "none":
            accelerator.init_trackers("hf_vs2", config=asdict(args))

        meter = Meter(self.model.config.total_variance or 1.0, accelerator)
        step_taker = TrainingStep(model, self.model, optimizer, accelerator, args, self._label_term, progress, meter)
        take_step = GraphedTrainingStep(step_taker) if graphed else step_taker
        model.train()
        micro = args.gradient_accumulation_steps
        batch_plan = BatchPlan(self.train_indices, self.batch_size, args.seed)
        numbers = range(progress.step * micro, steps * micro)
        batches = read_batches(self.rows, self.labels, batch_plan, accelerator, numbers)
        # Between two log entries nothing here waits for a GPU.
        with self._bar(progress.step, steps) as bar, contextlib.closing(batches):
            for step in range(progress.step, steps):
                can_be_dead = step >= args.dead_latent_threshold
                parts = map(self._batch, itertools.islice(batches, micro))
                take_step(parts, revive=can_be_dead)
                schedule.step()
                progress.step = step + 1
                bar.update()
                if progress.step % args.logging_steps == 0 or progress.step == steps:
                    self._log(progress, meter, schedule.get_last_lr()[0], bar)
                if args.save_steps and progress.step % args.save_steps == 0 and progress.step < steps:
                    save_checkpoint(args.output_path, accelerator, progress, args.save_total_limit)
        # accelerate put mixed precision around the model's forward; what is calibrated and handed back is the model
        # itself.
        for name in ("forward", "_original_forward"):
            self.model.__dict__.pop(name, None)
        return progress

    def _plan(self) -> dict[str, Any]:
        args, config = self.args, self.model.config
        plan: dict[str, Any] = {
            "rows": len(self.indices),
            "indices": digest_of(self.indices) if len(self.indices) < len(self.rows) else None,
            "steps": self.num_steps,
            "global_batch_size": self.batch_size * args.gradient_accumulation_steps,
            "mixed_precision": self.accelerator.mixed_precision,
            "sharding": "fsdp" if self.accelerator.is_fsdp2 else None,  # accelerate's files differ
        }
        plan |= planned_settings(config, args)
        plan["label_loss"] = None if self.label_loss is None else describe_label_loss(self.label_loss)
        plan["labels"] = None if self.labels is None else digest_of(self.labels[self.indices])
        if self._start is not None:
            plan["start"] = self._start
        # Last, so that a changed setting is named first: these stand for the rows themselves.
        plan["total_variance"] = config.total_variance
        plan["some_rows"] = digest_of(self.rows.take(self.indices[:: max(1, len(self.indices) // 3)]))
        return plan

    def _batch(self, batch: Batch) -> Batch:
        """A batch on this process's device."""
        return to_device(batch, self.accelerator.device)

    def _label_term(self, out: SAEOutput, labels: torch.Tensor) -> torch.Tensor:
        """What the labels of this process's part add to its loss, in units of the FVU."""
        assert self.label_loss is not None and self.model.config.total_variance
        return self.label_loss(out, labels) / self.model.config.total_variance

    def _measure_domain(self) -> None:
        """What methods beyond VS2 need, which score what comes out of the last layer."""
        layers, layer = self.model.config.base_model_num_layers, self.model.config.layer
        if self.args.sketch_rows and (layer is None or layers is None or layer == layers - 1):
            found = measure_statistics(
                self.model,
                self.rows,
                self.train_indices,
                self.held_out_indices,
                sketch_rows=self.args.sketch_rows,
                seed=self.args.seed,
            )
            self.model.set_domain_statistics(found)

    def _calibrate(self) -> dict[str, float]:
        self.model.eval()
        if len(self.held_out_indices):
            return calibrate(self.model, self.rows, self.held_out_indices)
        logger.warning(
            "calibration_share=0: no rows were held out, so the SAE has no gate. Calibrate it on fresh rows."
        )
        return {}

    def _log(self, progress: TrainingProgress, meter: Meter, learning_rate: float, bar: Any) -> None:
        dead_share = progress.dead(self.args.dead_latent_threshold).float().mean().item()
        entry = {**meter.read(), "dead_share": dead_share, "learning_rate": learning_rate}
        if not entry["loss"] < float("inf"):
            raise ValueError(
                f"The loss is {entry['loss']} at step {progress.step}. Lower learning_rate, or check the activations "
                "for NaN."
            )
        progress.log.append({"step": progress.step, **entry})
        bar.set_postfix(loss=f"{entry['loss']:.4f}", fvu=f"{entry['fvu']:.4f}", dead=f"{dead_share:.1%}")
        if self.args.report_to != "none":
            self.accelerator.log(entry, step=progress.step)

    def _bar(self, initial: int, total: int) -> Any:
        shown = self.accelerator.is_local_main_process and not self.args.disable_tqdm
        return progress_bar(shown=shown, desc="Training SAE", initial=initial, total=total, unit="step")
