"""`hf-vs2 recommend`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from .. import flags, steps
from ..next_steps import after_recommendation
from ..output import say, say_written
from ..parsing import Parser, UsageError


USAGE = "--checkpoint O --dataset D --labels NAME... [options]"
DESCRIPTION = """\
Recommends a method for your images and labels, and says why. Without labels: anchored prototypes, where the images
bear out what CLIP says of them, else plain CLIP. With labels of some images (--label_column) all methods are
compared on them, and a paired test decides; it says how large a difference it would have found. Label 100 images,
know. --apply writes the method into the checkpoint, for classify, explain and the Space."""
EXAMPLES = """\
examples:
  hf-vs2 recommend --checkpoint outputs/sae-photos --dataset photos/ --labels cat dog horse
  hf-vs2 recommend --checkpoint outputs/sae-cifar100 --dataset uoft-cs/cifar100 --split test \\
      --image_column img --label_column fine_label --output recommendation.json
  hf-vs2 recommend --checkpoint outputs/sae-photos --dataset checked/ --label_column label --apply

How often it is right, and what it costs when it is not: docs/recommend.md."""


def add_flags(parser: Parser) -> None:
    parser.section("what to recommend for")
    flags.add_checkpoint(parser)
    flags.add_labels(parser, "those of --label_column")
    parser.section("images")
    flags.add_dataset(parser)
    flags.add_label_column(parser, "; -1 is none. Without it no label is read.")
    parser.section("output")
    parser.flag(
        "--output", writes="file", metavar="JSON", help="Write the recommendation and its evidence to this file, too."
    )
    parser.flag(
        "--apply", action="store_true", help="Write the method into the checkpoint, which is used from then on."
    )
    flags.add_progress(parser)
    parser.section("extraction of activations")
    flags.add_extraction(parser, beside_checkpoint=True)


keeps = steps.activations_beside


def run(args: Namespace) -> None:
    from ...data.labels.lists import names_in
    from ...data.labels.prompts import class_embeddings, resolve_templates
    from ...evaluation.recommendation import apply_method, recommend

    if args.labels is None and args.label_column is None:
        raise UsageError("name the labels to choose from with --labels")
    if args.apply and not Path(args.checkpoint, args.subfolder or "").is_dir():
        raise UsageError(
            f"{args.checkpoint} is no folder here, and --apply writes into the checkpoint: download it first"
        )
    steps.labels_from(args)
    resolve_templates(args.templates)
    model, tokenizer, image_processor = steps.load_steered_clip(args)
    labels, store = steps.open_rows(args, model, image_processor, tokenizer=tokenizer)
    if not steps.join_processes().is_main_process:  # they have shared the extraction; the rest takes seconds
        return
    names = store.class_names if labels is None else labels
    assert names is not None  # `steps.labels_from` has looked
    classes = class_embeddings(model.clip, tokenizer, names_in(names), args.templates, clean=not args.names_as_given)
    advice = recommend(model, store, classes, store.labels, class_names=names)
    places = {"activations": store.path}
    try:
        if args.output is not None:
            places = {"recommendation": advice.to_json(args.output), **places}
    finally:  # shown in any case
        say(str(advice))
    if args.apply and advice.calibrate_first:
        say("Not applied: it holds once the checkpoint is calibrated on these images.")
    elif args.apply:
        folder = Path(args.checkpoint, args.subfolder or "")
        apply_method(model, advice.method, folder)
        places = {"checkpoint": folder, **places}
    say_written(places)
    say("", *after_recommendation(args, advice.method, advice.calibrate_first, names_in(names)))
    if not advice.candidates:
        say("To know: label 100 of the images, and run this again with --dataset and --label_column for them.")
