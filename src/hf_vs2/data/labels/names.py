"""Names of labels: read from files, cleaned for prompts, matched with the classes of a data set. All commands and
functions that take names take them through here, so that one list means the same everywhere.

Names are a list of strings, or a mapping from the data set's own name of a class to the name that prompts use.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers.utils import logging

from .lists import LIST_FILES, OTHER_FILES, Names, names_in, read_list


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)

# What comes before the class in the names of CUB-200 (`001.Black_footed_Albatross`) and SUN397 (`/a/apse/indoor`).
NUMBERING = re.compile(r"^(?:\d{3}\.|/[a-z]/)")
# What comes before it in other folders: `01_cat`, `1. cat`, `n02085620-Chihuahua`. A name may well begin like that
# (`8-ball`), so prompts keep it, and only matching looks past it.
_OTHER_NUMBERING = re.compile(r"^(?:n\d{8}|\d+)[\s._)-]+(?=[^\W\d])")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?", re.ASCII)

_SHOWN = 8


# What prompts say


def clean_class_names(class_names: Iterable[str], clean: bool = True, what: str = "class_names") -> list[str]:
    """
    Class names as they are read in a prompt: `_` becomes a blank, blanks at the ends and the numbering of CUB-200
    (`001.`) and SUN397 (`/a/`) go, and accents are composed (NFC).

    Args:
        class_names: the names, in the order of the labels.
        clean: `False` leaves them as they are; they are checked all the same.
        what: how messages call them.

    Raises:
        ValueError: no name, an empty one, or one that occurs twice (its two classes could not be told apart).
        TypeError: one string in place of a list, or a name that is not a string.
    """
    first: dict[str, tuple[int, str]] = {}
    for index, name in enumerate(names_in(class_names, what)):
        if not isinstance(name, str):
            raise TypeError(f"{what}[{index}] is {name!r}, a {type(name).__name__}: every name must be a string.")
        if re.search("[\ud800-\udfff]", name):  # other bytes on the command line or in the name of a file
            raise ValueError(f"{what}[{index}] is {name!r}, which is not UTF-8 text: write it in UTF-8.")
        cleaned = clean_name(name) if clean else name
        if not cleaned.strip():
            raise ValueError(f"{what}[{index}] is empty: every class needs a name to make a prompt of.")
        if cleaned in first:
            number, other = first[cleaned]
            spelled = "" if other == name else f", as {other!r} and {name!r}"
            raise ValueError(
                f"{what} has {cleaned!r} twice (at {number} and {index}{spelled}): two classes with one name get the "
                "same prompts, and each half of the score; tell them apart, as in 'crane (bird)'."
            )
        first[cleaned] = index, name
    if not first:
        raise ValueError(f"{what} is empty: give the names of the classes to choose from.")
    names = list(first)
    if clean and len(names) > 1 and all(name[0].isdigit() for name in names):
        logger.warning_once(
            f"All {len(names)} names begin with a number ({names[0]!r}, {names[1]!r}, ...), which CLIP "
            "reads as part of the name. If it only counts the classes, give names without it."
        )
    return names


def clean_name(name: str) -> str:
    """One name of [`clean_class_names`]."""
    name = unicodedata.normalize("NFC", name).strip()
    return " ".join((NUMBERING.sub("", name) or name).replace("_", " ").split())


# Which class is which


class MatchedNames(NamedTuple):
    """Names given for the classes of a data set."""

    names: list[str]
    """All that there are to choose from, in the order given."""
    places: list[int]
    """Of each class of the data set, its place among them."""
    told: str
    """What was matched, in a sentence."""


def match_names(own: Sequence[str], given: Names) -> MatchedNames:
    """
    The classes of a data set among names that were given: by name, see [`find_names`]. Classes that are all numbers,
    and no name among those given, are matched by number: class 10 has the name at place 10, or, where as many names as
    classes are given, the smallest number the first name.

    Args:
        own: the data set's own names of its classes.
        given: a list with a name for each of them, in any order; names of no class compete with the others. Or a
            mapping from the data set's own names to those that prompts are to use.

    Raises:
        ValueError: a class has no name among those given, or two have the same. The message shows both sides.
    """
    names = names_in(given)
    matches = find_names(own, given if isinstance(given, Mapping) else {name: name for name in names})
    how = "by name"
    if not any(matches) and all(name.isdecimal() for name in own) and not isinstance(given, Mapping):
        matches, how = _by_number([int(name) for name in own], names), "by number"
    both = (
        f"The {len(own)} classes of the data set ({_listed(own)}) and the {len(names)} labels given ({_listed(names)})"
    )
    missing = [name for name, match in zip(own, matches, strict=True) if match is None]
    if missing:
        raise ValueError(
            f"{both} do not fit: no label for {_listed(missing)}. Give each class its name, in "
            "any order (case, '_', '-', blanks and numbers before a name do not count); or map it to another name, "
            f"as in {json.dumps({missing[0]: 'other name'}, ensure_ascii=False)}, for --labels in a .json file."
        )
    places = {name: place for place, name in enumerate(names)}
    matched = [places[name] for name in matches if name is not None]
    place, number = Counter(matched).most_common(1)[0]
    if number > 1:
        sharing = [name for name, theirs in zip(own, matched, strict=True) if theirs == place]
        raise ValueError(f"{both} do not fit: {names[place]!r} is the label of {_listed(sharing)}.")
    taken = set(matched)
    others = [name for place, name in enumerate(names) if place not in taken]
    pairs = [
        mine if mine == names[place] else f"{mine} = {names[place]}" for mine, place in zip(own, matched, strict=True)
    ]
    told = (
        f"The {len(own)} classes of the data set were found {how} among the {len(names)} labels given: "
        f"{_listed(pairs)}."
    )
    if others:
        told += f" No class of it, but labels to choose from all the same: {_listed(others)}."
    return MatchedNames(names, matched, told)


def names_by_place(given: Names) -> list[str]:
    """The names for labels that are numbers without names, in their order. A mapping of other names than the numbers
    from 0 is a `ValueError`."""
    if isinstance(given, Mapping) and sorted(given) != sorted(map(str, range(len(given)))):
        raise ValueError(
            f"The labels of the data set are numbers without names, and those given are for {_listed(list(given))}: "
            f"give names for 0 to {len(given) - 1}, or a list in that order."
        )
    return [given[str(place)] for place in range(len(given))] if isinstance(given, Mapping) else names_in(given)


def find_names(
    own: Sequence[str], classes: Mapping[str, str], aliases: Mapping[str, str] | None = None
) -> list[str | None]:
    """
    For each class of a data set the name that prompts use for it, or `None`. Case, `_`, `-`, blanks, other marks and
    leading numbers do not count where that is unambiguous, and one of several words for a class (`"tabby, tabby cat"`)
    is enough.

    Args:
        own: the data set's names of its classes.
        classes, aliases: names of classes, to the name that prompts use.
    """
    pairs = [*classes.items(), *(aliases or {}).items()]
    spellings = (
        pairs,
        [(name, name) for _, name in pairs],
        [(word, name) for label, name in pairs for word in label.split(",")],
    )
    # ImageNet tells `cardigan` (clothing) from `Cardigan` (a dog) by case alone, so a table holds only what means one
    # class.
    tables = [(key, _unambiguous(key, some)) for some in spellings for key in (_words, _letters, _unnumbered)]
    exact = dict(pairs)

    def find(label: str) -> str | None:
        if label in exact:
            return exact[label]
        return next((table[key(label)] for key, table in tables if key(label) in table), None)

    return [find(label) for label in own]


def _unambiguous(key: Callable[[str], str], pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    names: dict[str, set[str]] = {}
    for spelling, name in pairs:
        names.setdefault(key(spelling), set()).add(name)
    return {spelling: meanings.pop() for spelling, meanings in names.items() if spelling and len(meanings) == 1}


def _words(name: str) -> str:
    words = " ".join(
        re.sub(r"[\s_-]+", " ", NUMBERING.sub("", unicodedata.normalize("NFC", name).strip()).casefold()).split()
    )
    return str(int(words)) if words.isdecimal() else words


def _letters(name: str) -> str:
    return "".join(letter for letter in _words(name) if letter.isalnum())


def _unnumbered(name: str) -> str:
    return _letters(_OTHER_NUMBERING.sub("", name.strip()))


def _by_number(own: Sequence[int], names: Sequence[str]) -> list[str | None]:
    ranks = {number: place for place, number in enumerate(sorted(own))}
    if 0 in ranks and max(own) < len(names):
        return [names[number] for number in own]
    if len(ranks) == len(own) == len(names):
        return [names[ranks[number]] for number in own]
    return [None] * len(own)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


# Label columns of data sets


def class_names_of(dataset: Any, label_column: str | None) -> list[str] | None:
    """The names of the classes in a data set's column, in the order of its labels; `None` for numbers without names. A
    column of names is numbered in their order, by value where all are numbers."""
    import datasets

    feature = (dataset.features or {}).get(label_column)
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names or []) or None
    if getattr(feature, "dtype", None) in ("string", "large_string") and isinstance(dataset, datasets.Dataset):
        return sorted_names(name for name in dataset.unique(label_column) if name is not None)
    return None


def sorted_names(names: Iterable[str]) -> list[str]:
    """Different class names in the order of their labels: by letters, and by value where all are numbers (10 after
    9)."""
    different = sorted({name.strip() for name in names})
    if all(_NUMBER.fullmatch(name) for name in different):
        return sorted(different, key=lambda name: (float(name), name))
    return different


def with_numbered_labels(dataset: Dataset, label_column: str) -> Dataset:
    """A data set whose column of names is one of numbers with names (`ClassLabel`); others as they are."""
    return number_labels({"": dataset}, label_column)[""]


def number_labels(splits: Mapping[str, Any], label_column: str) -> dict[str, Any]:
    """Splits whose column of names, if they have one, is one of class labels, the same in all of them; and whole
    numbers that came as fractions, as tables with empty cells have them, are integers. Streams are read once."""
    import datasets

    labels_of: dict[str, list[str | None]] = {}
    splits = dict(splits)
    texts = ("string", "large_string")
    kinds = {split: getattr((part.features or {}).get(label_column), "dtype", "") for split, part in splits.items()}
    for split, part in splits.items():
        if kinds[split] in ("float32", "float64") and isinstance(part, datasets.Dataset):
            splits[split] = part = _with_whole_labels(part, label_column)
        is_number = isinstance(part, datasets.Dataset) and isinstance(part.features.get(label_column), datasets.Value)
        # Numbers without names in one split are names where another has names.
        if kinds[split] not in texts and not (is_number and set(kinds.values()) & set(texts)):
            continue
        column = part.select_columns([label_column])
        labels = (
            column[label_column][:] if isinstance(column, datasets.Dataset) else [row[label_column] for row in column]
        )
        labels_of[split] = [None if label is None else str(label).strip() for label in labels]
    if not labels_of:
        return splits
    names = sorted_names(name for labels in labels_of.values() for name in labels if name is not None)
    number: dict[str | None, int | None] = {None: None} | {name: place for place, name in enumerate(names)}
    feature = datasets.ClassLabel(names=names)
    numbered = dict(splits)
    for split, labels in labels_of.items():
        part = splits[split]
        if isinstance(part, datasets.Dataset):  # `cast_column` would copy the images
            numbers = [number[label] for label in labels]
            numbered[split] = part.remove_columns(label_column).add_column(label_column, numbers, feature=feature)
        else:
            numbered[split] = part.cast_column(label_column, feature)
    return numbered


def _with_whole_labels(dataset: Dataset, label_column: str) -> Dataset:
    import datasets

    labels = dataset.select_columns([label_column]).with_format(None)[label_column][:]
    labels = [None if label is None or math.isnan(label) else label for label in labels]
    if not all(label is None or label.is_integer() for label in labels):
        return dataset
    numbers = [None if label is None else int(label) for label in labels]
    whole = datasets.Value("int64")
    return dataset.remove_columns(label_column).add_column(label_column, numbers, feature=whole)


def check_names(dataset: Any, label_column: str | None, given: Names) -> str | None:
    """Refuse names that do not fit the labels of a data set, by a `ValueError` that shows both sides, before anything
    is made of its images (a stream shows too late), and tell what was matched with what."""
    own = class_names_of(dataset, label_column)
    if own is not None:
        return match_names(own, given).told
    if labels := _numbers_in(dataset, label_column):
        names = names_by_place(given)
        if max(labels) >= len(names):
            raise ValueError(
                f"The labels in column {label_column!r} are numbers without names, up to {max(labels)}; the "
                f"{len(names)} labels given ({_listed(names)}) are for 0 to {len(names) - 1}."
            )
    return None


def check_labelled(dataset: Any, label_column: str) -> None:
    """Refuse, by a `ValueError` with the column, labels that are hidden (-1, or empty) where each image needs one; a
    stream shows too late."""
    if -1 in _numbers_in(dataset, label_column):
        raise ValueError(
            f"Images have no label in column {label_column!r} (it is -1 or empty), and accuracy needs that of each: "
            "give a split with labels, or leave these images out."
        )


def _numbers_in(dataset: Any, label_column: str | None) -> set[int]:
    """The different labels of a column of integers, -1 for none; empty for other columns and for streams."""
    import datasets

    kind = str(getattr((dataset.features or {}).get(label_column), "dtype", ""))
    if not isinstance(dataset, datasets.Dataset) or not kind.startswith(("int", "uint", "bool")):
        return set()
    return {-1 if label is None else int(label) for label in dataset.unique(label_column)}


# Files and command lines


def read_labels(values: Sequence[str]) -> Names:
    """The names that `--labels` stands for: those given, or those in a file (see [`read_list`]) where the only value
    is one. Blanks and line breaks in a name become one blank each. A file that is not there or can't be read, and what
    may be one label or several, is a `ValueError`."""
    is_file = len(values) == 1 and os.path.isfile(os.path.expanduser(values[0]))
    for value in values if not is_file else ():
        _refuse_path(value)
    texts: Names = read_list(values[0], "the file of labels") if is_file else values
    # A table or JSON says itself where a name ends, and so do the lines of a text file, but for marks left from a
    # list.
    is_clear = is_file and values[0].lower().endswith((".json", ".csv", ".tsv"))
    names = [name.strip() for name in names_in(texts)]
    marks = r"[,;|\n]" if len(names) == 1 else r"[,;]$" if is_file else r"[,;]$|\w,\w"
    unclear = next((name for name in names if re.search(marks, name)), None)
    if unclear is not None and not is_clear:
        parts = [part.strip() for part in re.split(r"[,;|\n]", unclear) if part.strip()]
        raise ValueError(
            f"{values[0] if is_file else '--labels'} has {unclear!r}: is that one label, or several? Several are "
            f"given as --labels {' '.join(map(shlex.quote, parts))}, or one a line in a text file; one label with "
            f"such marks in a .json file: {json.dumps([unclear], ensure_ascii=False)}"
        )
    if isinstance(texts, Mapping):
        return {" ".join(key.split()): " ".join(name.split()) for key, name in texts.items()}
    return [" ".join(name.split()) for name in names]


def _refuse_path(value: str) -> None:
    """Refuse a label that must have been meant as a file."""
    path = Path(os.path.expanduser(value))
    inside = "/" in value and path.parent != Path("/") and os.path.isdir(path.parent)
    if not inside and path.suffix.lower() not in (*LIST_FILES, *OTHER_FILES):
        return
    if os.path.exists(path):
        raise ValueError(f"--labels {value}: give a file of labels alone, or the labels themselves.")
    near = difflib.get_close_matches(path.name, os.listdir(path.parent) if os.path.isdir(path.parent) else [], n=1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    raise ValueError(f"--labels {value}: there is no such file{hint}")
