"""A CLIP's vision tower run layer by layer, so that rows can be changed between two of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling


def run_layers(
    vision: Any,
    pixel_values: torch.Tensor,
    between: Callable[[int, torch.Tensor], torch.Tensor | None],
    interpolate_pos_encoding: bool | None = None,
    output_hidden_states: bool | int | Sequence[int] | None = None,
    output_attentions: bool | None = None,
    return_dict: bool | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPooling:
    """
    What the tower gives for `pixel_values` `(batch, channels, height, width)`, but for `pooler_output`; other
    arguments as it takes them. The hidden states are what the layers were given, and what the last one gave.

    Args:
        between (`(index, rows) -> rows`): what becomes of the CLS rows `(batch, hidden_size)` that a layer gives;
            `None`: they stay.
    """
    asked = vision.config.output_hidden_states if output_hidden_states is None else output_hidden_states
    watches = vision.config.output_attentions if output_attentions is None else output_attentions
    resized = {} if interpolate_pos_encoding is None else {"interpolate_pos_encoding": interpolate_pos_encoding}
    hidden = vision.pre_layrnorm(vision.embeddings(pixel_values, **resized))
    states, attentions = [hidden], []
    for index, layer in enumerate(vision.encoder.layers):
        if watches:
            hidden, attention = _run_watched(layer, hidden, **kwargs)
            attentions.append(attention)
        else:
            hidden = layer(hidden, None, **kwargs)
        rows = between(index, hidden[:, 0, :])
        if rows is not None:
            hidden = torch.cat([rows.unsqueeze(1), hidden[:, 1:, :]], dim=1)
        states.append(hidden)
    chosen = range(len(states)) if asked is True else [asked] if isinstance(asked, int) else asked
    return BaseModelOutputWithPooling(
        last_hidden_state=hidden,
        hidden_states=tuple(state if place in chosen else None for place, state in enumerate(states))
        if asked
        else None,
        attentions=tuple(attentions) if watches else None,
    )


def _run_watched(layer: Any, hidden: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's output, and its attention, which that does not hold."""
    thread, found = get_ident(), []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        if get_ident() == thread:  # another one may be in the same layer
            found.append(output[1])

    with layer.self_attn.register_forward_hook(keep):
        output = layer(hidden, None, **kwargs)
    return output, found[-1]
