"""Settings of SAE training, spelled as transformers' `TrainingArguments` spells them."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class SAETrainingArguments:
    """
    Arguments of [`SAETrainer`]. Each field's help is its documentation, here and in `hf-vs2 train --help`.

    Raises:
        `ValueError`: on values that can't be trained with, naming the argument.
    """

    output_dir: str = field(metadata={"help": "Folder for the SAE checkpoint, the training state and the log."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate of Adam (the paper's 5e-4)."})
    warmup_ratio: float = field(
        default=0.05, metadata={"help": "Share of the steps over which the learning rate rises; then it falls to 0."}
    )
    max_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps. Without it and without num_train_epochs: 1500 steps or 5 epochs, what is more."
        },
    )
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Passes over the training rows, instead of max_steps."}
    )
    per_device_train_batch_size: int = field(default=512, metadata={"help": "Rows a process takes per forward pass."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes per optimizer step."})
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "Gradients are clipped to this norm; 0 for no clipping."}
    )
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, bf16 or fp16. By default what accelerate is configured for."}
    )
    dead_latent_threshold: int = field(
        default=100, metadata={"help": "Steps without activity after which a latent counts as dead (AuxK revives it)."}
    )
    calibration_share: float = field(
        default=0.05,
        metadata={
            "help": "Share of the rows held out from training for the gate's quantiles: at least 200 rows, at most a fifth."
        },
    )
    sketch_rows: int = field(
        default=4096,
        metadata={
            "help": "Rows that the checkpoint keeps, at random, for methods that fit prototypes to labels; 0: the checkpoint holds no "
            "statistics, and no activation of any image."
        },
    )
    seed: int = field(
        default=42, metadata={"help": "Seeds the initial weights, the order of rows and the held-out rows."}
    )
    logging_steps: int = field(default=50, metadata={"help": "Steps between two log entries."})
    save_steps: int = field(default=500, metadata={"help": "Steps between two training checkpoints; 0 for none."})
    save_total_limit: int = field(default=2, metadata={"help": "How many training checkpoints to keep."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "latest, or the path of a training checkpoint to continue from. Without it the same training goes on from where "
            "it was in output_dir."
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace another training in output_dir, and train a finished one again."}
    )
    report_to: str = field(
        default="none",
        metadata={"help": "Tracker for the log, by accelerate's name: tensorboard, wandb, trackio, all, none."},
    )
    disable_cuda_graphs: bool = field(
        default=False,
        metadata={
            "help": "Take every step as it comes. On one GPU steps are replayed as a CUDA graph, 2 to 4 times as fast."
        },
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        for name in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "dead_latent_threshold",
            "save_total_limit",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("save_steps", "max_grad_norm", "sketch_rows"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}.")
        if self.max_steps is not None and self.num_train_epochs is not None:
            raise ValueError("max_steps and num_train_epochs both say how long to train: give one of them.")
        for name in ("max_steps", "num_train_epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, not {value}.")
        for name in ("warmup_ratio", "calibration_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}.")

    def num_steps(self, num_rows: int, global_batch_size: int) -> int:
        """Optimizer steps for `num_rows` training rows in batches of `global_batch_size`."""
        if self.max_steps is not None:
            return self.max_steps
        epochs = 5 if self.num_train_epochs is None else self.num_train_epochs
        steps = max(1, round(epochs * num_rows / global_batch_size))
        return steps if self.num_train_epochs is not None else max(1500, steps)

    @property
    def output_path(self) -> Path:
        """`output_dir` as a path."""
        return Path(self.output_dir)


__all__ = ["SAETrainingArguments"]
