"""What each setting can be: one table of fields and their kinds for every file, command and class of arguments."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import reprlib
import sys
from collections.abc import Callable, Collection, Mapping
from numbers import Integral, Real
from typing import Any, TypeGuard


LARGEST_COUNT = 10**9
"""Of steps, rows and the like."""
LARGEST_BATCH = 2**20
LARGEST_EXPANSION = 4096
LARGEST_SEED = 2**32 - 1
"""numpy takes no larger one."""
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 80
_SHOWN.maxlevel, _SHOWN.maxdict, _SHOWN.maxlist, _SHOWN.maxtuple = 2, 4, 4, 4


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a value can be."""

    says: str
    """The words for it in messages, after "must be"."""
    accepts: Callable[[Any], bool]
    """Whether a value is of this kind."""
    make: Callable[[Any, str], Any] = lambda value, _: value
    """What is kept of an accepted value, by the value and its name; it may raise `ValueError` itself."""
    of_text: Callable[[str], Any] = str
    """What the command line makes of its text."""

    def read(self, value: Any, name: str) -> Any:
        """The value to keep; another one is a `ValueError` with the name, the value and what is allowed."""
        if not self.accepts(value):
            raise ValueError(f"{name} must be {self.says}, not {shown(value)}.")
        return self.make(value, name)


def whole(least: int = 0, most: int = LARGEST_COUNT) -> Kind:
    """A whole number in a range."""
    says = f"a whole number from {least:,} to {most:,}"
    return Kind(says, lambda value: _is_whole(value) and least <= value <= most, of_text=int)


def number(
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    infinite: bool = False,
) -> Kind:
    """A number, finite unless `infinite` is allowed, in a range with (`least`, `most`) or without its ends."""
    limits = [
        words
        for limit, words in (
            (above, "positive" if above == 0 else f"above {above:g}"),
            (least, f"at least {least:g}"),
            (below, f"below {below:g}"),
            (most, f"at most {most:g}"),
        )
        if math.isfinite(limit)
    ]
    says = f"{'a' if infinite else 'a finite'} number" + (f" ({' and '.join(limits)})" if limits else "")

    def accepts(value: Any) -> bool:
        real: Any = Real  # mypy does not know that numbers are some
        if isinstance(value, bool) or not isinstance(value, real) or (_is_whole(value) and abs(value) > 10**300):
            return False
        if not infinite and not math.isfinite(value):
            return False
        return (
            least <= value <= most and (value > above or above == -math.inf) and (value < below or below == math.inf)
        )

    return Kind(says, accepts, of_text=float)


def one_of(known: Collection[str]) -> Kind:
    """One of some words; a misspelt one is told the nearest."""

    def make(value: str, name: str) -> str:
        if value in known:
            return value
        near = difflib.get_close_matches(value, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(known)}."
        raise ValueError(f"{name}={shown(value)} is not known; {hint}")

    return Kind(f"one of {', '.join(known)}", lambda value: isinstance(value, str), make)


def optional(kind: Kind) -> Kind:
    """The same, or nothing."""
    return Kind(
        f"{kind.says} (or left out)",
        lambda value: value is None or kind.accepts(value),
        lambda value, name: None if value is None else kind.make(value, name),
    )


def many(kind: Kind, least: int = 0) -> Kind:
    """A list, kept as a tuple; a single value is a list of one."""

    def make(value: Any, name: str) -> tuple[Any, ...]:
        items = value if isinstance(value, (list, tuple)) else [value]
        if len(items) < least:
            raise ValueError(
                f"{name} must have at least {least} value{'s' * (least > 1)}, not {shown(value)}: there is none."
            )
        return tuple(kind.read(item, f"{name}[{number}]") for number, item in enumerate(items))

    return Kind(f"a list of {kind.says}", lambda value: True, make)


def part(make: Callable[..., Any], kinds: Mapping[str, Kind], made: type, required: Collection[str] = ()) -> Kind:
    """`key: value` lines with fields of their own, from which `make` makes an object of the class `made`."""

    def read(value: Any, name: str) -> Any:
        return value if isinstance(value, made) else make(**read_fields(value, kinds, name, required))

    return Kind("`key: value` lines", lambda value: isinstance(value, (Mapping, made)), read)


def is_finite(value: Any) -> bool:
    """Whether this is a number that a float can hold; JSON knows whole numbers of any size."""
    return bool(abs(value) <= sys.float_info.max)


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


COUNT = whole(1)
TEXT = Kind("a text", lambda value: isinstance(value, str) and bool(value.strip()))
PATH = Kind(
    "a path",
    lambda value: isinstance(value, (str, os.PathLike)) and bool(str(value).strip()),
    lambda value, name: os.fspath(value),
)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
FILE_NAME = Kind(
    "a name that files can have: at most 100 letters, none of them / or \\, and no dot at its start",
    lambda value: (
        isinstance(value, str)
        and 0 < len(value) <= 100
        and value.isprintable()
        and not value.startswith(".")
        and not set(value) & set('/\\:*?"<>|')
    ),
)


def setting(kind: Kind | None = None, *, help: str = "", **default: Any) -> Any:
    """A field of a dataclass that has a kind, and a help text for the command line."""
    return dataclasses.field(metadata={"help": help} | ({} if kind is None else {"kind": kind}), **default)


def kinds_of(cls: Any) -> dict[str, Kind]:
    """The kinds of a dataclass's fields, or of an object's."""
    return {field.name: field.metadata["kind"] for field in dataclasses.fields(cls) if "kind" in field.metadata}


def check_fields(made: Any, where: str = "") -> None:
    """Read each field of a dataclass's object by its kind, in its `__post_init__`."""
    for name, kind in kinds_of(made).items():
        object.__setattr__(made, name, kind.read(getattr(made, name), where + name))


class Checked:
    """A base of dataclasses whose fields are read by their kinds, and by nothing else."""

    def __post_init__(self) -> None:
        check_fields(self)


def part_of(cls: Any) -> Kind:
    """[`part`] for a dataclass."""
    required = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    return part(cls, kinds_of(cls), cls, required)


def read_fields(
    content: Any, kinds: Mapping[str, Kind], where: str, required: Collection[str] = (), what: str = ""
) -> dict[str, Any]:
    """The values of a mapping, by the kinds of its keys. A `ValueError` on a key that nobody reads, with the nearest
    known one, on one that is missing, and on a value of another kind; in messages `where` stands before the names of
    keys, and the mapping itself is `what`."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{what or where} must be `key: value` lines, not {shown(content)}.")
    # YAML authors write the paper's symbol; Python cannot.
    given = {"lambda_" if key == "lambda" and "lambda_" in kinds else key: value for key, value in content.items()}
    for key in given:
        if key not in kinds:
            near = difflib.get_close_matches(str(key)[:100], kinds, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f": {', '.join(kinds)}"
            raise ValueError(f"{what or where} has no setting {shown(key)}{hint}")
    missing = [name for name in required if name not in given]
    if missing:
        raise ValueError(f"{what or where} lacks {', '.join(missing)}.")
    prefix = f"{where}." if where else ""
    return {key: kinds[key].read(value, f"{prefix}{key}") for key, value in given.items()}


def shown(value: Any) -> str:
    """A value in a message: its beginning, however large it is."""
    if _is_whole(value) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    return _SHOWN.repr(value)
