"""`hf-vs2 classify`."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ...config.schema import whole
from .. import flags, steps
from ..answers import Summary, Table, csv_columns, flat, say_beside_bar, shown_names, with_change
from ..output import say_json
from ..parsing import Parser
from ..row_file import ROW_SUFFIXES, RowFile


USAGE = "IMAGE... --checkpoint O [--labels NAME...] [options]"
DESCRIPTION = """\
Labels images with a steered CLIP. Prints for each image the label and its score, plain CLIP's label, how badly the
SAE reconstructs the image (FVU; for methods that do not read it, the distance to the training images), whether it
was steered, and * where the label is another than plain CLIP's; one line an image, with --top_k the next labels at
its end. Images in a folder are named relative to it. What was counted follows on the error stream."""
EXAMPLES = """\
examples:
  hf-vs2 classify photo.jpg photos/ --checkpoint outputs/sae-cifar100 \\
      --labels bus forest "oak tree"
  hf-vs2 classify photos/ --checkpoint user/sae-cifar100 --labels labels.txt \\
      --templates ensemble --output answers.csv
  hf-vs2 classify photos/ --checkpoint adapted

Without --labels, a checkpoint that adapt wrote is asked as adapt was.

A .csv or .jsonl file is written as answers come, and continued when the same command runs again."""


def add_flags(parser: Parser) -> None:
    parser.section("images")
    parser.flag("images", nargs="+", metavar="IMAGE", help="Files, folders (searched for images) or URLs.")
    flags.add_on_error(parser)
    parser.section("model and prompts")
    flags.add_checkpoint(parser)
    flags.add_labels(parser, flags.REMEMBERED, templates=None)
    parser.flag("--batch_size", kind=flags.BATCH, default=64, help="Images per forward pass.")
    flags.add_speed(parser)
    flags.add_steering(parser, method=True)
    parser.flag(
        "--reject",
        action="store_true",
        help="Answer 'none of these labels' below the threshold that hf-vs2 adapt measured (docs/adapt.md).",
    )
    parser.section("output")
    parser.flag("--top_k", kind=whole(1), default=1, help="How many labels to give for each image.")
    parser.flag("--json", action="store_true", help="Print JSON instead of a table.")
    parser.flag(
        "--output",
        writes="file",
        metavar="FILE",
        help="Write the answers to this file, too: .csv or .jsonl (a row an image, as they come), else a JSON array.",
    )
    flags.add_progress(parser)


def run(args: Namespace) -> None:
    from ...adaptation.in_use import NONE_OF_THESE, Familiarity, rejected, rejection_threshold
    from ...data.images import one_line
    from ...data.inputs import NamedImage, NamedImages
    from ...data.labels.prompts import resolve_templates
    from ...files.json_files import write_json
    from ...files.progress import progress_bar

    labels, asked, clean = steps.labels_and_prompts(args)
    templates = resolve_templates(asked)
    names = list(_image_names(args.images, args.on_error))
    threshold = None
    if args.reject:
        threshold = rejection_threshold(args.checkpoint, steps.checkpoint_place(args), labels, templates, clean)
    classifier = steps.load_classifier(args)
    familiarity = Familiarity(classifier, labels, templates, clean)
    summary, results = Summary(), []
    with ExitStack() as stack:
        file = stack.enter_context(_row_file(args, labels, templates, clean)) if _grows(args) else None
        if file is not None:
            names = summary.missing(names, file.rows())
        shown = dict(zip(names, map(one_line, shown_names(names, args.images)), strict=True))
        table = (
            None
            if args.json
            else Table([*shown.values()], [*map(one_line, labels), *([NONE_OF_THESE] if args.reject else [])])
        )
        images = NamedImages([NamedImage(name) for name in names], skip=args.on_error == "skip")
        answers = classifier(
            images,
            candidate_labels=labels,
            templates=asked,
            clean=clean,
            top_k=args.top_k,
            return_details=True,
            batch_size=args.batch_size,
            **steps.steering_from(args, method=True),
        )
        bar = progress_bar(
            shown=not args.disable_tqdm and len(names) > args.batch_size,  # one batch is no wait
            desc="Classifying",
            initial=summary.images,
            total=summary.images + len(names),
            unit=" images",
        )
        stack.callback(bar.close)
        # What was left out before an answer is known when it comes.
        names_read = (name for place, name in enumerate(names) if place not in images.unreadable)
        for answer in _naming_the_flag(answers):
            answer = with_change({"image": next(names_read)} | answer)
            familiarity.add(answer)
            if threshold is not None:
                answer = rejected(answer, threshold)
            summary.add(answer)
            if file is None:
                results.append(answer)
            else:
                file.append(flat(answer) if file.is_csv else answer)
            if table is not None:
                say_beside_bar(list(table.lines(shown[answer["image"]], answer)), bar)
            bar.update()
    if not summary.images:
        raise ValueError("none of the images can be read")
    try:
        if args.output is not None and file is None:
            write_json(args.output, results)
    finally:  # shown in any case
        if args.json:
            say_json(results if file is None else list(file.rows()))
    print("", *summary.lines(len(images.unreadable)), sep="\n", file=sys.stderr)  # the table alone is the output
    if args.output is not None:
        print(f"The answers are written to {args.output}.", file=sys.stderr)
    if others := familiarity.sentence():
        print(others, file=sys.stderr)


def _naming_the_flag(answers: Iterable[Any]) -> Iterator[Any]:
    from ...data.images import UnreadableImageError

    try:
        yield from answers
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{error}; leave such images out with --on_error skip") from error


def _grows(args: Namespace) -> bool:
    return args.output is not None and args.output.suffix.lower() in ROW_SUFFIXES


def _row_file(args: Namespace, labels: Sequence[str], templates: Sequence[str], clean: bool) -> RowFile:
    """`--output` with the settings that decide its answers."""
    settings = {
        "checkpoint": _checkpoint_state(args),
        "clip": None if args.clip is None else steps.local_or_id(args.clip),
        "labels": labels,
        "names_as_given": not clean,
        "templates": templates,
        "top_k": args.top_k,
        "steering": steps.steering_from(args, method=True),
        **({"reject": True} if args.reject else {}),
        **({} if args.model_dtype == "auto" else {"model_dtype": args.model_dtype}),
        **({"fast_decode": True} if args.fast_decode else {}),
    }
    return RowFile(args.output, csv_columns(min(args.top_k, len(labels))), settings)


def _checkpoint_state(args: Namespace) -> Any:
    """What changes when the checkpoint does: digests of its files here, or its commit on the Hub."""
    from ...files.checkpoint_folder import TENSOR_FILES
    from ...files.digests import file_digest
    from ...files.place import at_one_commit

    folder = Path(args.checkpoint, args.subfolder or "")
    if not folder.is_dir():
        return at_one_commit(args.checkpoint, steps.checkpoint_place(args))["revision"]
    paths = [path for pattern in ("config.json", *TENSOR_FILES) for path in sorted(folder.glob(pattern))]
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in paths}


def keeps(args: Namespace) -> Path | None:
    return args.output if _grows(args) and args.output.exists() else None


def _image_names(given: Sequence[str], on_error: str = "raise") -> Iterator[str]:
    """Files and URLs as they are; folders replaced by the images in them."""
    from ...data.folders.listing import list_images

    for name in given:
        if not os.path.isdir(name):
            yield name
            continue
        inside = list_images(name, on_error)
        if not inside.files:
            found = inside.describe_left_out()
            raise ValueError(f"the folder {name} holds no image" + (f", but {found}" if found else ""))
        inside.say_left_out()
        yield from map(inside.path, inside.files)
