"""`hf-vs2 study`."""

from __future__ import annotations

import os
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...config.schema import TEXT
from .. import flags
from ..output import say, say_written
from ..parsing import Parser, UsageError
from ..places import check_writable


USAGE = "CONFIG [options]"
DESCRIPTION = """\
Runs the study that a YAML file describes: extracts activations, trains SAEs, and evaluates encoders x data sets x
seeds x methods x prompts and the ablations beside them. Writes one JSON file, one Markdown table laid out like the
paper's, and figures. Each finished cell is kept: run the same command again to continue."""
EXAMPLES = """\
examples:
  hf-vs2 study examples/studies/paper.yaml
  hf-vs2 study examples/studies/paper.yaml --datasets cifar100 --disable_tqdm"""


def add_flags(parser: Parser) -> None:
    parser.section("what to run")
    parser.flag("config_file", metavar="CONFIG", help="YAML file of the study, see docs/study.md.")
    parser.flag(
        "--datasets",
        nargs="+",
        default=(),
        metavar="NAME",
        help="Only these of its data sets, to share the work [all].",
    )
    parser.flag("--output_dir", metavar="O", kind=TEXT, help="Folder of the study, instead of the one in CONFIG.")
    parser.flag("--no_figures", action="store_true", help="Tables only; figures need matplotlib.")
    flags.add_progress(parser)


def run(args: Namespace) -> None:
    import datasets

    from ...evaluation.table import wrapped
    from ...study.config import StudyConfig
    from ...study.documents.reports import REPORTS_NAME
    from ...study.drawings.figures import draw_figures
    from ...study.results.cells import RESULTS_NAME
    from ...study.run import TABLE_NAME, run_study

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("a study runs in one process; share it between machines with --datasets")
    if not args.no_figures and find_spec("matplotlib") is None:
        raise UsageError("figures need matplotlib: pip install matplotlib, or give --no_figures")
    if args.disable_tqdm:
        datasets.disable_progress_bars()
    config = StudyConfig.from_yaml(args.config_file, output_dir=args.output_dir)
    check_writable(config.output_dir, "--output_dir")
    result = run_study(config, datasets=args.datasets or (), progress=not args.disable_tqdm)
    folder = Path(config.output_dir)
    for line in (folder / TABLE_NAME).read_text(encoding="utf-8").splitlines():
        say(*([line] if line.startswith("|") else wrapped(line) or [""]))
    places: dict[str, Any] = {
        "results": folder / RESULTS_NAME,
        "reports": folder / REPORTS_NAME,
        "table": folder / TABLE_NAME,
    }
    if not args.no_figures:
        figures = draw_figures(result, folder / "figures")
        places["figures"] = f"{folder / 'figures'} ({len(figures)} files)"
    say_written(places)


def keeps(args: Namespace) -> Any:
    return args.output_dir or "the folder of the study"
