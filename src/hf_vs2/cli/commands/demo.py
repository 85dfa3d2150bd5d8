"""`hf-vs2 demo`."""

from argparse import Namespace
from pathlib import Path

from .. import flags
from ..next_steps import command
from ..output import say
from ..parsing import Parser


USAGE = "[--output_dir DIR]"
DESCRIPTION = """\
The whole way on bundled material: a tiny CLIP that has only seen typefaces meets real handwritten digits.
Extracts, trains, calibrates, compares every method on images that the SAE has not seen, and draws a picture. Needs
the demo extra; no network."""
EXAMPLES = """\
examples:
  hf-vs2 demo
  hf-vs2 demo --output_dir outputs/demo --seed 1"""


def add_flags(parser: Parser) -> None:
    parser.section("demo")
    parser.flag("--output_dir", writes="folder", default=Path("hf_vs2_demo"), help="Where everything goes.")
    flags.add_seed(parser, 0, "Of the folds, the SAEs and the foreign images.")
    flags.add_progress(parser)


def run(args: Namespace) -> None:
    from ...demo.data import DIGIT_NAMES
    from ...demo.run import run_demo

    result = run_demo(args.output_dir, seed=args.seed, progress=not args.disable_tqdm)
    say(str(result))
    image, names = result.output_dir / "digit.png", list(DIGIT_NAMES)
    say("", f"Next: {command('classify', image, checkpoint=result.sae_path, labels=names)}")
