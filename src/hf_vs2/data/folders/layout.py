"""What a layout of folders means: which splits and which classes."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from transformers.utils import logging

from ..labels.names import sorted_names
from .listing import composed


logger = logging.get_logger(__name__)

# Folder and file names that mean a split: the words of the `datasets` library, and with `set` behind them.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "valset", "devset"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "testset"), "test"),
}
# Folders beside a single `train` that are no classes.
_BESIDE_SPLITS = frozenset({"unlabeled", "unlabelled", "extra", "additional"})
# Folders that say that files are in them, not of which class these are.
_CONTAINERS = frozenset(
    {"images", "image", "imgs", "img", "pictures", "photos", "jpegimages", "jpg", "jpeg", "png", "data"}
)
_WORDNET_ID = re.compile(r"n\d{8}")
# Files that say the words of WordNet ids, in the releases of Tiny-ImageNet and ImageNet.
_WORDNET_FILES = ("words.txt", "synset_words.txt", "LOC_synset_mapping.txt")
# And the classes of Tiny-ImageNet's validation images.
_ANNOTATIONS = "val_annotations.txt"
CLASS_LISTS = frozenset((*_WORDNET_FILES, _ANNOTATIONS))


# Which splits


@dataclass
class Part:
    """One split of a folder of images."""

    files: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    """Places of the files among those of all splits."""
    folders: list[tuple[str, ...]] = field(default_factory=list)
    """Of each file, without the folder that means the split and those around all splits."""
    means_split: set[str] = field(default_factory=set)
    """Names of that folder, in small letters."""
    classes: list[str | None] | None = None
    """Of each file; `None` where no folder says so."""


def split_by_folder(root: str, files: Sequence[str], left_out: Counter[str]) -> dict[str, Part]:
    """
    Splits of the image files below a folder.

    Folders named by a split word (`train`, `val`, `test`, ...), at the first depth where there are any, whatever lies
    around them; or by two that differ in a split word alone (`seg_train`, `seg_test`). Folders beside two splits are
    splits of their own name; images beside them belong to none and are counted in `left_out`.

    Raises:
        ValueError: images lie beside one split folder alone, or in folders elsewhere.
    """
    ways = [tuple(composed(part) for part in file.split("/")[:-1]) for file in files]
    split_of = _split_folders(ways)
    depth = len(next(iter(split_of), ()))
    parents = {folder[:-1] for folder in split_of}
    around = len(os.path.commonprefix(sorted(parents)))
    parts: dict[str, Part] = defaultdict(Part)
    beside: list[str] = []
    stray: list[str] = []
    elsewhere: list[str] = []
    for row, (file, way) in enumerate(zip(files, ways, strict=True)):
        folder = way[:depth]
        if folder in split_of or not split_of:
            split = split_of.get(folder, "train")
        elif len(folder) == depth and folder[:-1] in parents:
            split = re.sub(r"\W+", "_", folder[-1])
            beside.append(file)
        else:
            (elsewhere if len(folder) == depth else stray).append(file)
            continue
        parts[split].files.append(file)
        parts[split].rows.append(row)
        parts[split].folders.append(folder[around:-1] + way[depth:])
        parts[split].means_split.update(name.lower() for name in folder[-1:])
    alone = len(set(split_of.values())) == 1
    names = {file.split("/")[depth - 1].lower() for file in beside}
    a_class = {folder[-1].lower() for folder in split_of} == {"train"} and all(len(way) == depth for way in ways)
    if a_class and names and not names & _BESIDE_SPLITS:  # bus, car and train
        return {"train": Part(list(files), list(range(len(files))), ways)}
    unclear = elsewhere or ([*stray, *beside] if alone and (stray or not names <= _BESIDE_SPLITS) else [])
    if unclear:
        name = "/".join(min(split_of))
        raise ValueError(
            f"{root} has a folder {name!r}, and {len(unclear)} images that are not in such a one, as {unclear[0]}: "
            "which split are they of? Move them into a folder called train or test beside it, or give one folder "
            f"alone, such as {os.path.join(root, name)}"
        )
    if stray:
        left_out[f"image beside the splits, such as {stray[0]}"] += len(stray)
    return dict(parts)


def split_by_name(files: Iterable[str]) -> dict[str, list[str]]:
    """Splits of data files (parquet, tar, lists) by words in the names of folders and files, as `datasets` does."""
    files = list(files)
    sharded = [re.fullmatch(r"data/(\w+)-\d{5}-of-\d{5}.*", file) for file in files]
    splits: dict[str, list[str]] = defaultdict(list)
    if files and all(sharded):
        for match in filter(None, sharded):
            splits[SPLIT_WORDS.get(match[1].lower(), match[1])].append(match[0])
        return dict(splits)
    words = {
        file: [SPLIT_WORDS[token] for token in re.split(r"[-._ 0-9/]+", file.lower()) if token in SPLIT_WORDS]
        for file in files
    }
    for file in files:
        own = re.sub(r"\W+", "_", re.sub(r"[-._ 0-9]*$", "", file.split("/")[-1].split(".")[0])) or "other"
        splits[words[file][0] if words[file] else own if any(words.values()) else "train"].append(file)
    return dict(splits)


def _split_folders(ways: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """{folder: split} of the folders whose names say so, of the first depth that has any."""
    children: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for way in set(ways):
        for depth, name in enumerate(way):
            children[way[:depth]].add(name)
    found: dict[tuple[str, ...], str] = {}
    for parent, names in children.items():
        patterns: dict[str, dict[str, str]] = defaultdict(dict)
        for name in names:
            for match in re.finditer(r"[^-._ 0-9]+", name.lower()):
                if match[0] in SPLIT_WORDS:
                    patterns[f"{name[: match.start()]}*{name[match.end() :]}"][name] = SPLIT_WORDS[match[0]]
        for pattern, alike in patterns.items():
            if pattern == "*" or len(set(alike.values())) > 1:
                found |= {(*parent, name): split for name, split in alike.items()}
    first = min(map(len, found), default=0)
    return {folder: split for folder, split in found.items() if len(folder) == first}


# Which classes


def add_classes(root: str, splits: Mapping[str, Part], texts: Iterable[str], class_words: bool = True) -> list[str]:
    """
    Sets `classes` of each part, and returns the names of all classes in the order of their labels.

    The class is the level of folders that tells images apart by a name: levels with one folder (`images`) and levels
    that only count (`2019`, `2020`; `part1`, `part2`) are none, if another is there. Of several levels the innermost
    is taken, with a warning, unless a name appears in it under several parents: then there are no labels, and a
    warning says so.

    Args:
        root: the folder that holds the images.
        splits: changed in place.
        texts: the files below `root` that are called as one of `CLASS_LISTS`.
        class_words (`bool`): call folders named by WordNet ids by the words that such a list gives.
    """
    tops = {split: _class_folders(part.folders, _CONTAINERS | part.means_split) for split, part in splits.items()}
    by_depth: dict[int, set[tuple[str, ...]]] = defaultdict(set)
    mixed = False
    for top in tops.values():
        found = set(filter(None, top))
        mixed |= len({len(way) for way in found}) > 1
        for way in found:
            by_depth[len(way)].add(way)
    try:
        if mixed:
            levels = dict.fromkeys(by_depth, -1)
            _refuse_unclear(sorted(set().union(*by_depth.values())), -1, mixed)
        else:
            levels = {depth: _class_level(sorted(ways)) for depth, ways in by_depth.items()}
    except _UnclearClasses as unclear:
        logger.warning(
            f"{root}: no labels are read from its folders, because {unclear}. Put class folders side by side, "
            "or write a metadata.csv with the columns file_name and label."
        )
        return []
    for split, part in splits.items():
        names: list[str | None] = [way[levels[len(way)]].strip() if way else None for way in tops[split]]
        if not any(names):
            names = _annotated(root, part, texts)
        if any(names):
            part.classes = names
            if None in names:
                without = [file for file, name in zip(part.files, names, strict=True) if name is None]
                logger.warning(
                    f"{root}: {len(without)} of {len(names)} images have no class folder, such as {without[0]}: their "
                    "label is -1 (unknown)."
                )
    classes = sorted_names({name for part in splits.values() for name in part.classes or () if name is not None})
    if len(classes) == 1:
        logger.warning(f"{root}: all images with a class folder lie in one, {classes[0]!r}: the only class.")
    words = _wordnet_words(root, classes, texts) if class_words else {}
    for part in splits.values():
        if part.classes is not None:
            part.classes = [words.get(name, name) if name is not None else None for name in part.classes]
    return [words.get(name, name) for name in classes]


class _UnclearClasses(ValueError):
    """Folders that do not say which of them are classes; the message says why."""


def _class_folders(ways: Sequence[tuple[str, ...]], containers: Collection[str]) -> list[tuple[str, ...]]:
    """Of each image the folder, below those that hold all, that it may have its class from: the outermost with images
    of its own, to which those deeper down belong. Empty where an image lies beside them."""
    ways = [way[:-1] if len(way) > 1 and way[-1].lower() in _CONTAINERS else way for way in ways]
    common = os.path.commonprefix(sorted(set(ways)))
    if len(set(ways)) > 1 or all(name.lower() in containers for name in common):
        ways = [way[len(common) :] for way in ways]
    holding = set(ways)
    tops = [next((way[:n] for n in range(1, len(way)) if way[:n] in holding), way) for way in ways]
    # Images, and one folder with more of them: no class folders.
    return [()] * len(tops) if () in tops and len({top[:1] for top in tops}) == 2 else tops


def _class_level(ways: Sequence[tuple[str, ...]]) -> int:
    """Which of the levels of folders of one depth is that of the classes."""
    names = [{way[level] for way in ways} for level in range(len(ways[0]))]
    varying = [level for level, there in enumerate(names) if len(there) > 1]
    if not varying:
        return len(names) - 1
    telling = [level for level in varying if not _only_counts(names[level])] or varying
    if len(telling) > 1:
        _refuse_unclear(ways, telling[-1], False)
    return telling[-1]


def _refuse_unclear(ways: Sequence[tuple[str, ...]], level: int, mixed: bool) -> None:
    """Warns that the classes are the innermost folders; raises where these can't be."""
    parent_of: dict[str, tuple[str, ...]] = {}
    for way in ways:
        name, parent = way[level], way[:level]
        if parent_of.setdefault(name, parent) != parent:
            raise _UnclearClasses(f"{name!r} lies in {'/'.join(parent_of[name])!r} and in {'/'.join(parent)!r}")
        if mixed and not any(map(str.isalpha, name)):
            raise _UnclearClasses(f"{name!r} lies deeper than other folders with images")
    shown = ", ".join(sorted_names(parent_of)[:3])
    logger.warning(f"Class folders lie in other folders: the innermost are taken for classes ({shown}, ...).")


