"""The command to run next, as it can be pasted into a shell."""

from __future__ import annotations

import os
import shlex
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .steps import opening


MANY_LABELS = 30
"""More labels than a line should hold."""


def command(name: str, *words: Any, **flags: Any) -> str:
    """`hf-vs2 NAME WORD ... --flag value ...`, quoted for a shell. A flag whose value is a list has several values,
    `True` makes it a switch; `None` and `False` leave it out."""
    parts = ["hf-vs2", name, *map(str, words)]
    for flag, value in flags.items():
        if value is not None and value is not False:
            values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
            parts += [f"--{flag}", *map(str, values)]
    return shlex.join(parts)


def dataset_flags(args: Namespace) -> dict[str, Any]:
    """Those that open the data set of a command again."""
    names = ("dataset", "split", "dataset_config", "dataset_revision")
    flags = {name: getattr(args, name) for name in names}
    return flags | {"image_column": None if args.image_column == "image" else args.image_column}


def checkpoint_flags(args: Namespace, checkpoint: Any = None) -> dict[str, Any]:
    """Those that open the checkpoint of a command again, or another one."""
    if checkpoint is not None:
        return {"checkpoint": checkpoint, "clip": getattr(args, "clip", None)}
    return {name: getattr(args, name) for name in ("checkpoint", "clip", "revision", "subfolder")}


def after_training(args: Namespace, checkpoint: Path, texts: bool = True) -> str | None:
    """Compare methods on labelled images of another split; without one, ask for a method by the labels of these;
    without labels, or `texts` to read them by, look at what was learned. `None`: nothing says which images it was."""
    from transformers.utils import logging

    from ..data.labels.names import class_names_of
    from ..data.load import open_splits

    if args.dataset is None:
        return None
    own, verbosity = {"checkpoint": checkpoint} | dataset_flags(args), logging.get_verbosity()
    column = args.label_column or "label"
    logging.set_verbosity_error()  # what is left out of the folder was said before
    try:
        splits = open_splits(args.dataset, **opening(args) | {"label_column": column})
    finally:
        logging.set_verbosity(verbosity)
    labelled = [name for name, split in splits.items() if class_names_of(split, column) is not None and texts]
    fresh = next((name for name in ("test", "validation", "val", "dev") if name in labelled), None)
    if fresh is not None and fresh != (args.split or "").partition("[")[0].strip():
        return command("evaluate", **own | {"split": fresh, "label_column": column})
    if labelled:
        return command("recommend", **own, label_column=column)
    return command("atlas", **own, output=checkpoint / "atlas")


def after_recommendation(args: Namespace, method: str, calibrate_first: bool, names: Sequence[str]) -> list[str]:
    """Calibrate on these images if that comes first; then label them by the method, or, where they are no folder of
    image files, write the method into the checkpoint."""
    from ..data.folders.listing import list_images

    checkpoint, lines = None, []
    if calibrate_first and method != "none":
        checkpoint = f"{args.checkpoint.rstrip('/')}-calibrated"
        lines.append(
            f"First: {command('calibrate', **checkpoint_flags(args), **dataset_flags(args), output_dir=checkpoint)}"
        )
    own = checkpoint_flags(args, checkpoint)
    holds_images = os.path.isdir(args.dataset) and bool(list_images(args.dataset, "skip").files)
    if holds_images and len(names) <= MANY_LABELS:
        labels = {"labels": args.labels or list(names), "names_as_given": args.names_as_given}
        templates = None if args.templates == "single" else args.templates
        lines.append(f"Next: {command('classify', args.dataset, **own, method=method, templates=templates, **labels)}")
    elif not args.apply:
        given = {"labels": args.labels, "label_column": args.label_column, "names_as_given": args.names_as_given}
        lines.append(f"Next: {command('recommend', **own, **dataset_flags(args), **given, apply=True)}")
    return lines
