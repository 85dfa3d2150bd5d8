"""What commands print: results on the main process, in letters that the terminal has."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any


def rank() -> int:
    """Number of this process among those that a launcher started."""
    return int(os.environ.get("RANK", 0))


def say(*lines: str) -> None:
    """Print results, on the main process only. Letters that the terminal has not got are shown by number, as
    `\\xe9`."""
    if rank() == 0:
        encoding = sys.stdout.encoding or "utf-8"
        print("\n".join(lines).encode(encoding, "backslashreplace").decode(encoding), flush=True)


def say_json(value: Any) -> None:
    """Print JSON. Where the terminal has not got a letter it is all ASCII, so that nothing is lost."""
    from ..files.json_files import to_json

    text = to_json(value, indent=1)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = to_json(value, indent=1, ensure_ascii=True)
    say(text)


def say_written(places: Mapping[str, Any]) -> None:
    """Print what was written, and where."""
    say("", "Written:", *(f"  {what:<15} {place}" for what, place in places.items()))
