"""`hf-vs2 adapt`."""

from __future__ import annotations

import shlex
from argparse import Namespace
from operator import attrgetter
from pathlib import Path

from .. import flags, steps
from ..output import say, say_written
from ..parsing import Parser, UsageError


USAGE = "--model M --dataset D --labels NAME... --output_dir O [options]"
DESCRIPTION = """\
From a folder of unlabelled images and the labels to choose from to a checkpoint that answers by the method that suits
them, or by plain CLIP where no method does. Five steps: CLIP reads the images, a sparse autoencoder is trained, a
method is chosen, its answers are compared with plain CLIP's, and report.html says what was chosen, why, what it
changes and what is not known. Run again, it repeats nothing; interrupted, it resumes."""
EXAMPLES = """\
examples:
  hf-vs2 adapt --model openai/clip-vit-base-patch32 --dataset photos/ --labels cat dog horse \\
      --output_dir adapted
  hf-vs2 adapt --model openai/clip-vit-base-patch32 --dataset photos/ --labels cat dog horse \\
      --output_dir adapted --checked adapted/to_label.csv

The second decides by labels: fill in the column `label` of to_label.csv first."""


def add_flags(parser: Parser) -> None:
    parser.section("what to adapt to")
    flags.add_model(parser)
    flags.add_dataset(parser)
    flags.add_labels(parser)
    parser.flag(
        "--checked",
        type=Path,
        metavar="CSV",
        help="Table with the columns file and label, such as to_label.csv filled in: a paired test on these "
        "images decides.",
    )
    parser.section("output")
    parser.flag(
        "--output_dir",
        required=True,
        writes="folder",
        help="Folder for the checkpoint, report.html, report.json, to_label.csv and labels.json.",
    )
    parser.flag("--overwrite_output_dir", action="store_true", help="Replace what is there of other images.")
    flags.add_seed(parser, 42, "Of the training, and of the draw of images to label.")
    flags.add_progress(parser)
    parser.section("extraction of activations")
    flags.add_extraction(parser)
    flags.add_speed(parser)


keeps = attrgetter("output_dir")


def run(args: Namespace) -> None:
    from ...adaptation import adapt
    from ...adaptation.names import PAGE_NAME, REPORT_NAME, TO_LABEL_NAME
    from ...adaptation.report import told
    from ...data.labels.lists import names_in
    from ...data.labels.prompts import resolve_templates
    from ...files.json_files import read_json

    if args.streaming:
        raise UsageError("adapt reads images more than once: leave out --streaming")
    labels = names_in(steps.labels_from(args) or [])
    resolve_templates(args.templates)
    adapt(
        args.model,
        steps.open_dataset(args),
        labels,
        args.output_dir,
        templates=args.templates,
        checked=args.checked,
        revision=args.revision,
        model_dtype=args.model_dtype,
        fast_decode=args.fast_decode,
        seed=args.seed,
        clean=not args.names_as_given,
        overwrite_output_dir=args.overwrite_output_dir,
        source=args.dataset,
        **steps.reading(args),
        command=_again(args.argv),
    )
    report = read_json(args.output_dir / REPORT_NAME)
    say(*told(report))
    say_written(
        {
            "report": args.output_dir / PAGE_NAME,
            "as JSON": args.output_dir / REPORT_NAME,
            "checkpoint": args.output_dir,
            "to label": args.output_dir / TO_LABEL_NAME,
        }
    )
    for step in report["next"]:
        say("", step["what"], f"  {step['command']}")


def _again(argv: list[str]) -> str:
    """The command as it was given, without the labels that were checked and without what holds for one run."""
    words, skip = ["hf-vs2"], False
    for word in argv:
        if skip:
            skip = False
        elif word == "--checked":
            skip = True
        elif not word.startswith("--checked=") and word.replace("-", "_") != "__overwrite_output_dir":
            words.append(word)
    return shlex.join(words)
