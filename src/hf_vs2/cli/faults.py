"""What the machine or the network does to a command, in a sentence that says what helps. All other errors are about
the request, or bugs."""

from __future__ import annotations

import errno
import os
import re
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from ..files.atomic import is_full


_SMALLER = ("batch_size", "per_device_train_batch_size", "num_workers", "expansion_factor", "sketch_rows")
_PLACES = ("output_dir", "output", "activations_dir")
_TEXTS = {
    "shared memory": r"unable to (write to|open|mmap|allocate) .*(</torch_|shared memory)|insufficient shared memory",
    "worker": r"worker.{0,40}(exited unexpectedly|is killed by signal|died|terminated)|abruptly (died|terminated)",
    "memory": r"out of memory|(can.?t|cannot|unable to|failed to) allocate"
    r"|not enough memory|bad_alloc|can't start new thread",
    "accelerator": r"\b(CUDA|cuDNN|CUBLAS|HIP|NCCL|MPS)\b.{0,40}(error|fail|status|unavailable)|No CUDA GPUs",
    "network": r"CAS service error|Data processing error|error sending request|client has been closed",
}
"""What libraries say, mostly in plain `RuntimeError`s."""
_HTTP = ("httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp", "http")
_ARCHIVES = ("zlib", "zipfile", "tarfile", "lzma", "bz2", "gzip", "_lzma", "zstandard")


def fault_of(error: BaseException, args: Namespace | None) -> str | None:
    """The fault behind an error, or `None`."""
    chain = list(_chain(error))
    said = last_line(error)
    kinds = [(cause, kind) for cause in chain if (kind := _kind(cause))]
    if not kinds:
        return None
    cause, kind = kinds[0]
    if kind in ("network", "archive") and type(error).__name__ == "UnreadableImageError":
        return None  # it names the image, and no other file was asked for
    place, number = getattr(cause, "filename", None), getattr(cause, "errno", None)
    if kind == "full":
        return f"the disk is full ({said}). Make room, or give another place{_flags(args, _PLACES)}."
    if kind == "permission":
        if place is None or _is_unreadable(place):
            return None  # it says itself what it could not read
        return (
            f"{place} can't be written to ({os.strerror(number or errno.EACCES)}): give another "
            f"place{_flags(args, _PLACES)}."
        )
    if kind == "worker":
        return (
            f"a worker process was killed, most often because memory ran out ({said}): give less at "
            f"once{_flags(args, _SMALLER)}."
        )
    if kind in ("memory", "shared memory"):
        return f"out of memory ({said}): give less at once{_flags(args, _SMALLER)}."
    if kind == "accelerator":
        return f"the accelerator or its driver failed ({said}). Look at it before you run the command again."
    if kind == "network":
        return (
            f"the network or the server broke off ({said}). Run the command again: files that have arrived are not "
            "sent twice."
        )
    return (
        f"a file ends too early or is damaged, as after a download that broke off ({said}): download or copy it again."
    )


def _kind(error: BaseException) -> str | None:
    module, text = type(error).__module__.partition(".")[0], str(error)
    if is_full(error):
        return "shared memory" if re.search(_TEXTS["shared memory"], text) else "full"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "permission"
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "memory"
    if type(error).__name__ in ("BrokenProcessPool", "ProcessExitedException"):
        return "worker"
    if isinstance(error, (RuntimeError, ImportError)) or module == "safetensors_rust":
        for kind, words in _TEXTS.items():
            if re.search(words, text, re.IGNORECASE | re.DOTALL):
                return kind
    if module in _HTTP and not isinstance(error, ValueError):
        # Answers of the Hub come with a message of its own.
        return None if type(error).__name__ == "HfHubHTTPError" else "network"
    if isinstance(error, EOFError) or (module in _ARCHIVES and not isinstance(error, OSError)):
        return "archive"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def last_line(error: BaseException) -> str:
    """The message on one line; of an error in another process its own, without the stack of that process."""
    text = str(error)
    if "Traceback (most recent call last)" in text:
        text = text.strip().splitlines()[-1]
    return " ".join(text.split()) or type(error).__name__


def _is_unreadable(place: Any) -> bool:
    """Whether a path is there, or may be there, and this user may not look at it."""
    if isinstance(place, int):
        return False
    wanted = os.R_OK | os.X_OK if os.path.isdir(place) else os.R_OK
    parent = os.path.dirname(os.path.abspath(place))
    return (
        not os.access(place, wanted)
        if os.path.exists(place)
        else os.path.isdir(parent) and not os.access(parent, os.X_OK)
    )


def _flags(args: Namespace | None, names: tuple[str, ...]) -> str:
    """` (--num_workers, --batch_size)`: those of the flags that the command has."""
    found = [f"--{name}" for name in names if hasattr(args, name)]
    return f" ({', '.join(found)})" if found else ""
