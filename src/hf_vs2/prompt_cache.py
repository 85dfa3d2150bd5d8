"""Class-embedding matrices kept between calls, for as long as the text tower that made them stays as it was."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .prompts import class_embeddings


if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase


# Entries of each weight that are compared by value.
_SAMPLE_SIZE = 8


class PromptCache:
    """
    Class embeddings `(num_classes, projection_dim)` by label set and templates, least recently used first out.

    The matrices belong to one state of the text tower and tokenizer; when that changes they are all dropped. Safe to use
    from several threads. A copy, and what a `DataLoader` worker receives, is empty.

    Args:
        max_floats (`int`): how many numbers the matrices may hold together; the one in use is kept, however large.
    """

    def __init__(self, max_floats: int):
        self.max_floats = max_floats
        self._matrices: OrderedDict[tuple[tuple[str, ...], tuple[str, ...]], torch.Tensor] = OrderedDict()
        self._tokenizer: Any = None
        self._state: tuple[Any, ...] | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[PromptCache], tuple[int]]:
        return type(self), (self.max_floats,)

    def __len__(self) -> int:
        return len(self._matrices)

    def clear(self) -> None:
        """Forget every matrix."""
        with self._lock:
            self._matrices.clear()

    def get(
        self,
        clip: CLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        labels: tuple[str, ...],
        templates: tuple[str, ...],
    ) -> torch.Tensor:
        """The matrix of `labels`, put into `templates` as they are; encoded now unless it is known."""
        with self._lock:
            state = text_state(clip)
            if state != self._state or tokenizer is not self._tokenizer:
                self._matrices.clear()
                self._state, self._tokenizer = state, tokenizer
            key = (labels, templates)
            if key in self._matrices:
                self._matrices.move_to_end(key)
                return self._matrices[key]
            self._matrices[key] = matrix = class_embeddings(clip, tokenizer, labels, templates, clean=False)
            while len(self) > 1 and sum(kept.numel() for kept in self._matrices.values()) > self.max_floats:
                self._matrices.popitem(last=False)
            return matrix


@torch.no_grad()
def text_state(clip: CLIPModel) -> tuple[Any, ...]:
    """
    Compares equal as long as the same prompts give the same text embeddings.

    Autograd's version counters tell of every ordinary change in place (an optimizer's step, `load_state_dict`), addresses,
    dtypes and devices of every move. Neither sees a write through `.data` (as exponential averages and adapter merging do),
    nor is an address never used twice: so a few entries of each weight are compared by value as well. All of it costs about a
    millisecond. A change that leaves the weights alone (switching an adapter off) is not seen.
    """
    parameters = [*clip.text_model.parameters(), *clip.text_projection.parameters()]
    kind = clip.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return autocast, tuple(_identity(parameter) for parameter in parameters), _sample(parameters)


def _identity(parameter: nn.Parameter) -> tuple[Any, ...]:
    # Tensors made under `inference_mode` have no version counter.
    version = None if parameter.is_inference() else parameter._version
    return parameter.data_ptr(), version, parameter.dtype, parameter.device


def _sample(parameters: Iterable[nn.Parameter]) -> tuple[float, ...]:
    """Evenly spaced entries of each weight; one copy from each device. Weights that are offloaded have none."""
    entries: dict[torch.device, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.device.type != "meta":
            step = max(1, parameter.numel() // _SAMPLE_SIZE)
            entries.setdefault(parameter.device, []).append(parameter.flatten()[::step])
    return tuple(value for found in entries.values() for value in torch.cat(found).tolist())


__all__ = ["PromptCache", "text_state"]
