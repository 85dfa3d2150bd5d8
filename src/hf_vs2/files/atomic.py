"""Writing files so that whoever opens them finds the old ones or the new ones, whatever the moment of a kill or a
power cut.

All of it is made in a folder `.NAME.8f3a1c2d.tmp` beside its place and moved from there. Files that belong together
are complete there before that folder gets the name `.replacing`: from then on the save counts. Whoever opens the
folder next, to read or to write, moves what a killed process had not moved yet ([`finish_replacement`]).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


_COMMITTED = ".replacing"
_PLAN = ".plan.json"
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{1,8}\.tmp", re.DOTALL)
_FULL = ("No space left", "Disk quota exceeded", "unexpected pos", "the disk is full")
"""What the system, torch and this module say."""


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """`write(temporary path)`, of the same name in another folder; then the result takes its place in one step. The
    folder of `path` is made when needed, and nothing stays behind when `write` fails ([`failing_as`])."""
    with failing_as(path), _scratch(path) as scratch:
        write(scratch / path.name)
        _sync(scratch / path.name)
        os.replace(scratch / path.name, path)
        _sync(path.parent)


def replace_text(path: Path, text: str) -> None:
    """[`replace_file`] with text, in UTF-8, line ends as they are."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline=""))


def replace_files(folder: Path, write: Callable[[Path], Any], last: str, *stale: str) -> None:
    """
    The files that `write(temporary folder)` makes, subfolders included, take their places in `folder`, all of them or
    none.

    Earlier files that match the patterns `stale` go, unless there are new ones of their names. The earlier file named
    `last`, which declares the others, goes first and the new one comes last: a reader that knows nothing of all this
    is refused meanwhile. When `write` fails ([`failing_as`]), what was in `folder` is untouched.
    """
    with failing_as(folder), _scratch(folder / "files") as scratch:
        write(scratch)
        made = sorted(path for path in scratch.rglob("*") if path.is_file())
        new = sorted((path.relative_to(scratch).as_posix() for path in made), key=lambda name: name == last)
        for path in (*made, *{path.parent for path in made}):
            _sync(path)
        while True:
            finish_replacement(folder)  # of somebody else
            old = {path.relative_to(folder).as_posix() for pattern in stale for path in folder.glob(pattern)}
            (scratch / _PLAN).write_text(json.dumps({"new": new, "old": sorted(old - set(new))}), encoding="utf-8")
            _sync(scratch / _PLAN)
            try:
                os.rename(scratch, folder / _COMMITTED)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        try:
            _sync(folder)
            _move(folder)
        finally:
            _move(folder)  # where Ctrl-C came in between


def finish_replacement(folder: Path) -> None:
    """Moves what a process that died in [`replace_files`] had left to move, or waits for one that is at it. Costs a
    look otherwise. An `OSError` if it can't, as in a folder that this user can't write to."""
    committed = folder / _COMMITTED
    while committed.is_dir():
        with contextlib.ExitStack() as held:
            try:
                held.callback(os.close, _hold(committed))
            except FileNotFoundError:
                continue
            except OSError:
                pass  # nothing can be held here
            try:
                _move(folder)
            except (OSError, ValueError, KeyError) as error:
                raise OSError(
                    f"{folder} was saved into by a process that died, and what it left in {committed} can't be moved "
                    f"to its place ({error}). Open the folder once where it can be written to, or save or download it "
                    "again."
                ) from error


