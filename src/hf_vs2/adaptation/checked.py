"""Images to label, and the labels that came back: two columns of a table, `file` and `label`."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..data.labels.lists import read_table
from ..data.labels.names import find_names
from ..files.atomic import replace_text
from .answers import Answers


TO_LABEL = 100
COLUMNS = ("file", "plain_answer", "adapted_answer", "label")


def write_to_label(path: Path, names: Sequence[str], labels: Sequence[str], answers: Answers, seed: int) -> bool:
    """A list of 100 images (or all, if there are fewer) drawn at random, whose column `label` is empty. One in which
    somebody has filled in labels stays as it is.

    Returns:
        `bool`: whether it was written.
    """
    if path.is_file() and read_checked(path):
        return False
    chosen = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[:TO_LABEL].tolist()
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for row in chosen:
        table.writerow([names[row], labels[int(answers.plain[row])], labels[int(answers.adapted[row])], ""])
    replace_text(path, text.getvalue())
    return True


def read_checked(path: str | os.PathLike) -> dict[str, str]:
    """
    File -> label, of the rows with a label.

    Raises:
        ValueError: it is no table with the columns `file` and `label`, or has two labels for a file. OSError: it can't
            be read.
    """
    header, rows = read_table(path, "the file of checked labels")
    missing = [name for name in ("file", "label") if name not in header]
    if missing:
        raise ValueError(
            f"{path} has no column {missing[0]!r}; its first line is {', '.join(header)!r}. Fill in the column "
            "'label' of the to_label.csv that adapt wrote, and keep its first line."
        )
    file, label = header.index("file"), header.index("label")
    found: dict[str, str] = {}
    for row in rows:
        if len(row) > max(file, label) and row[label] and found.setdefault(row[file], row[label]) != row[label]:
            raise ValueError(
                f"{path} has {row[file]!r} twice, as {found[row[file]]!r} and as {row[label]!r}: keep one of the rows."
            )
    return found


def checked_labels(path: str | os.PathLike, names: Sequence[str], labels: Sequence[str]) -> torch.Tensor:
    """
    The label of each image as its place among the labels, `(n,)`, -1 where it is not checked.

    Args:
        names: of the images, see [`image_names`]. labels: those to choose from.

    Raises:
        ValueError: no row has a label, a file is none of the images, or a label none of the labels.
    """
    given = read_checked(path)
    if not given:
        raise ValueError(f"{path} has no label yet: fill in its column 'label', for some of the rows at least.")
    places = {name: place for place, name in enumerate(names)}
    unknown = [name for name in given if name not in places]
    if unknown:
        raise ValueError(
            f"{path} names {unknown[0]!r}, which is none of these {len(names):,} images (of {len(given)} labelled "
            f"rows {len(unknown)} are not). Give the same images as when to_label.csv was written."
        )
    own = list(dict.fromkeys(given.values()))
    found = dict(zip(own, find_names(own, {name: name for name in labels}), strict=True))
    wrong = [name for name in own if found[name] is None]
    if wrong:
        raise ValueError(
            f"{path} has the label {wrong[0]!r}, which is none of those to choose from: {', '.join(labels[:10])}"
            f"{', ...' if len(labels) > 10 else ''}. Leave the label empty where none of them fits."
        )
    number = {name: place for place, name in enumerate(labels)}
    target = torch.full((len(names),), -1)
    for name, label in given.items():
        target[places[name]] = number[str(found[label])]
    return target
