"""The one progress bar of all long work, and silence of those that tell nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers.utils import logging


def progress_bar(iterable: Iterable[Any] | None = None, *, shown: bool, **options: Any) -> Any:
    """tqdm's bar on stderr, as wide as the terminal, or a widget in a notebook, if `shown`; never where stderr is no
    terminal: a log would get a line for each of its updates. `options` are tqdm's (`desc`, `total`, `unit`, ...)."""
    from tqdm.auto import tqdm

    return tqdm(iterable, disable=None if shown else True, dynamic_ncols=True, **options)


@contextlib.contextmanager
def without_loading_bars() -> Iterator[None]:
    """transformers shows no bars for the tensors that it reads or writes, which take a moment. Downloads keep
    theirs."""
    were_shown, downloads_shown = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()
    if downloads_shown:
        enable_progress_bars()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()
