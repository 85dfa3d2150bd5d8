"""Ways to damage the files of a checkpoint. Each function here gives one that takes the folder."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


Harm = Callable[[Path], object]
Tensors = dict[str, torch.Tensor]
WEIGHTS = "model.safetensors"


def config(*place: str, **changes: Any) -> Harm:
    """Fields of config.json, or of an object inside it; `...` takes a field away."""

    def harm(folder: Path) -> None:
        path = folder / "config.json"
        content = inner = json.loads(path.read_text())
        for name in place:
            inner = inner[name]
        inner.update(changes)
        for name in [name for name, value in changes.items() if value is ...]:
            inner.pop(name, None)
        path.write_text(json.dumps(content))

    return harm


def tensors(
    change: Callable[[Tensors], Tensors | None] = lambda found: found, name: str = WEIGHTS, **about: Any
) -> Harm:
    """Other tensors in a file; `about`: fields of the description that ours have in their header."""

    def harm(folder: Path) -> None:
        with safe_open(folder / name, "pt") as file:
            metadata = file.metadata() or {}
        if about:
            said = json.loads(metadata["hf_vs2"]) | about
            metadata["hf_vs2"] = json.dumps({field: value for field, value in said.items() if value is not ...})
        found = load_file(folder / name)
        changed = change(found)
        changed = found if changed is None else changed
        save_file({key: one.contiguous() for key, one in changed.items()}, folder / name, metadata or None)

    return harm


def tensor(key: str, change: Callable[[torch.Tensor], torch.Tensor], name: str = WEIGHTS) -> Harm:
    return tensors(lambda found: found | {key: change(found[key])}, name)


def without(key: str, name: str = WEIGHTS) -> Harm:
    return tensors(lambda found: {other: one for other, one in found.items() if other != key}, name)


def at(place: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A tensor with one number replaced."""
    return lambda found: found.flatten().index_fill(0, torch.tensor([place % found.numel()]), value).view_as(found)


def by_a_bad_disk(content: bytes, dice: random.Random, at: int) -> tuple[str, bytes]:
    """What happened to a file, from a place on, and what is left of it."""
    data, length = bytearray(content), dice.choice((8, 64, 512, 4096))
    harm = dice.choice(("flip", "flip", "cut", "zeros", "ones", "double", "overwrite"))
    if harm == "flip":
        for place in {at, *(dice.randrange(len(data)) for _ in range(dice.choice((0, 0, 3))))}:
            data[place] ^= 1 << dice.randrange(8)
    elif harm == "cut":
        del data[at:]
    elif harm in ("zeros", "ones"):
        data[at : at + length] = (b"\0" if harm == "zeros" else b"\xff") * len(data[at : at + length])
    elif harm == "double":
        data[at:at] = data[at : at + 256]
    else:  # a sector written to the wrong place: the length stays
        piece = data[at : at + 64]
        to = dice.randrange(max(1, len(data) - len(piece)))
        data[to : to + len(piece)] = piece
    return harm, bytes(data)


class Code:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.marker, "w")
