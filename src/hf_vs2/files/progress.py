"""The one progress bar of all long work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def progress_bar(iterable: Iterable[Any] | None = None, *, shown: bool, **options: Any) -> Any:
    """
    tqdm's bar on stderr, as wide as the terminal, or a widget in a notebook.

    Args:
        iterable (*optional*): what is gone through.
        shown (`bool`): `False` shows nothing. A bar is never shown where stderr is no terminal: a log would get a line
            for each of its updates.
        options: `desc`, `total`, `initial`, `unit` and other options of `tqdm`.
    """
    from tqdm.auto import tqdm

    return tqdm(iterable, disable=None if shown else True, dynamic_ncols=True, **options)


__all__ = ["progress_bar"]
