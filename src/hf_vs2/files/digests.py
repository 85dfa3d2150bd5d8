"""Digests by which files that were saved together know each other: XXH3, 128 bits, the fastest that Python brings.

They tell damage and mixtures, not forgery: whoever can write a file can write its digest too.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import CONFIG_NAME


def file_digest(path: str | os.PathLike) -> str:
    """32 hexadecimal digits that stand for the bytes of a file (`xxhsum -H2` prints them too)."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return _digest(b"")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _digest(content)


def tensor_digest(tensor: torch.Tensor) -> str:
    """The same for the numbers of a tensor on the CPU, as they lie in memory and in safetensors files."""
    return _digest(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)


def json_digest(content: Any) -> str:
    """The same for what a JSON file says, however it is laid out."""
    return _digest(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode())


def _digest(content: Any) -> str:
    from xxhash import xxh3_128_hexdigest

    return xxh3_128_hexdigest(content)


def digests_in(folder: Path) -> dict[str, str]:
    """Path in the folder -> digest, of each safetensors file there."""
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in sorted(folder.rglob("*.safetensors"))}


def check_digest(path: str | os.PathLike, digests: Mapping[str, str] | None, by: str = CONFIG_NAME) -> None:
    """Refuse, by a `ValueError` that names it, a file that is not the one whose digest is in `digests` under its name;
    without digests, which earlier versions did not write, any is taken."""
    if not digests:
        return
    expected = digests.get(os.path.basename(path))
    if expected is None:
        raise ValueError(
            f"{path} is none of the files that {by} was saved with ({', '.join(sorted(digests))}): it is of another "
            "save. Save or download all of them again."
        )
    if not is_of_digest(path, expected):
        raise ValueError(
            f"{path} is damaged, or not of the save that {by} is of: its bytes are not those that were saved. If "
            "somebody was saving just now, load it again; else save or download all files again."
        )


def is_of_digest(path: str | os.PathLike, digest: str) -> bool:
    """Whether a file has this digest: ours, or the SHA-256 that earlier versions wrote into training checkpoints."""
    if len(digest) != 64:
        return file_digest(path) == digest
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest
