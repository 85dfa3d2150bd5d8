"""Text of anybody's inside our Markdown: names, versions, labels and settings that a stranger's files hold."""

from __future__ import annotations

import re
from typing import Any


# What begins a tag, an entity, a link, code, emphasis, a table cell, a heading, a template; and the colon of an
# address.
_MARKS = re.compile(r"[&<>\[\]`|\\*#{}~^$]|(?<=\w):(?=\S)")
_PLAIN = re.compile(r"(?:[\w .,;+=/()'!?{}@\[\]-]|:(?![A-Za-z]))*")


class Markdown(str):
    """Text that is Markdown already: it is put into a card as it is."""

    __slots__ = ()

    def __html__(self) -> str:
        """What Jinja asks for, and leaves alone."""
        return str(self)


def escaped(value: Any) -> Markdown:
    """A value as text on one line that a reader sees as it is, wherever it stands outside of code: nothing in it has a
    meaning."""
    if isinstance(value, Markdown):
        return value
    text = " ".join(str(value).split())
    return Markdown(_MARKS.sub(lambda mark: _ENTITIES.get(mark[0]) or f"&#{ord(mark[0])};", text))


_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def code(value: Any) -> Markdown:
    """The same as code, where it is made of the letters of ordinary names and prompts; in code nothing can be
    escaped."""
    text = str(value)
    return Markdown(f"`{text}`") if text.strip() and _PLAIN.fullmatch(text) else escaped(text)


def number(value: Any, layout: str) -> Markdown:
    """A number in a layout of `format`; whatever else stands in its place as it is."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return escaped(format(value, layout) if is_number else value)


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage of so many decimals, and of more where it would read 0 or 100 and is not."""
    value = 100 * share
    for more in range(digits, digits + 4):
        text = f"{value:.{more}f}"
        if value in (0, 100) or float(text) not in (0, 100):
            return f"{text}%"
    return f"<{10.0**-more:g}%" if value < 50 else f">{100 - 10.0**-more:g}%"
