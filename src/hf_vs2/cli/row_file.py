"""Files of rows that grow while a long command runs (.jsonl, .csv), and that a second run continues."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files.json_files import from_json, read_object, to_json, write_json


ROW_SUFFIXES = (".jsonl", ".csv")
_TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  # file names of any bytes


class RowFile:
    """
    A file of rows, each written at once: after an interruption those so far are there.

    The settings that its rows were made with lie beside it, in `NAME.settings.json`. Opened again with the same
    settings, it continues; a row that was cut off in the middle is dropped.

    Args:
        path (`Path`): the file, `.jsonl` (one JSON object a line) or `.csv`.
        columns: those of a `.csv`; a row has a value for each.
        settings: what the rows depend on, as JSON values.

    Raises:
        `ValueError`: the file was written with other settings, or not by this class.
    """

    def __init__(self, path: Path, columns: Sequence[str], settings: Mapping[str, Any]):
        self.path, self.columns = path, list(columns)
        self.is_csv = path.suffix.lower() == ".csv"
        beside = path.with_name(f"{path.name}.settings.json")
        made_with = from_json(to_json(dict(settings) | ({"columns": self.columns} if self.is_csv else {})))
        if path.is_file() and path.stat().st_size:
            self._check(beside, made_with)
            self._drop_half_row()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(beside, made_with)
            path.write_bytes(b"")
        self._file = path.open("a", **_TEXT)
        if self.is_csv and not path.stat().st_size:
            self._write_csv(self.columns)

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows in the file, one after another. Those of a `.csv` hold texts."""
        with self.path.open(**_TEXT) as file:
            for number, row in enumerate(csv.DictReader(file) if self.is_csv else map(_object, file), 1):
                if row is None or "image" not in row:
                    raise ValueError(
                        f"{self.path} is damaged: row {number} is none that was written here. Delete the file, or "
                        "that line of it, and run the command again"
                    )
                yield row

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row: it is in the file when this returns."""
        if self.is_csv:
            self._write_csv([row[column] for column in self.columns])
        else:
            self._file.write(f"{to_json(row)}\n")
            self._file.flush()

    def _write_csv(self, cells: list[Any]) -> None:
        csv.writer(self._file, lineterminator="\n").writerow(cells)
        self._file.flush()

    def _check(self, beside: Path, settings: dict[str, Any]) -> None:
        if not beside.is_file():
            raise ValueError(
                f"{self.path} is there already, and {beside.name}, the settings it was made with, is not beside it: "
                "give another file, or delete it"
            )
        before = read_object(beside)
        names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if names:
            name, *others = names
            more = f", {', '.join(others)}" if others else ""
            raise ValueError(
                f"{self.path} holds rows made with other settings ({name} was {_brief(before.get(name))}, now "
                f"{_brief(settings.get(name))}{more}): give the same ones, or another file, or delete it"
            )

    def _drop_half_row(self) -> None:
        """Cut the file after its last whole row. A line break within quotes of a .csv ends none."""
        end, within_quotes = 0, False
        with self.path.open("rb+") as file:
            for line in file:
                within_quotes ^= self.is_csv and line.count(b'"') % 2 == 1
                if line.endswith(b"\n") and not within_quotes:
                    end = file.tell()
            file.truncate(end)


def _object(line: str) -> dict[str, Any] | None:
    try:
        found = from_json(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _brief(value: Any) -> str:
    text = to_json(value)
    return text if len(text) <= 60 else f"{text[:40]} ... {text[-15:]}"
