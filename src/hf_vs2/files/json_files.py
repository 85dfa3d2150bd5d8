"""JSON as we write, print and read it: every JSON reader understands it, and infinity is spelled as in transformers'
`config.json`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .atomic import replace_text


_TAG = "__float__"
_INFINITE = {"Infinity": math.inf, "-Infinity": -math.inf}


def to_json(value: Any, **layout: Any) -> str:
    """
    JSON text of plain values. An infinite number becomes `{"__float__": "Infinity"}`; letters stay as they are, unless
    UTF-8 has none for one (a file name of stray bytes), which makes all of the text ASCII.

    Args:
        value: dicts, lists, tuples, strings, numbers, booleans and `None`.
        layout: `indent`, `sort_keys` and other options of `json.dumps`.

    Raises:
        `ValueError`: on NaN, naming where it stands. It stands for no answer, so whoever writes one has to decide
        what it means.
    """
    layout = {"ensure_ascii": False, "allow_nan": False} | layout
    try:
        text = json.dumps(value, **layout)
    except ValueError:
        value = _encoded(value, "")
        text = json.dumps(value, **layout)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, **layout | {"ensure_ascii": True})
    return text


def from_json(text: str) -> Any:
    """What [`to_json`] was given, with lists for tuples. The bare `Infinity` and `NaN` of earlier versions are read,
    too. What is no JSON, or nested too deeply, is a `ValueError`."""
    try:
        return json.loads(text, object_hook=_decoded)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def as_bytes(value: Any, **layout: Any) -> bytes:
    """[`to_json`] as a file holds it, one value a line."""
    return (to_json(value, **{"indent": 1} | layout) + "\n").encode()


def write_json(path: Path, value: Any, **layout: Any) -> Path:
    """[`as_bytes`] in a file that appears whole or not at all; else an `OSError` that names it."""
    replace_text(path, as_bytes(value, **layout).decode())
    return path


def read_json(path: Path) -> Any:
    """[`from_json`] of a file."""
    return from_json(path.read_text(encoding="utf-8"))


def read_object(path: str | os.PathLike, what: str = "a configuration") -> dict[str, Any]:
    """The object that a JSON file of any origin holds. Anything else is a `ValueError` that names the file, and `what`
    it should be."""
    try:
        found = read_json(Path(path))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file ({error}). Save or download it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON object, so not {what}.")
    return found


def read_format(path: Path, kind: tuple[str, int], what: str, remedy: str) -> dict[str, Any]:
    """[`read_object`] of a file of ours whose format has this name and version. Another one is a `ValueError`, with
    `what` it should be, and a `remedy` beside the version of this package that wrote it."""
    content = read_object(path, what)
    if content.get("format") != kind[0]:
        raise ValueError(f"{path} is not {what}: it does not say format {kind[0]!r}.")
    if content.get("format_version") != kind[1]:
        raise ValueError(
            f"{path} has format version {content.get('format_version')}, this hf_vs2 reads version {kind[1]}: use the "
            f"version that wrote it, or {remedy}."
        )
    return content


def _encoded(value: Any, place: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _encoded(item, f"{place}.{key}" if place else str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encoded(item, f"{place}[{number}]") for number, item in enumerate(value)]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    if math.isnan(value):
        raise ValueError(f"{place or 'The number'} is NaN: it stands for no result and is not written.")
    return {_TAG: "Infinity" if value > 0 else "-Infinity"}


def _decoded(found: dict[str, Any]) -> Any:
    tag = found.get(_TAG) if len(found) == 1 else None
    return _INFINITE[tag] if isinstance(tag, str) and tag in _INFINITE else found
