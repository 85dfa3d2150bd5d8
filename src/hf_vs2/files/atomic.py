"""Writing files so that a reader sees the old one or the new one, never a part; after a power cut, too."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """`write(temporary path)` beside `path`, whose folder is made when needed; then the result takes its place in one step.

    Nothing stays behind when `write` fails. The name of the temporary file begins with a dot and ends with `.tmp`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def replace_files(folder: Path, write: Callable[[Path], Any], last: str, *stale: str) -> None:
    """
    The files that `write(temporary folder)` makes, moved into `folder`; the one named `last`, which declares the others, goes last.

    Earlier files that match the patterns `stale` go, unless there are new ones of their names.

    The earlier file of that name goes first: who is killed between two moves leaves a folder that is refused, not a mixture.
    When `write` fails, what was in `folder` is untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(folder / "files")
    try:
        temporary.mkdir()
        write(temporary)
        files = sorted(temporary.iterdir(), key=lambda path: path.name == last)
        for file in files:
            _sync(file)
        if len(files) > 1:
            (folder / last).unlink(missing_ok=True)
            _sync(folder)
        new = {file.name for file in files}
        for old in (path for pattern in stale for path in folder.glob(pattern)):
            if old.name not in new:
                old.unlink()
        for file in files:
            if file.name == last:
                _sync(folder)  # the others are there before it says that they are
            os.replace(file, folder / file.name)
        _sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(temporary: Path, folder: Path) -> None:
    """A folder of whole files takes the place of `folder`, or its name if there is none."""
    for file in temporary.iterdir():
        _sync(file)
    _sync(temporary)
    remove_folder(folder)
    os.replace(temporary, folder)
    _sync(folder.parent)


def remove_folder(folder: Path) -> None:
    """Removes a folder, if there is one, so that nobody finds a part of it under its name."""
    if folder.exists():
        temporary = _temporary(folder)
        os.replace(folder, temporary)
        shutil.rmtree(temporary)


def remove_leftovers(folder: Path) -> None:
    """Removes what processes that were killed left behind. Only for who knows that nobody is writing into `folder`."""
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


@contextlib.contextmanager
def failing_as(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """What a full disk raises does not say which file it was, and is no `OSError` in safetensors and torch, whose `errors` these
    are: it leaves here as one that names `path`."""
    known: tuple[type[Exception], ...] = (OSError, *errors)
    try:
        yield
    except known as error:
        if getattr(error, "filename", None) is not None:
            raise
        raise OSError(f"{path} could not be written: {error}. Earlier files are untouched.") from error


def _sync(path: Path) -> None:
    """To the disk, before anything that relies on it: a file system may write a new name down before the content, and a power cut
    between the two leaves an empty file under a name that promises a whole one."""
    if path.is_dir():
        if os.name == "nt":
            return  # Windows opens no folders, and keeps names in a journal
        descriptor = os.open(path, os.O_RDONLY)
    else:
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def replace_text(path: Path, text: str) -> None:
    """[`replace_file`] with text, in UTF-8, line ends as they are."""
    with failing_as(path):
        replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline=""))
