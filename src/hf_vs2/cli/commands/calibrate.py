"""`hf-vs2 calibrate`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...config.schema import whole
from .. import flags, steps
from ..output import say, say_written
from ..parsing import Parser, UsageError
from ..places import check_writable, refuse_other_model


if TYPE_CHECKING:
    from ...config.sae import SAEConfig


USAGE = "--checkpoint O --dataset D [--split S] [options]"
DESCRIPTION = """\
Measures the gate's FVU quantiles on unlabelled images that the SAE was not trained on, and the statistics that
methods beyond VS2 need (means, principal components, a sketch of rows), and writes them into the checkpoint.
`hf-vs2 train` has done so already; do it again for images from where the model will be used."""
EXAMPLES = """\
examples:
  hf-vs2 calibrate --checkpoint outputs/sae-cifar100 --dataset my_photos/
  hf-vs2 calibrate --checkpoint user/sae-cifar100 --dataset my_photos/ --output_dir outputs/sae-recalibrated"""


def add_flags(parser: Parser) -> None:
    parser.section("what to calibrate")
    flags.add_checkpoint(parser)
    parser.flag("--output_dir", writes="folder", help="Write the calibrated checkpoint here, not into the one given.")
    parser.flag(
        "--sketch_rows",
        kind=whole(0, 10_000_000),
        default=4096,
        help="Rows of activations that the checkpoint keeps for methods that fit prototypes to labels; 0 keeps none.",
    )
    parser.section("images")
    flags.add_dataset(parser)
    parser.section("extraction of activations")
    flags.add_extraction(parser, beside_checkpoint=True)
    flags.add_progress(parser)


keeps = steps.activations_beside


def run(args: Namespace) -> None:
    from ...config.sae import SAEConfig
    from ...files.atomic import replace_text
    from ...files.checkpoint_folder import PROCESSOR_FILES
    from ...training.calibration import calibrate, gate_within, split_rows
    from ...training.domain import measure_statistics

    local = Path(args.checkpoint, args.subfolder or "")
    if args.output_dir is None and not local.is_dir():
        raise UsageError(
            f"{local} is no folder here, and a checkpoint on the Hub cannot be written to: say where the calibrated "
            "one goes with --output_dir"
        )
    target = args.output_dir or local
    check_writable(target, "--output_dir")
    refuse_other_model(target)
    model, _, image_processor = steps.load_steered_clip(args, texts=False)
    if len(model.saes) != 1:
        raise UsageError(f"{args.checkpoint} holds {len(model.saes)} SAEs: calibrate each one's own checkpoint")
    sae = model.sae
    layers = [int(layer) for layer in model.saes]
    _, store = steps.open_rows(args, model, image_processor, layers=layers)
    trained_on = sae.config.training_data or {}
    parts = trained_on.get("parts") or [trained_on]  # of a union of data sets
    if store.metadata["dataset"]["fingerprint"] in [part.get("fingerprint") for part in parts]:
        raise UsageError(
            "these are the images that the SAE was trained on, which it reconstructs better than fresh ones: "
            "calibrate on others"
        )
    if not steps.join_processes().is_main_process:  # they have shared the extraction; the rest takes seconds
        return
    metrics = calibrate(sae, store)
    if layers[0] == model.num_layers - 1:  # what methods beyond VS2 score
        measured, held_out = split_rows(len(store), 0.2, seed=0)
        sae.set_domain_statistics(
            measure_statistics(sae, store, measured, held_out, clip=model.clip, sketch_rows=args.sketch_rows)
        )
    place = steps.checkpoint_place(args)
    described, _ = SAEConfig.get_config_dict(args.checkpoint, **place)
    if described["model_type"] == SAEConfig.model_type:
        sae.save_pretrained(target)
    else:
        if model.steering_settings.measures_fvu:
            model.set_steering(gate=gate_within(sae.config, model.steering_settings.gate))
        model.save_pretrained(target, full=described["holds_clip"])
    if not local.is_dir() or target.resolve() != local.resolve():  # where the checkpoint's own is not
        replace_text(target / PROCESSOR_FILES[0], image_processor.to_json_string())
    say(
        *sae_lines(f"On {sae.config.num_calibration_rows:,} rows", sae.config, metrics),
        *([] if sae.domain_statistics is None else [f"{sae.domain_statistics}."]),
    )
    say_written({"checkpoint": target, "activations": store.path})


def sae_lines(where: str, config: SAEConfig, metrics: Mapping[str, float]) -> list[str]:
    """How well an SAE does on some rows, and the gate that it got there."""
    worse = ["That is worse than the mean: train on more images."] if metrics["fvu"] > 1 else []
    lines = [
        f"{where}: FVU {metrics['fvu']:.4f} (0: nothing is missed, 1: no better than the mean).",
        *worse,
        f"An image has {metrics['l0']:.1f} active latents (L0).",
    ]
    if config.gate is None:
        return [*lines, "Default gate: none."]
    threshold = config.fvu_threshold(config.gate)
    return [*lines, f"Default gate: images of FVU up to {threshold:.4f} (quantile {config.gate}) are steered."]
