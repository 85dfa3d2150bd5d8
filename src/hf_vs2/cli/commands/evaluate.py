"""`hf-vs2 evaluate`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ...config.schema import whole
from .. import flags, steps
from ..output import say, say_written
from ..parsing import Parser
from ..places import check_writable


USAGE = "--checkpoint O --dataset D [--split S] [--label_column NAME] [options]"
DESCRIPTION = """\
Compares plain CLIP, the controls (centroid, distribution norm, other dictionaries), VS2 and label-free methods
beyond it on labelled images, which should not be those the SAE was trained on. Prints the gains over plain CLIP of
the methods that matter most, with their 95 % intervals, and writes every figure as JSON."""
EXAMPLES = """\
examples:
  hf-vs2 evaluate --checkpoint outputs/sae-cifar100 --dataset uoft-cs/cifar100 --split test \\
      --image_column img --label_column fine_label --reference_split train
  hf-vs2 evaluate --checkpoint outputs/sae --dataset photos/ --templates ensemble --gate 0.95 \\
      --output results.json

Activations are extracted once: other templates, methods or steering settings take seconds."""


def add_flags(parser: Parser) -> None:
    parser.section("what to compare")
    flags.add_checkpoint(parser)
    parser.flag(
        "--method",
        nargs="+",
        metavar="NAME",
        help="Rows of the table, such as vs2, vs2+gate, prototypes (docs/label-free.md); plain CLIP is always there "
        "[the usual ones].",
    )
    parser.section("images")
    flags.add_dataset(parser)
    flags.add_label_column(parser, ".", default="label")
    parser.flag(
        "--reference_dataset",
        metavar="D",
        help="Unlabelled images for distribution norm's image mean [the checkpoint's].",
    )
    parser.flag("--reference_split", metavar="S", help="Their split. Without both flags: the checkpoint's mean.")
    parser.flag(
        "--few_shot",
        kind=whole(1, 1_000_000),
        metavar="K",
        help="Give K labelled images a class to a linear probe, Tip-Adapter and nearest class mean; all rows are "
        "measured on the rest.",
    )
    parser.section("prompts")
    flags.add_labels(parser, "the data set's", templates=["single", "ensemble"], of_classes=True)
    flags.add_steering(parser)
    parser.section("output")
    parser.flag("--all", action="store_true", help="Print the rows of all methods, not of the six that matter most.")
    parser.flag("--output", writes="file", metavar="JSON", help="Result file [CHECKPOINT/results.json].")
    flags.add_progress(parser)
    parser.section("extraction of activations")
    flags.add_extraction(parser, beside_checkpoint=True)
    flags.add_speed(parser)


keeps = steps.activations_beside


def run(args: Namespace) -> None:
    import torch

    from ...evaluation.comparison import evaluate
    from ...evaluation.table import terminal_table
    from ...files.checkpoint_folder import RESULTS_NAME
    from ...files.sharing.model_card import write_model_card

    _check_prompts(args)
    check_writable(_result_path(args), "--output", is_folder=False)
    model, tokenizer, image_processor = steps.load_steered_clip(args)
    model.set_steering(**steps.steering_from(args))
    # One row through the tail: what cannot be replayed on cached rows is refused before hours of extraction.
    with torch.inference_mode():
        model.image_features_from_cls(torch.zeros(1, model.sae.config.hidden_size))
    reference_args = _reference_args(args)
    reference_images = None if reference_args is None else steps.open_dataset(reference_args)
    labels, store = steps.open_rows(args, model, image_processor, tokenizer=tokenizer, all_labelled=True)
    reference = None
    if reference_args is not None:
        cache = steps.activations_beside(args)
        reference = steps.extract(reference_args, model.clip, reference_images, cache, image_processor=image_processor)
    if not steps.join_processes().is_main_process:  # they have shared the extraction; the rest takes seconds
        return
    result = evaluate(
        model,
        store,
        None,
        labels,
        tokenizer,
        templates=args.templates,
        methods=args.method,
        reference_rows=reference,
        few_shot=args.few_shot,
        meta={"checkpoint": args.checkpoint},
        clean=not args.names_as_given,
        progress=not args.disable_tqdm,
    )
    try:
        places = {"results": result.to_json(_result_path(args)), "activations": store.path}
        folder = Path(args.checkpoint, args.subfolder or "")
        if places["results"] == folder / RESULTS_NAME:
            places["model card"] = write_model_card(folder)  # which shows them from now on
    finally:  # shown in any case
        say(terminal_table(result, every_row=args.all or args.method is not None))
    say_written(places)


def _check_prompts(args: Namespace) -> None:
    """Refuse unknown methods, templates and doubled class names before anything long begins."""
    from ...data.labels.prompts import resolve_templates
    from ...evaluation.methods import check_methods

    check_methods(args.method or ())
    for templates in args.templates:
        resolve_templates(templates)
    steps.labels_from(args)


def _reference_args(args: Namespace) -> Namespace | None:
    """The flags as they are for the unlabelled training images, if flags name some."""
    if args.reference_dataset is None and args.reference_split is None:
        return None
    wanted = Namespace(**vars(args))
    wanted.split, wanted.label_column = args.reference_split, None
    if args.reference_dataset is not None:
        wanted.dataset, wanted.dataset_config, wanted.dataset_revision = args.reference_dataset, None, None
    return wanted


def _result_path(args: Namespace) -> Path:
    from ...files.checkpoint_folder import RESULTS_NAME

    if args.output is not None:
        return args.output
    folder = Path(args.checkpoint, args.subfolder or "")
    return Path(folder if folder.is_dir() else "", RESULTS_NAME)
