"""Class-embedding matrices kept between calls, for as long as the text tower that made them stays as it was."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..data.labels.prompts import class_embeddings
from ..files.weight_state import weights_state


if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase


class PromptCache:
    """
    Class embeddings `(num_classes, projection_dim)` by label set and templates, least recently used first out.

    The matrices belong to one state of the text tower and tokenizer; when that changes they are all dropped. Safe to
    use from several threads. A copy, and what a `DataLoader` worker receives, is empty.

    Args:
        max_floats (`int`): how many numbers the matrices may hold together; the one in use is kept, however large.
    """

    def __init__(self, max_floats: int):
        self.max_floats = max_floats
        self._matrices: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
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
        clean: bool,
        tokenizer_kwargs: Mapping[str, Any],
    ) -> torch.Tensor:
        """[`class_embeddings`] of labels and templates; encoded now unless they are kept."""
        with self._lock:
            state = text_state(clip)
            if state != self._state or tokenizer is not self._tokenizer:
                self._matrices.clear()
                self._state, self._tokenizer = state, tokenizer
            key = (labels, templates, clean, repr(sorted(tokenizer_kwargs.items())))
            if key in self._matrices:
                self._matrices.move_to_end(key)
                return self._matrices[key]
            self._matrices[key] = matrix = class_embeddings(
                clip, tokenizer, labels, templates, clean=clean, tokenizer_kwargs=tokenizer_kwargs
            )
            while len(self) > 1 and sum(kept.numel() for kept in self._matrices.values()) > self.max_floats:
                self._matrices.popitem(last=False)
            return matrix


def text_state(clip: CLIPModel) -> tuple[Any, ...]:
    """Compares equal as long as the same prompts give the same text embeddings, see [`weights_state`]. A change that
    leaves the weights alone (switching an adapter off) is not seen."""
    projection = getattr(clip, "text_projection", nn.Identity())  # SigLIP's is a part of the text model
    return weights_state([*clip.text_model.parameters(), *projection.parameters()])


__all__ = ["PromptCache", "text_state"]