def _only_counts(names: Iterable[str]) -> bool:
    """Whether names differ in numbers alone, as 2019 and 2020 or part1 and part2. Ids and `class 1` name something."""
    stems = {re.sub(r"[\d\W_]+", "", name).lower() if re.search(r"\d", name) else name for name in names}
    return (
        len(stems) == 1 and not stems & {"class", "category", "label"} and not all(map(_WORDNET_ID.fullmatch, names))
    )


def _annotated(root: str, part: Part, texts: Iterable[str]) -> list[str | None]:
    """Classes by a `val_annotations.txt` around the images, with name and class in each line, as in Tiny-ImageNet."""
    classes: dict[str, str] = {}
    for text in texts:
        folder, _, name = text.rpartition("/")
        if name == _ANNOTATIONS and all(file.startswith(f"{folder}/" * bool(folder)) for file in part.files):
            classes |= dict(fields[:2] for fields in _fields(root, text, "\t"))
    return [classes.get(file.rpartition("/")[2]) for file in part.files]


def _wordnet_words(root: str, classes: Sequence[str], texts: Iterable[str]) -> dict[str, str]:
    """The first word of each WordNet id, or all words if several ids have the first; empty unless all are ids."""
    if not classes or not all(map(_WORDNET_ID.fullmatch, classes)):
        return {}
    beside = [f"../{name}" for name in _WORDNET_FILES]  # of tiny-imagenet-200/val, given alone
    for text in [*sorted(texts, key=lambda text: text.count("/")), *beside]:
        if text.rpartition("/")[2] in _WORDNET_FILES and os.path.isfile(os.path.join(root, text)):
            words = {fields[0]: fields[1].strip() for fields in _fields(root, text, None)}
            if words.keys() >= set(classes):
                first = {name: words[name].split(",")[0].strip() for name in classes}
                often = Counter(first.values())
                return {name: word if often[word] == 1 else words[name] for name, word in first.items()}
    return {}


def _fields(root: str, text: str, separator: str | None) -> Iterator[list[str]]:
    """The lines of a text file, cut at a separator; with `None`, once at the first blank."""
    with open(os.path.join(root, text), encoding="utf-8-sig", errors="replace") as lines:
        for line in lines:
            fields = line.rstrip("\r\n").split(separator, 1 if separator is None else -1)
            if len(fields) > 1:
                yield fields
