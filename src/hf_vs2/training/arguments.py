"""Settings of SAE training, spelled as transformers' `TrainingArguments` spells them."""

from dataclasses import dataclass
from pathlib import Path

from ..config.schema import (
    FLAG,
    LARGEST_BATCH,
    LARGEST_SEED,
    PATH,
    TEXT,
    check_fields,
    number,
    one_of,
    optional,
    setting,
    whole,
)


@dataclass
class SAETrainingArguments:
    """
    Arguments of [`SAETrainer`]. Each field's help is its documentation, here and in `hf-vs2 train --help`.

    Raises:
        `ValueError`: on values that can't be trained with, naming the argument.
    """

    output_dir: str = setting(PATH, help="Folder for the SAE checkpoint, the training state and the log.")
    learning_rate: float = setting(
        number(above=0), default=5e-4, help="Peak learning rate of Adam (the paper's 5e-4)."
    )
    warmup_ratio: float = setting(
        number(0, below=1),
        default=0.05,
        help="Share of the steps over which the learning rate rises; then it falls to 0.",
    )
    max_steps: int | None = setting(
        optional(whole(1)),
        default=None,
        help="Optimizer steps. Without it and without num_train_epochs: 1500 steps or 5 epochs, what is more.",
    )
    num_train_epochs: float | None = setting(
        optional(number(above=0, most=1_000_000)),
        default=None,
        help="Passes over the training rows, instead of max_steps.",
    )
    per_device_train_batch_size: int = setting(
        whole(1, LARGEST_BATCH), default=512, help="Rows a process takes per forward pass."
    )
    gradient_accumulation_steps: int = setting(
        whole(1, LARGEST_BATCH), default=1, help="Forward passes per optimizer step."
    )
    max_grad_norm: float = setting(
        number(0, infinite=True), default=1.0, help="Gradients are clipped to this norm; 0 for no clipping."
    )
    mixed_precision: str | None = setting(
        optional(one_of(("no", "bf16", "fp16"))),
        default=None,
        help="no, bf16 or fp16. By default what accelerate is configured for.",
    )
    dead_latent_threshold: int = setting(
        whole(1), default=100, help="Steps without activity after which a latent counts as dead (AuxK revives it)."
    )
    calibration_share: float = setting(
        number(0, below=1),
        default=0.05,
        help="Share of the rows held out from training for the gate's quantiles: at least 200 rows, at most a fifth.",
    )
    sketch_rows: int = setting(
        whole(0, 10_000_000),
        default=4096,
        help="Rows that the checkpoint keeps, at random, for methods that fit prototypes to labels; 0: the checkpoint "
        "holds no statistics, and no activation of any image.",
    )
    seed: int = setting(
        whole(0, LARGEST_SEED), default=42, help="Seeds the initial weights, the order of rows and the held-out rows."
    )
    logging_steps: int = setting(whole(1), default=50, help="Steps between two log entries.")
    save_steps: int = setting(whole(0), default=500, help="Steps between two training checkpoints; 0 for none.")
    save_total_limit: int = setting(whole(1), default=2, help="How many training checkpoints to keep.")
    resume_from_checkpoint: str | None = setting(
        optional(PATH),
        default=None,
        help="latest, or the path of a training checkpoint to continue from. Without it the same training resumes "
        "where it stopped in output_dir.",
    )
    overwrite_output_dir: bool = setting(
        FLAG, default=False, help="Replace another training in output_dir, and train a finished one again."
    )
    report_to: str = setting(
        TEXT, default="none", help="Tracker for the log, by accelerate's name: tensorboard, wandb, trackio, all, none."
    )
    disable_cuda_graphs: bool = setting(
        FLAG,
        default=False,
        help="Take every step as it comes. On one GPU steps are replayed as a CUDA graph, 2 to 4 times as fast.",
    )
    disable_tqdm: bool = setting(FLAG, default=False, help="No progress bar.")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_steps is not None and self.num_train_epochs is not None:
            raise ValueError("max_steps and num_train_epochs both say how long to train: give one of them.")

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
