"""`hf-vs2 explain`."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config.schema import whole
from .. import flags, steps
from ..output import say, say_json, say_written
from ..parsing import Parser
from ..places import check_writable


if TYPE_CHECKING:
    from ...config.latent_edits import LatentEdits
    from ...explain.explanation import VS2Explanation

USAGE = "IMAGE --checkpoint O [--labels NAME...] [options]"
DESCRIPTION = """\
Shows which latents moved which label's score by how much on one image: a table, and a picture with the
probabilities before and after. Latents can be named by the words of a vocabulary or by an atlas, and changed by
hand."""
EXAMPLES = """\
examples:
  hf-vs2 explain photo.jpg --checkpoint outputs/sae-cifar100 \\
      --labels bus forest "oak tree" --vocabulary words.txt
  hf-vs2 explain photo.jpg --checkpoint user/sae-cifar100 --labels labels.txt \\
      --names atlas/latents.json --suppress 17 204 --set 31=2.5 --output why.png"""


def add_flags(parser: Parser) -> None:
    parser.section("image")
    parser.flag("image", metavar="IMAGE", help="File or URL.")
    parser.section("model and prompts")
    flags.add_checkpoint(parser)
    flags.add_labels(parser, flags.REMEMBERED, templates=None)
    parser.section("names of latents")
    parser.flag("--vocabulary", type=Path, metavar="FILE", help="Words to name them by, one a line.")
    parser.flag(
        "--names", type=Path, metavar="FILE", help="The latents.json of an atlas, or a JSON object of names by latent."
    )
    flags.add_steering(parser)
    parser.section("latents changed by hand")
    parser.flag("--amplify", nargs="+", type=_pair, metavar="LATENT=FACTOR", help="Multiply their values.")
    parser.flag("--suppress", nargs="+", kind=whole(0), metavar="LATENT", help="Make their values 0.")
    parser.flag("--set", nargs="+", type=_pair, metavar="LATENT=VALUE", help="Make their values these.")
    parser.section("output")
    parser.flag(
        "--output",
        writes="file",
        help="The picture, a .png, .svg or .pdf file [explanation.png; none with --json or without matplotlib].",
    )
    parser.flag("--top_labels", kind=whole(1), default=3, metavar="N", help="Labels whose scores are taken apart.")
    parser.flag("--top_latents", kind=whole(1), default=6, metavar="N", help="Latents listed for each of them.")
    parser.flag("--json", action="store_true", help="Print JSON, of all labels, instead of a table.")


def run(args: Namespace) -> None:
    from transformers.utils import logging

    from ...data.images import open_image
    from ...explain.figure import as_clip_sees, draw_explanation, leading_labels
    from ...explain.inputs import resolve_names
    from ...explain.latent_names import read_vocabulary
    from ...files.figure_style import check_drawing

    if args.vocabulary is not None and args.names is not None:
        raise ValueError("--vocabulary and --names exclude each other: give one of them")
    labels, templates, clean = steps.labels_and_prompts(args)
    edits = _edits(args)
    vocabulary = None if args.vocabulary is None else read_vocabulary(args.vocabulary)
    names = None if args.names is None else resolve_names(args.names)
    drawn = args.output
    if drawn is None and not args.json and find_spec("matplotlib") is not None:
        drawn = Path("explanation.png")
    if drawn is not None:
        check_writable(drawn, "--output", is_folder=False)
        check_drawing(drawn)
    picture = open_image(args.image)
    model, *processor = steps.load_steered_clip(args)
    settings = steps.steering_from(args) | ({} if edits is None else {"edits": edits})
    model.set_steering(**settings)
    explanation = model.explain(
        picture, labels, processor=processor, templates=templates, names=names, vocabulary=vocabulary, clean=clean
    )
    name = args.image.rsplit("/", 1)[-1]
    if drawn is not None:
        counts = {"num_labels": args.top_labels, "num_latents": args.top_latents}
        draw_explanation(explanation, as_clip_sees(picture, processor[1]), drawn, title=name, **counts)
    if args.json:
        (found,) = explanation.to_dict(args.top_latents)
        say_json({"image": args.image, "picture": None if drawn is None else str(drawn), **found})
        return
    say(*_lines(explanation, name, leading_labels(explanation, args.top_labels), args.top_latents))
    if drawn is None:
        logging.get_logger(__name__).warning("No picture was drawn: that needs matplotlib (pip install matplotlib).")
    else:
        say_written({"picture": drawn})


def _pair(text: str) -> tuple[int, float]:
    latent, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} must be LATENT=NUMBER, such as 17=3")
    return int(latent), float(value)


def _edits(args: Namespace) -> LatentEdits | None:
    from ...config.latent_edits import LatentEdits

    return LatentEdits(args.amplify or (), args.suppress or (), args.set or ()) or None


def _lines(explanation: VS2Explanation, name: str, places: Sequence[int], top: int) -> list[str]:
    from ...data.images import one_line

    (found,) = explanation.to_dict(top)
    state = "steered" if found["steered"] else "not steered: plain CLIP's scores, which no latent moved"
    lines = [f"{name}: FVU {found['fvu']:.3f}, {found['active_latents']} active latents, {state}"]
    for place in places:
        lines += ["", *_block(found["labels"][place], found["steered"])]
    return list(map(one_line, lines))


def _block(parts: dict[str, Any], steered: bool) -> list[str]:
    """A label: its probability before and after, and the way from the plain to the steered score."""
    before, after = parts["plain_probability"], parts["steered_probability"]
    lines = [f"{parts['label']}: probability {before:.3f} -> {after:.3f}"]
    if not steered:
        return lines
    scale = "" if parts["relative_to"] is None else ", less the mean of all labels"
    rows = [("plain CLIP's score" + scale, "", parts["plain"])]
    for latent in parts["latents"]:
        what = f"latent {latent['latent']}" + ("" if latent["name"] is None else f" ({latent['name']})")
        values = f"{latent['value']:.2f} -> {latent['value'] + latent['change']:.2f}"
        rows.append((what, values, latent["contribution"]))
    rows.append(("other latents", "", parts["others"]))
    if parts["replacement"]:
        rows.append(("what no latent does", "", parts["replacement"]))
    rows += [("normalisation", "", parts["normalisation"]), ("steered score", "", parts["steered"])]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return lines + [f"  {what:<{widths[0]}}  {values:>{widths[1]}}  {score:+8.3f}" for what, values, score in rows]
