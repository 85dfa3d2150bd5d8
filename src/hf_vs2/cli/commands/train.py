"""`hf-vs2 train`."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config.schema import LARGEST_EXPANSION, number, whole
from ...training.arguments import SAETrainingArguments
from .. import flags, steps
from ..next_steps import after_training
from ..output import say, say_written
from ..parsing import Parser, UsageError, dataclass_from
from ..places import check_writable
from .calibrate import sae_lines


if TYPE_CHECKING:
    from ...config.sae import SAEConfig
    from ...data.stores.activations import ActivationStore
    from ...training.label_losses import PrototypeAlignment
    from ...training.trainer import SAETrainer

USAGE = "--model M --dataset D [--split S] --output_dir O [options]"
DESCRIPTION = """\
Trains a sparse autoencoder on the CLS activations of unlabelled images: extracts them (once), trains, and
calibrates the gate on rows held out from training. Runs on one process, or on many with `accelerate launch -m
hf_vs2.cli train ...` or torchrun. Labels are used with --pass_weight only (PASS)."""
EXAMPLES = """\
examples:
  hf-vs2 train --model openai/clip-vit-base-patch32 --dataset uoft-cs/cifar100 --split train \\
      --image_column img --output_dir outputs/sae-cifar100 --top_k 64
  hf-vs2 train --config examples/configs/cifar100.yaml --learning_rate 1e-3
  hf-vs2 train --activations_dir outputs/activations/0123456789abcdef --layer -2 \\
      --output_dir outputs/sae-layer-10
  hf-vs2 train --activations_dir outputs/rows-cifar100 outputs/rows-cub --output_dir outputs/sae-both
  hf-vs2 train --config examples/configs/cifar100.yaml --pass_weight 0.8 --label_column fine_label \\
      --output_dir outputs/sae-pass
  accelerate launch --config_file examples/accelerate/one_node_8_gpus.yaml \\
      -m hf_vs2.cli train --config examples/configs/cifar100.yaml"""
CHECKPOINTS_AND_LOG = (
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "logging_steps",
    "report_to",
    "disable_cuda_graphs",
    "disable_tqdm",
)


def add_flags(parser: Parser) -> None:
    parser.section("what to train on")
    flags.add_model(parser, required=False)
    flags.add_dataset(parser, required=False)
    flags.add_label_column(parser, ", to keep beside the activations.")
    parser.flag("--layer", kind=flags.LAYER, default=-1, help="Encoder layer from 0; negative ones from the last.")
    parser.section("output and configuration")
    parser.dataclass_flags(SAETrainingArguments, ["output_dir"])
    parser.writes["output_dir"] = ("--output_dir", "folder")
    parser.flag(
        "--config", type=Path, metavar="YAML", help="File of flags (top_k: 64); those on the command line win."
    )
    parser.section("sparse autoencoder")
    parser.flag("--top_k", kind=whole(1), default=64, help="Latents active for one input.")
    parser.flag(
        "--expansion_factor",
        kind=whole(1, LARGEST_EXPANSION),
        default=4,
        help="Latents per feature of the activations.",
    )
    parser.flag(
        "--activation",
        choices=("relu", "absolute"),
        default="relu",
        help="Which latents stay: ReLU's largest, or |largest|.",
    )
    parser.section("training")
    others = {"output_dir", *CHECKPOINTS_AND_LOG}
    parser.dataclass_flags(
        SAETrainingArguments, [f.name for f in fields(SAETrainingArguments) if f.name not in others]
    )
    parser.alternatives.append({"--max_steps", "--num_train_epochs"})
    parser.flag(
        "--pass_weight",
        kind=number(0),
        metavar="X",
        help="Weight of PASS, which uses labels in training (the paper's 0.8). Without it no label is used.",
    )
    parser.section("checkpoints and log")
    parser.dataclass_flags(SAETrainingArguments, CHECKPOINTS_AND_LOG)
    parser.section("extraction of activations")
    parser.flag(
        "--activations_dir",
        type=Path,
        nargs="+",
        help="Cache root, shared by any number of runs [OUTPUT_DIR/activations]. Without --dataset: the activations "
        "to train on; several are trained on as one set.",
    )
    flags.add_extraction(parser)


keeps = attrgetter("output_dir")


def run(args: Namespace) -> None:
    from ...training.sharding import refuse_unfit_fsdp
    from ...training.trackers import check_tracker
    from ...training.trainer import SAETrainer

    refuse_unfit_fsdp()  # before the extraction, which it would spoil
    arguments = dataclass_from(SAETrainingArguments, args)
    check_tracker(arguments.report_to)
    label_loss = _label_loss(args)
    processes = steps.join_processes()
    if arguments.mixed_precision == "fp16" and processes.device.type == "cpu":
        raise UsageError("--mixed_precision fp16 needs a GPU: on a CPU use bf16 or no")
    stores = _activations(args, arguments)
    config, layer = _sae_config(args, stores[0].hidden_size, stores[0].metadata["num_layers"])
    trainer = SAETrainer(config, arguments, stores, layer=layer, label_loss=label_loss)
    metrics = trainer.train()
    _report(args, trainer, stores, metrics)
    processes.destroy_process_group()


def _label_loss(args: Namespace) -> PrototypeAlignment | None:
    from ...training.label_losses import PrototypeAlignment

    if args.label_column is not None and args.dataset is None:
        raise UsageError(
            "--label_column names a column of --dataset: activations keep the labels they were extracted with"
        )
    if args.pass_weight is None:
        return None
    if args.dataset is not None and args.label_column is None:
        raise UsageError("--pass_weight trains with labels: name their column with --label_column")
    return PrototypeAlignment(args.pass_weight)


def _activations(args: Namespace, arguments: SAETrainingArguments) -> list[ActivationStore]:
    """The rows to train on: stores that are there, or that of a model and a data set, extracted when needed."""
    from ...data.stores.activations import ActivationStore
    from ...encoders.families import vision_config_of
    from ...encoders.loading import clip_config
    from ...training.output_folder import checkpoint_to_resume, planned_settings, standing

    if args.dataset is None and args.activations_dir is not None:
        return [ActivationStore.open(path) for path in args.activations_dir]
    missing = [f"--{name}" for name in ("model", "dataset") if getattr(args, name) is None]
    if missing:
        raise UsageError(f"give {' and '.join(missing)}, or --activations_dir with activations to train on")
    if len(args.activations_dir or ()) > 1:
        raise UsageError(
            "--activations_dir with --dataset is one cache root; several are for training without --dataset"
        )
    model = steps.local_or_id(args.model)
    cache = args.activations_dir[0] if args.activations_dir else Path(args.output_dir) / "activations"
    check_writable(cache, "--activations_dir")
    # Settings that cannot work are refused before hours of extraction.
    vision: Any = vision_config_of(clip_config(model, {"revision": args.revision}))
    config, layer = _sae_config(args, vision.hidden_size, vision.num_hidden_layers)
    standing(arguments.output_path, planned_settings(config, arguments), arguments.overwrite_output_dir)
    checkpoint_to_resume(arguments.output_path, args.resume_from_checkpoint)
    dataset = steps.open_dataset(args)
    options = {"layers": [layer], "label_column": args.label_column, "revision": args.revision}
    return [steps.extract(args, model, dataset, cache, **options)]


def _sae_config(args: Namespace, hidden_size: int, num_layers: int) -> tuple[SAEConfig, int]:
    from ...config.sae import SAEConfig
    from ...encoders.base_model import resolve_layer

    config = SAEConfig(
        hidden_size=hidden_size, expansion_factor=args.expansion_factor, top_k=args.top_k, activation=args.activation
    )
    return config, resolve_layer(args.layer, num_layers)


def _report(args: Namespace, trainer: SAETrainer, stores: list[ActivationStore], metrics: dict[str, float]) -> None:
    from ...encoders.families import FAMILIES
    from ...files.checkpoint_folder import TRAINING_LOG_NAME

    output = trainer.args.output_path
    config = trainer.model.config
    say(
        f"{metrics['steps']} steps on {metrics['train_rows']:,} rows in {metrics['seconds']:.1f} s:"
        f" {config.num_latents:,} latents, {metrics['dead_share']:.1%} of them dead."
    )
    if metrics["held_out_rows"]:
        say(*sae_lines(f"On {metrics['held_out_rows']:,} rows held out", config, metrics))
    say_written(
        {
            "SAE checkpoint": output,
            "training log": output / TRAINING_LOG_NAME,
            "activations": " ".join(str(store.path) for store in stores),
        }
    )
    if config.layer != stores[0].metadata["num_layers"] - 1:
        return  # commands that compare and show replay the last layer only
    family = FAMILIES.get(str(config.base_model_type))
    following = after_training(args, output, texts=family is None or family.has_texts)
    if following is not None:
        say("", f"Next: {following}")
