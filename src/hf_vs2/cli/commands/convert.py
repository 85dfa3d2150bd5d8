"""`hf-vs2 convert`."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from ...config.schema import number, whole
from .. import steps
from ..output import say, say_written
from ..parsing import Parser, UsageError
from ..places import refuse_other_model


if TYPE_CHECKING:
    from ...sae.modeling import SAEModel

OWN = "hf_vs2"
SOURCES = ("sparsify", "sae_lens", "prisma", OWN)
TARGETS = (OWN, "sparsify", "sae_lens")

USAGE = "SOURCE --output_dir O [--from FORMAT] [--to FORMAT] [options]"
DESCRIPTION = """\
Turns an SAE that another library trained into a checkpoint of ours with the same encode and decode, or ours into
one that another library loads. What a top-k SAE can't compute exactly is refused. Pickles are not opened where
they hold more than tensors."""
EXAMPLES = """\
examples:
  hf-vs2 convert checkpoints/run/vision_model.encoder.layers.11 --base_model openai/clip-vit-base-patch32 \\
      --output_dir outputs/sae
  hf-vs2 convert outputs/sae-cifar100 --to sae_lens --output_dir outputs/sae-lens

A converted SAE has no gate until it has been calibrated (the command calibrate) on images like those it will see."""


def add_flags(parser: Parser) -> None:
    parser.section("what and where")
    parser.flag("source", metavar="SOURCE", help="Folder or Hub id of the checkpoint.")
    parser.flag(
        "--output_dir",
        "--output",
        writes="folder",
        required=True,
        metavar="O",
        help="Folder of the converted checkpoint.",
    )
    parser.flag("--from", dest="source_format", choices=SOURCES, help="Format of SOURCE [what its files say].")
    parser.flag("--to", dest="target_format", choices=TARGETS, default=OWN, help="Format to write.")
    parser.flag("--revision", help="Branch, tag or commit of a checkpoint on the Hub.")
    parser.flag("--subfolder", help="Folder of the checkpoint in its repository.")
    parser.flag("--weights_name", metavar="FILE", help="Prisma: file of the weights, where there are several.")
    parser.section("what the files of other libraries do not tell")
    parser.flag("--base_model", metavar="M", help="CLIP whose activations the SAE reads: Hub id or folder.")
    parser.flag("--base_model_revision", help="Its branch, tag or commit.")
    parser.flag(
        "--layer", kind=whole(0, 1000), metavar="N", help="Encoder layer whose output it reads, from 0 [the last]."
    )
    parser.flag(
        "--scaling_factor",
        kind=number(above=0),
        metavar="X",
        help="SAELens, Prisma: the constant that activations were multiplied by (expected_average_only_in).",
    )


def run(args: Namespace) -> None:
    place = steps.checkpoint_place(args)
    source_format = args.source_format or _detect(args.source, place)
    if source_format == args.target_format:
        raise UsageError(f"{args.source} is of {source_format} already: name another format with --to")
    if args.target_format == OWN:
        refuse_other_model(args.output_dir)
    sae = _load(args, source_format, place)
    if args.target_format == OWN:
        sae.save_pretrained(args.output_dir)
    else:
        getattr(sae, f"save_{args.target_format}")(args.output_dir)
    config = sae.config
    say(
        f"{args.source} ({source_format}): {config.hidden_size:,} inputs, {config.num_latents:,} latents, "
        f"top_k {config.top_k:,}, {config.activation}."
    )
    say_written({f"{args.target_format} checkpoint": args.output_dir})


def _detect(source: str, place: dict[str, Any]) -> str:
    from ...files.foreign import detect

    try:
        return detect(source, place)
    except ValueError as error:
        raise UsageError(f"{error} (--from {', '.join(SOURCES)})") from error


def _load(args: Namespace, source_format: str, place: dict[str, Any]) -> SAEModel:
    from ...sae.modeling import SAEModel

    told = ("base_model", "base_model_revision", "layer", "scaling_factor", "weights_name")
    options = {name: getattr(args, name) for name in told if getattr(args, name) is not None}
    allowed = {OWN: told[:0], "sparsify": told[:3], "sae_lens": told[:4], "prisma": told}[source_format]
    for name in options:
        if name not in allowed:
            raise UsageError(f"--{name} is not for a checkpoint of {source_format}")
    if source_format == OWN:
        return SAEModel.from_pretrained(args.source, **place)
    if "base_model" in options:
        options["base_model_name_or_path"] = steps.local_or_id(options.pop("base_model"))
    return getattr(SAEModel, f"from_{source_format}")(args.source, **options, **place)
