"""Writing files so that a reader sees the old one or the new one, never a part."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """`write(temporary path)` beside `path`, whose folder is made when needed; then the result takes its place in one step.

    Nothing stays behind when `write` fails. The name of the temporary file begins with a dot and ends with `.tmp`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """[`replace_file`] with text, in UTF-8, line ends as they are."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline=""))
