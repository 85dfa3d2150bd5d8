"""`hf-vs2 classify`."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config.schema import whole
from ..common import (
    BATCH,
    add_checkpoint_flags,
    add_label_flags,
    add_steering_flags,
    labels_from,
    load_classifier,
    say,
    say_json,
    say_written,
    steering_from,
)
from ..parsing import Parser


if TYPE_CHECKING:
    from ...data.inputs import NamedImage

USAGE = "IMAGE... --checkpoint O --labels NAME... [options]"
DESCRIPTION = """\
Labels images with a steered CLIP. Prints for each image the label and its score, plain CLIP's label, how badly the SAE
reconstructs the image (FVU; for methods that do not read it, the distance to the training images), and whether it was steered."""
EXAMPLES = """\
examples:
  hf-vs2 classify photo.jpg photos/ --checkpoint outputs/sae-cifar100 \\
      --labels bus forest "oak tree"
  hf-vs2 classify photos/ --checkpoint user/sae-cifar100 --labels labels.txt \\
      --templates ensemble --top_k 3 --json"""


def add_flags(parser: Parser) -> None:
    parser.section("images")
    parser.flag("images", nargs="+", metavar="IMAGE", help="Files, folders (searched for images) or URLs.")
    parser.flag("--on_error", choices=("raise", "skip"), default="raise", help="What to do at an unreadable image.")
    parser.section("model and prompts")
    add_checkpoint_flags(parser)
    add_label_flags(parser)
    parser.flag("--batch_size", type=int, kind=BATCH, default=64, help="Images per forward pass.")
    add_steering_flags(parser, method=True)
    parser.section("output")
    parser.flag("--top_k", type=int, kind=whole(1), default=1, help="How many labels to give for each image.")
    parser.flag("--json", action="store_true", help="Print JSON instead of a table.")
    parser.flag("--output", type=Path, writes="file", metavar="JSON", help="Write JSON to this file, too.")


def run(args: Namespace) -> None:
    from transformers.utils import logging

    from ...data.labels.lists import names_in
    from ...data.labels.prompts import resolve_templates
    from ...files.json_files import write_json

    labels = names_in(labels_from(args) or [])
    resolve_templates(args.templates)
    names = list(_image_names(args.images, args.on_error))
    classifier = load_classifier(args)
    images = _Images(names, skip=args.on_error == "skip")
    answers = classifier(
        iter(images),
        candidate_labels=labels,
        templates=args.templates,
        clean=not args.names_as_given,
        top_k=args.top_k,
        return_details=True,
        batch_size=args.batch_size,
        **steering_from(args, method=True),
    )
    results = [{"image": name} | answer for answer, name in zip(list(answers), images.readable, strict=True)]
    if not results:
        raise ValueError("none of the images can be read")
    if len(results) < len(names):
        lost = len(names) - len(results)
        logging.get_logger(__name__).warning(f"{lost} of {len(names)} images could not be read and were skipped.")
    try:
        if args.output is not None:
            write_json(args.output, results)
    finally:  # shown in any case
        say_json(results) if args.json else say(_table(results))
    if args.output is not None and not args.json:
        say_written({"results": args.output})


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


class _Images:
    """Opens images one after another, and remembers which could be read."""

    def __init__(self, names: Sequence[str], skip: bool):
        self.names, self.skip = names, skip
        self.readable: list[str] = []

    def __iter__(self) -> Iterator[NamedImage]:
        from transformers.utils import logging

        from ...data.images import UnreadableImageError, open_image
        from ...data.inputs import NamedImage

        for name in self.names:
            try:
                image = open_image(name)
            except UnreadableImageError as error:
                if not self.skip:
                    raise ValueError(f"{error}; leave such images out with --on_error skip") from error
                logging.get_logger(__name__).warning(f"Skipped: {error}")
                continue
            self.readable.append(name)
            yield NamedImage(image, name)


def _table(results: Sequence[dict[str, Any]]) -> str:
    from ...data.images import LONGEST_NAME, one_line

    by_distance = "distance" in results[0]
    rows = [["image", "label", "plain CLIP", "distance" if by_distance else "FVU", "steered"]]
    for result in results:
        # One value an SAE, where there are several.
        measured = result["distance" if by_distance else "fvu"]
        fvu, steered = (value if isinstance(value, list) else [value] for value in (measured, result["steered"]))
        rows.append(
            [
                result["image"],
                _answer(result["predictions"]),
                _answer(result["plain"][:1]),
                " ".join("-" if value is None else f"{value:.3f}" for value in fvu),
                " ".join("yes" if value else "no" for value in steered),
            ]
        )
    rows = [[one_line(cell[:LONGEST_NAME]) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _answer(predictions: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{item['label']} {item['score']:.3f}" for item in predictions)
