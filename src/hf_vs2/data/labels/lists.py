"""Lists of texts that people keep in files: labels, prompt templates, words."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias


Names: TypeAlias = "Sequence[str] | Mapping[str, str]"
"""Texts in order, or by the class that each is for."""

LIST_FILES = (".txt", ".csv", ".tsv", ".json")
OTHER_FILES = (".jsonl", ".yaml", ".yml", ".xlsx", ".parquet", ".npy", ".pkl")
# Headers of a table: of the column of the texts, likeliest first, and of the one that says which class each is for.
_TEXT_HEADERS = (
    *("class_name", "label_name", "classname", "name", "names", "template", "templates", "prompt", "prompts"),
    *("label", "labels", "class", "classes", "category", "word", "words", "text"),
)
_KEY_HEADERS = (
    *("id", "idx", "index", "number", "no", "#", "", "class_id", "label_id", "class_index", "key", "code", "target"),
    *("folder", "wnid", "synset", "label", "class", "name"),
)


def names_in(given: Names | Iterable[str], what: str = "class_names") -> list[str]:
    """The names of a list or mapping, in its order. One text would be a list of its letters: a `TypeError`."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        hint = " For text with commas: labels.split(',')." if isinstance(given, str) else ""
        raise TypeError(f"{what} must be a list of strings, not {given!r}.{hint}")
    return list(given.values() if isinstance(given, Mapping) else given)


def read_list(path: str | os.PathLike, what: str) -> Names:
    """
    The texts in a UTF-8 file, without blanks at their ends; empty ones are left out.

    Args:
        path: a text file with one a line; a `.json` file with a list of texts, or an object of `name of the class:
            text`; a `.csv` or `.tsv` file whose first line names its columns, one of them for the texts (`name`,
            `label`, `class_name`, `template`, ...) and maybe one for the class that each is for (`id`, `class`,
            `folder`, ...).
        what: how messages call the file, such as "the file of labels".

    Raises:
        ValueError: it is something else, or has no text. OSError: it can't be read.
    """
    name, suffix = f"{what} {os.fspath(path)}", Path(path).suffix.lower()
    if suffix in OTHER_FILES:
        raise ValueError(f"{name} is none that can be read: expected {', '.join(LIST_FILES)}.")
    text = _utf8(Path(path).expanduser().read_bytes(), name)
    if suffix == ".json":
        texts = _from_json(text, name)
    elif suffix in (".csv", ".tsv"):
        texts = _from_table(text, name, "\t" if suffix == ".tsv" else None)
    else:
        texts = [line.strip() for line in text.splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"{name} is empty.")
    if isinstance(texts, Mapping) and all(key.isdecimal() for key in texts):  # places
        texts = dict(sorted(texts.items(), key=lambda item: int(item[0])))
    return texts


def _utf8(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8-sig")
        if "\0" not in text:
            return text
        reason, encoding = "it has zero bytes", "utf-16"
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
    kind = "UTF-16, as PowerShell writes it" if encoding == "utf-16" else "Latin-1"
    raise ValueError(
        f"{name} is not UTF-8 text ({reason}), but maybe {kind}: save it as UTF-8, for instance with iconv -f "
        f"{encoding} -t utf-8."
    )


def _from_json(text: str, name: str) -> Names:
    try:
        content = json.loads(text, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}.") from error
    texts = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(texts, list) or not all(isinstance(item, str) for item in texts):
        raise ValueError(
            f'{name} must hold a list of texts, ["cat", "dog"], or an object {{"name of the class": "text"}}.'
        )
    if isinstance(content, dict):
        return {key.strip(): item.strip() for key, item in content.items()}
    return [item.strip() for item in texts if item.strip()]


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for place, (key, _) in enumerate(pairs) if key in dict(pairs[:place]))
        raise ValueError(f"{twice!r} stands twice in an object")
    return content


def read_table(path: str | os.PathLike, what: str) -> tuple[list[str], list[list[str]]]:
    """
    A UTF-8 table whose first line names its columns, between commas, semicolons or tabs: their names in small letters
    with `_` for blanks, and the cells of each row that is not empty, without blanks at their ends.

    Raises:
        ValueError: it is no table. OSError: it can't be read.
    """
    name = f"{what} {os.fspath(path)}"
    text = _utf8(Path(path).expanduser().read_bytes(), name)
    return _table(text, name, "\t" if Path(path).suffix.lower() == ".tsv" else None)[:2]


def _table(text: str, name: str, delimiter: str | None) -> tuple[list[str], list[list[str]], str]:
    """The header as columns are found by, the rows, and the first line as it is."""
    first = text.lstrip("\n\r").partition("\n")[0]
    try:
        table = list(csv.reader(io.StringIO(text), delimiter=delimiter or max(",;\t", key=first.count), strict=True))
    except csv.Error as error:
        raise ValueError(f"{name} is not a table: {error}.") from error
    rows = [[cell.strip() for cell in row] for row in table if any(cell.strip() for cell in row)]
    return [cell.lower().replace(" ", "_") for cell in rows[0]] if rows else [], rows[1:], first.strip()


def _from_table(text: str, name: str, delimiter: str | None) -> Names:
    header, rows, first = _table(text, name, delimiter)
    columns = [header.index(word) for word in _TEXT_HEADERS if word in header]
    if not columns:
        raise ValueError(
            f"{name} must name its columns in the first line, one of them 'name'; that line is {first!r}. A "
            "list without such a line belongs into a .txt file."
        )
    in_words = [column for column in columns if not all("".join(row[column : column + 1]).isdecimal() for row in rows)]
    column = (in_words or columns)[0]
    wrong = next((number for number, row in enumerate(rows) if len(row) != len(header) or not row[column]), None)
    if wrong is not None:
        raise ValueError(
            f"{name}: row {wrong + 1} is {rows[wrong]}, and the columns are {header}: give each row a text, in quotes "
            "if it has commas."
        )
    texts = [row[column] for row in rows]
    keys = [place for place, word in enumerate(header) if place != column and word in _KEY_HEADERS]
    by_key = {row[keys[0]]: item for row, item in zip(rows, texts, strict=True)} if keys else {}
    return by_key if len(by_key) == len(texts) else texts
