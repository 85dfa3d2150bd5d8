"""Where a command writes: looked at before it reads anything."""

from __future__ import annotations

import os
from pathlib import Path

from .parsing import UsageError


def check_writable(path: str | os.PathLike, flag: str, is_folder: bool = True) -> None:
    """Refuse a place that can't be written to.

    Raises:
        `UsageError`: naming the place, and the flag that gives another one.
    """
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
