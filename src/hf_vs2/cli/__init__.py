"""The command line `hf-vs2`: thin doors to the public functions.

A command is a module of this package with `USAGE`, `DESCRIPTION` and `EXAMPLES` (text for its help),
`add_flags(parser)`, `run(args)` and, if the same command continues after an interruption, `keeps(args)`: where what is
finished so far is kept.
Enter it in `COMMANDS`. Modules import what is heavy inside `run`: help and mistakes in the command line need no torch.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from logging import getLogger
from typing import Any

from .faults import fault_of, last_line
from .output import rank
from .parsing import Parser, UsageError, nearest
from .steps import check_places


COMMANDS = {
    "demo": "the whole way on bundled material, offline, in about a minute",
    "adapt": "a better (or honestly unchanged) classifier from images and labels",
    "extract": "CLS activations of a set of images, cached on disk",
    "train": "a sparse autoencoder from unlabelled images, calibrated",
    "calibrate": "measure the gate's thresholds again, on fresh unlabelled images",
    "evaluate": "compare plain CLIP, the controls and VS2 on labelled images",
    "recommend": "which method to use for your images and labels, and why",
    "atlas": "a folder of web pages to browse the latents in, offline",
    "study": "the paper's study, or one of yours, from one file",
    "classify": "label images with a steered CLIP, beside plain CLIP's answer",
    "convert": "an SAE of sparsify, SAELens or ViT-Prisma to ours, or back",
    "explain": "which latents moved which score of an image: table and picture",
    "push": "a checkpoint to the Hub, with a model card",
}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv (`list[str]`, *optional*): the arguments; those of the process by default.

    Returns:
        `int`: the exit status. 0: done; 2: something is wrong with the request, said in one line on stderr; 130:
            interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else ""
    prog = f"hf-vs2 {name}" if name in COMMANDS else "hf-vs2"
    command: Any = None
    args: Namespace | None = None
    try:
        if name not in COMMANDS:
            _without_command(argv)
        command = import_module(f".commands.{name}", __name__)
        parser = parser_of(prog, command)
        args = parser.parse(argv[1:])
        args.argv = argv  # for messages that repeat the command
        check_places(parser, args)
        _run(command, args)
    except SystemExit as finished:  # --help and --version
        return finished.code if isinstance(finished.code, int) else 0
    except KeyboardInterrupt:
        _complain(f"{prog}: interrupted. {_kept(command, args)}")
        return 130
    except BrokenPipeError:  # `hf-vs2 ... | head`: whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        fault = fault_of(error, args)
        if "--debug" in argv:
            traceback.print_exc()
        elif not fault and not _is_expected(error):
            raise
        if fault:
            _complain(f"{prog}: error: {fault} {_kept(command, args)}")
        elif not isinstance(error, UsageError) or rank() == 0:  # all processes read the same command line
            _complain(f"{prog}: error: {_message(error)}")
        return 2
    return 0


def parser_of(prog: str, command: Any) -> Parser:
    """What reads the arguments of a command."""
    parser = Parser(prog, command.USAGE, command.DESCRIPTION, command.EXAMPLES)
    command.add_flags(parser)
    parser.common_flags()
    return parser


def _without_command(argv: Sequence[str]) -> None:
    """`hf-vs2 --help` and `--version`; everything else names no command."""
    from ..version import __version__

    listed = "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items())
    parser = Parser(
        "hf-vs2",
        "COMMAND [options]",
        f"Visual Sparse Steering for CLIP, without labels and without changing its weights.\n\ncommands:\n{listed}",
        "`hf-vs2 COMMAND --help` lists a command's options. Models and data sets are Hub ids or local paths.",
    )
    parser.flag("--version", action="version", version=f"hf_vs2 {__version__}", help="Show the version.")
    parser.flag("-h", "--help", action="help", help="Show this help.")
    if argv and not argv[0].startswith("-"):
        raise UsageError(f"there is no command {argv[0]!r}{nearest(argv[0], COMMANDS)}; see hf-vs2 --help")
    parser.parse(argv)
    raise UsageError(f"name a command: {', '.join(COMMANDS)}; see hf-vs2 --help")


def _run(command: Any, args: Namespace) -> None:
    from tqdm.contrib.logging import logging_redirect_tqdm
    from transformers.utils import logging

    from ..clip import auto_classes  # noqa: F401  `import hf_vs2` has left it to us
    from ..files.progress import without_loading_bars

    logging.reset_format()  # our messages are not transformers'
    if rank() != 0:
        logging.set_verbosity_error()
    with ExitStack() as stack:
        stack.enter_context(without_loading_bars())
        if sys.stderr.isatty():  # where bars are: messages come above them
            stack.enter_context(logging_redirect_tqdm([getLogger("transformers")]))  # ours go through it
        command.run(args)


def _is_expected(error: Exception) -> bool:
    """Whether an error is about the request or the machine, so that its message is all that helps; others are bugs."""
    if isinstance(error, (ValueError, TypeError, OSError, ImportError)):
        return True
    from datasets.exceptions import DatasetsError
    from safetensors import SafetensorError

    return isinstance(error, (DatasetsError, SafetensorError))


def _kept(command: Any, args: Namespace | None) -> str:
    """What an interruption leaves."""
    place = command.keeps(args) if args is not None and hasattr(command, "keeps") else None
    return (
        "" if place is None else f"What is finished so far is kept in {place}: run the same command again to continue."
    )


def _message(error: Exception) -> str:
    from safetensors import SafetensorError

    # As options are spelled here.
    text = re.sub(
        r"\b(split|image_column|label_column|config_name|on_error)=('?)([\w.]+)\2",
        lambda option: f"--{option[1].replace('config_name', 'dataset_config')} {option[3].replace('...', 'NAME')}",
        last_line(error),
    )
    if isinstance(error, SafetensorError):  # does not say which file
        return f"a .safetensors file of the model or checkpoint is damaged ({text}): download or write it again"
    return text


def _complain(message: str) -> None:
    process = f"[process {rank()}] " if rank() else ""
    print(process + " ".join(message.split()), file=sys.stderr)