def _move(folder: Path) -> None:
    committed = folder / _COMMITTED
    if not committed.is_dir():
        return
    try:
        plan = json.loads((committed / _PLAN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        plan = {"new": [], "old": []}  # all is done but for the folder itself
    for name in (*plan["new"], *plan["old"]):
        for path in (committed / name, folder / name):
            # Whoever made the folder may not reach out of it.
            if not path.parent.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{name} is not inside it")
    left = [name for name in plan["new"] if (committed / name).is_file()]
    if len(plan["new"]) > 1 and left and (folder / plan["new"][-1]).exists():
        (folder / plan["new"][-1]).unlink(missing_ok=True)
        _sync(folder)
    for name in plan["old"]:
        (folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it is not empty, or gone
            (folder / name).parent.rmdir()
    for name in left:
        place = folder / name
        place.parent.mkdir(exist_ok=True)
        if name == plan["new"][-1]:
            _sync(folder)  # the others are there before it says that they are
        os.replace(committed / name, place)
        _sync(place.parent)
    shutil.rmtree(committed)


def replace_folder(temporary: Path, folder: Path) -> None:
    """A folder of whole files takes the place of `folder`, or its name if there is none."""
    for file in (*temporary.iterdir(), temporary):
        _sync(file)
    if folder.exists() and _exchange(temporary, folder):
        _sync(folder.parent)
        remove_folder(temporary)
        return
    remove_folder(folder)
    os.replace(temporary, folder)
    _sync(folder.parent)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into, which takes the place of `folder` when all went well and vanishes
    otherwise; of a link, the place that it leads to."""
    folder = folder.resolve()
    with _scratch(folder) as scratch:
        yield scratch
        replace_folder(scratch, folder)


def remove_folder(folder: Path) -> None:
    """Removes a folder, if there is one, so that nobody finds a part of it under its name."""
    if folder.exists():
        temporary = _temporary(folder)
        os.replace(folder, temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what processes that were killed left beside the places of their files. What a living one holds stays; so
    does all of it where the system can't tell (Windows, some network disks)."""
    for leftover in folder.iterdir():
        if _LEFTOVER.fullmatch(leftover.name):
            with contextlib.suppress(OSError), contextlib.ExitStack() as held:
                held.callback(os.close, _hold(leftover, wait=False))
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk is full: what a full disk raises is no `OSError` in safetensors, tokenizers
    and torch."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(words in str(error) for words in _FULL)


@contextlib.contextmanager
def failing_as(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """What a full disk raises does not say which file it was, and is no `OSError` in safetensors, tokenizers and
    torch: it leaves here as one that names `path`. So do other `errors` of writing."""
    known: tuple[type[Exception], ...] = (OSError, SafetensorError, *errors)
    try:
        yield
    except Exception as error:
        full = is_full(error)
        if not full and (not isinstance(error, known) or getattr(error, "filename", None) is not None):
            raise
        why = "the disk is full" if full else error
        raise OSError(f"{path} could not be written: {why}. Earlier files are untouched.") from error


@contextlib.contextmanager
def _scratch(place: Path) -> Iterator[Path]:
    """A new folder beside `place`, whose own folder is made when needed. This process holds it, and it is gone
    afterwards."""
    place.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(place.parent)
    with contextlib.ExitStack() as held:
        while True:
            scratch = _temporary(place)
            scratch.mkdir()
            held.callback(shutil.rmtree, scratch, ignore_errors=True)
            try:
                held.callback(os.close, _hold(scratch))
            except FileNotFoundError:
                continue  # another process took it for a leftover
            except OSError:
                pass  # nothing can be held here
            break
        yield scratch


def _hold(path: Path, wait: bool = True) -> int:
    """A descriptor of a file or folder that this process holds until it closes it or dies. `FileNotFoundError` says
    that it is gone, another `OSError` that another process holds it, or that the system can't tell."""
    if sys.platform == "win32":
        raise OSError("folders can't be held")
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            raise FileNotFoundError(path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _exchange(left: Path, right: Path) -> bool:
    """Whether two folders could swap names in one step: on Linux and macOS, on most file systems."""
    names = os.fsencode(left), os.fsencode(right)
    try:
        libc = ctypes.CDLL(None)
        if sys.platform == "darwin":
            return libc.renamex_np(*names, 2) == 0
        return libc.renameat2(-100, names[0], -100, names[1], 2) == 0
    except (AttributeError, OSError, TypeError):
        return False


def _sync(path: Path) -> None:
    """To the disk, before anything that relies on it: a file system may write a new name down before the content, and
    a power cut between the two leaves an empty file under a name that promises a whole one."""
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
