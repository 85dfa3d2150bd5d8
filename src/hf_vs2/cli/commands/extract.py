"""`hf-vs2 extract`."""

from argparse import Namespace
from operator import attrgetter

from .. import flags, steps
from ..output import say, say_written
from ..parsing import Parser


USAGE = "--model M --dataset D [--split S] --output_dir O [options]"
DESCRIPTION = """\
CLS activations of a set of images, at one or several layers of a frozen CLIP, on disk. A second run with the same
request finds them and reads no image; an interrupted one continues."""
EXAMPLES = """\
examples:
  hf-vs2 extract --model openai/clip-vit-base-patch32 --dataset uoft-cs/cifar100 --split train \\
      --image_column img --output_dir outputs/activations
  hf-vs2 extract --model M --dataset photos/ --layers -1 -2 -3 --num_workers 8 --on_error skip \\
      --output_dir outputs/activations

OUTPUT_DIR holds one folder a request: use the same one for several splits, models and layers."""


def add_flags(parser: Parser) -> None:
    parser.section("what to read")
    flags.add_model(parser)
    flags.add_dataset(parser)
    flags.add_label_column(parser, ", to keep beside the activations.")
    parser.section("activations")
    parser.flag("--output_dir", writes="folder", required=True, help="Cache root for activations.")
    parser.flag(
        "--layers",
        kind=flags.LAYER,
        nargs="+",
        default=[-1],
        help="Encoder layers from 0; negative ones from the last.",
    )
    flags.add_extraction(parser)
    flags.add_speed(parser)
    flags.add_progress(parser)


keeps = attrgetter("output_dir")


def run(args: Namespace) -> None:
    dataset = steps.open_dataset(args)
    store = steps.extract(
        args,
        steps.local_or_id(args.model),
        dataset,
        args.output_dir,
        layers=args.layers,
        label_column=args.label_column,
        revision=args.revision,
        model_dtype=args.model_dtype,
        fast_decode=args.fast_decode,
    )
    skipped = len(store.metadata["skipped"])
    say(
        f"{len(store):,} rows of width {store.hidden_size}, layers {' '.join(map(str, store.layers))}, "
        f"{store.metadata['dtype']}" + (f"; {skipped} unreadable images skipped" if skipped else "")
    )
    say_written({"activations": store.path})
    say("", f'In Python: hf_vs2.ActivationStore.open("{store.path}")')
