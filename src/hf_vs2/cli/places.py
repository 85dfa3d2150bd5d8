"""Where a command writes: looked at before it reads anything."""

from __future__ import annotations

import os
from pathlib import Path

from .parsing import UsageError


def check_writable(path: str | os.PathLike, flag: str, is_folder: bool = True) -> None:
    """Refuse, by a [`UsageError`] with the flag that gives another one, a place that can't be written to."""
    place = Path(path).expanduser().absolute()
    if is_folder and place.exists() and not place.is_dir():
        why = "it is a file"
    elif not is_folder and place.is_dir():
        why = "it is a folder"
    else:
        there = place if is_folder else place.parent
        while not there.exists() and there != there.parent:
            there = there.parent
        if not there.is_dir():
            why = f"{there} is a file"
        elif not os.access(there, os.W_OK | os.X_OK):
            why = f"{there} is read-only, or belongs to somebody else"
        elif not is_folder and place.exists() and not os.access(place, os.W_OK):
            why = "it is write-protected"
        else:
            return
    raise UsageError(f"{path} can't be written to ({why}): give another place with {flag}")


def refuse_other_model(folder: Path) -> None:
    """Refuse to save a checkpoint into the folder of a model of another kind, such as a CLIP, whose weights would
    go."""
    from ..files.checkpoint_folder import SAE_TYPE, VS2_TYPE
    from ..files.json_files import read_json

    try:
        kind = read_json(folder / "config.json")["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if kind not in (SAE_TYPE, VS2_TYPE):
        raise UsageError(
            f"{folder} holds a model of type {kind!r}, which is kept: give another place with --output_dir"
        )
