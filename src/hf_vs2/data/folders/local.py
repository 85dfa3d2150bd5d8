"""A path on this machine to {split name: data set}."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .layout import CLASS_LISTS, Part, add_classes, split_by_folder, split_by_name
from .listing import Listing, image_suffixes, list_folder, suffix_of


if TYPE_CHECKING:
    from datasets import Dataset


METADATA_FILES = frozenset({"metadata.csv", "metadata.jsonl", "metadata.parquet"})
# Files that hold images, by the builder of `datasets` that reads them. The first that a folder has files for reads it.
_ARCHIVES = {"parquet": (".parquet",), "arrow": (".arrow",), "webdataset": (".tar", ".tar.gz", ".tgz")}
# Lists of paths of images. In folders, other JSON files are settings and results.
_LISTS = (".csv", ".tsv", ".jsonl", ".ndjson")
DATA_SUFFIXES = frozenset((*chain(*_ARCHIVES.values()), *_LISTS, ".json"))
_TEXTS = {"string", "large_string"}
# What people call the column of paths, without case, blanks and `_`; the first that is there is taken.
_PATH_COLUMNS = (
    "image",
    "filename",
    "path",
    "imagepath",
    "filepath",
    "file",
    "img",
    "imgpath",
    "imagefile",
    "imagename",
)


def open_file(path: Path, image_column: str, streaming: bool) -> dict[str, Any]:
    import datasets

    suffix = suffix_of(path.name)
    if suffix not in DATA_SUFFIXES or not path.is_file():
        raise ValueError(
            f"{path} is not a data set: expected a folder, or a .parquet or .arrow file, a .tar file of webdataset, "
            "or a .csv, .tsv or .jsonl file of paths"
        )
    (split,) = split_by_name([path.name])
    if suffix == ".arrow":
        return {split: _streamed(datasets.Dataset.from_file(str(path)), streaming)}
    for builder, suffixes in _ARCHIVES.items():
        if suffix in suffixes:
            return _open_archives(path.parent, builder, {split: [path.name]}, image_column, streaming)
    return {split: _streamed(_read_lists([path], image_column).dataset(split), streaming)}


def open_folder(
    path: Path, image_column: str, config_name: str | None, streaming: bool, on_error: str, class_words: bool
) -> dict[str, Any]:
    import datasets

    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = datasets.load_from_disk(str(path))
        splits = dict(saved) if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
        return {name: _streamed(part, streaming) for name, part in splits.items()}
    if config_name is not None or _has_configs(path / "README.md"):
        return load_dataset(path, name=config_name, streaming=streaming)

    listing = list_folder(path, on_error)
    tables = [file for file in listing.files if os.path.basename(file) in METADATA_FILES]
    for builder, suffixes in _ARCHIVES.items():
        if archives := [file for file in listing.pick(suffixes) if file not in tables]:
            splits = _open_archives(path, builder, split_by_name(archives), image_column, streaming)
            listing.keep(archives)
            listing.say_left_out()
            return splits
    if tables:
        splits = _open_metadata(listing, tables, image_column)
    elif images := listing.pick(image_suffixes(), sniff=True):
        texts = [file for file in listing.files if os.path.basename(file) in CLASS_LISTS]
        listing.keep([*images, *texts])
        parts = split_by_folder(listing.root, images, listing.left_out)
        class_names = add_classes(listing.root, parts, texts, class_words)
        splits = {split: _dataset_of_files(listing, part, class_names, split) for split, part in parts.items()}
    elif lists := listing.pick(_LISTS):
        listing.keep(lists)
        splits = {
            split: _read_lists([path / file for file in files], image_column).dataset(split)
            for split, files in split_by_name(lists).items()
        }
    else:
        listing.keep([])
        raise ValueError(
            f"{path} holds no data set that can be read: expected images ({', '.join(sorted(image_suffixes()))}), "
            "parquet files, webdataset's .tar files, lists of paths (.csv, .tsv, .jsonl) or a folder written by "
            f"`save_to_disk`, found {listing.describe_left_out() or 'nothing'}"
        )
    listing.say_left_out()
    return {name: _streamed(part, streaming) for name, part in splits.items()}


def _streamed(part: Dataset, streaming: bool) -> Any:
    return part.to_iterable_dataset() if streaming else part


def _has_configs(card: Path) -> bool:
    """Whether a data set's card says which files are which split."""
    from huggingface_hub import metadata_load

    try:
        return bool((metadata_load(card) or {}).get("configs"))
    except Exception:  # no card, or a README.md that is none: of as many types as YAML and encodings have
        return False


def _open_archives(
    root: Path, builder: str, by_split: Mapping[str, Sequence[str]], image_column: str, streaming: bool
) -> dict[str, Any]:
    """Files that hold images, read by `datasets`. For webdataset, columns get the names that they have elsewhere."""
    import datasets

    data_files = {split: [escape(str(root / file)) for file in files] for split, files in by_split.items()}
    (only, *others) = chain(*by_split.values())
    source = root if others else root / only
    if builder == "parquet" and _features_differ([root / files[0] for files in by_split.values()]):
        # One call would give all splits the features of one: other names for the same numbers.
        splits: dict[str, Any] = {}
        for split, files in data_files.items():
            splits |= load_dataset(source, builder, data_files={split: files}, streaming=streaming)
    else:
        splits = load_dataset(source, builder, data_files=data_files, streaming=streaming)
    features = next(iter(splits.values())).features
    if builder == "parquet" and _holds_paths(features, image_column):
        return {
            split: _streamed(_read_lists([root / file for file in files], image_column).dataset(split), streaming)
            for split, files in by_split.items()
        }
    if builder != "webdataset":
        return splits
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    renamed = {} if image_column in features or not images else {images[0]: image_column}
    if "cls" in features and "label" not in features:
        renamed["cls"] = "label"
    names = [file for file in (root / "classnames.txt", root.parent / "classnames.txt") if file.is_file()]
    for split, part in splits.items():
        if streaming:  # renames by a function, for which `datasets` would decode images, and encode them once more
            for name in images:
                part = part.cast_column(name, datasets.Image(mode=features[name].mode, decode=False))
        splits[split] = part = part.rename_columns(renamed)
        if names and "cls" in features:
            lines = names[0].read_text(encoding="utf-8-sig").splitlines()
            classes = datasets.ClassLabel(names=[line.strip() for line in lines if line.strip()])
            splits[split] = part.cast_column(renamed.get("cls", "cls"), classes)
    return splits


def _features_differ(files: Sequence[Path]) -> bool:
    """Whether parquet files say different things of their columns, such as the order of class names."""
    import pyarrow.parquet as pq

    try:
        return (
            len(files) > 1 and len({(pq.read_schema(file).metadata or {}).get(b"huggingface") for file in files}) > 1
        )
    except (OSError, ValueError):  # `datasets` says which is damaged
        return False


def _holds_paths(features: Mapping[str, Any] | None, image_column: str) -> bool:
    """Whether a table names its images, in place of holding them."""
    columns = features or {}
    kinds = [columns[image_column]] if image_column in columns else list(columns.values())
    dtypes = {getattr(kind, "dtype", None) for kind in kinds}  # a structure has none
    images = {None, "binary", "large_binary", "PIL.Image.Image"}
    return not dtypes & images and bool(dtypes & _TEXTS)


def _open_metadata(listing: Listing, tables: Sequence[str], image_column: str) -> dict[str, Dataset]:
    """The rows of a folder's metadata files. Splits are those of the folders that their images lie in."""
    rows = _read_lists([Path(listing.path(table)) for table in tables], image_column)
    root = os.path.abspath(listing.root)
    files = [os.path.relpath(path or root, root).replace(os.sep, "/") for path in rows.columns[image_column]]
    listing.keep([*tables, *files])
    parts = split_by_folder(listing.root, files, listing.left_out)
    return {split: rows.dataset(split, part.rows) for split, part in parts.items()}


@dataclass
class _Rows:
    """Columns of a data set whose images are files."""

    columns: dict[str, list]
    features: dict[str, Any]

    def dataset(self, split: str, rows: Sequence[int] | None = None) -> Dataset:
        import datasets

        columns = self.columns
        if rows is not None:
            columns = {name: [values[row] for row in rows] for name, values in columns.items()}
        try:
            features = datasets.Features(self.features)
            return datasets.Dataset.from_dict(columns, features=features, split=datasets.NamedSplit(split))
        except UnicodeEncodeError as error:
            raise ValueError(f"A file name is not valid Unicode, rename it: {error.object!r}") from error


def _read_lists(files: Sequence[Path], image_column: str) -> _Rows:
    """Files of rows with a column of paths, which count from the folder that the file is in."""
    import datasets

    together = _Rows({image_column: []}, {image_column: datasets.Image(decode=False)})
    for file in files:
        rows = load_dataset(file, data_files={"train": [escape(str(file))]}, **_reader_of_list(file))["train"]
        if "__index_level_0__" in rows.features and suffix_of(file.name) != ".parquet":  # pandas shifts the columns
            raise ValueError(
                f"{file}: its rows have more fields than its first line names. Give each column a name, and put a "
                "text with commas in quotes"
            )
        paths = _path_column(file, rows.features, image_column)
        num_rows = len(together.columns[image_column])
        for name, values in rows[:].items():
            if name == paths:
                together.columns[image_column] += _absolute(values, file)
            elif name != image_column:
                before = together.features.setdefault(name, rows.features[name])
                column = together.columns.setdefault(name, [None] * num_rows)
                column.extend(values)
                if before != rows.features[name] and {before.dtype, rows.features[name].dtype} & _TEXTS:
                    together.features[name] = datasets.Value("string")  # words in one file, numbers in another
                    column[:] = [value if value is None else str(value) for value in column]
        for values in together.columns.values():  # of other files
            values += [None] * (num_rows + len(rows) - len(values))
    return together


def _reader_of_list(file: Path) -> dict[str, Any]:
    """The builder of `datasets`, and its options."""
    suffix = suffix_of(file.name)
    if suffix not in (".csv", ".tsv"):
        return {"path": "parquet" if suffix == ".parquet" else "json"}
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        header = lines.readline()
    # A class may be called "None" or "NA".
    options = {"keep_default_na": False, "na_values": [""], "skipinitialspace": True}
    return {"path": "csv", "sep": max(",;\t", key=header.count), **options}


def _path_column(file: Path, features: Mapping[str, Any], image_column: str) -> str:
    """The column that the user names, or the first that is called like one of paths."""
    texts = [name for name, kind in features.items() if getattr(kind, "dtype", "") in _TEXTS]
    called = {re.sub(r"[\W_]", "", name.lower()): name for name in reversed(texts)}
    called |= {name: name for name in texts}
    # The second is how `datasets` names several images of a row.
    for name in (image_column, f"{image_column}_file_name", *_PATH_COLUMNS):
        if name in called:
            return called[name]
    raise ValueError(
        f"{file} has no column of paths: expected a header with a column called image, file_name or path, or name it "
        f"with image_column=...; it has {', '.join(features)}"
    )


def _absolute(paths: Sequence[str | None], file: Path) -> list[str | None]:
    """The paths that a list has. Metadata files name what lies inside their folder alone, as in `datasets`."""
    folder = os.path.abspath(file.parent)
    absolute = [
        path if path is None or "://" in path else os.path.normpath(os.path.join(folder, path)) for path in paths
    ]
    if file.name in METADATA_FILES:
        for path, given in zip(absolute, paths, strict=True):
            if path is not None and not Path(path).is_relative_to(folder):
                raise ValueError(f"{file} names {given!r}: expected a path inside {folder}")
    if not any(path is None or "://" in path or os.path.exists(path) for path in absolute):
        raise ValueError(
            f"{file} names no file that is there: {absolute[0]} is the first; paths count from the folder of the list"
        )
    return absolute


def _dataset_of_files(listing: Listing, part: Part, class_names: list[str], split: str) -> Dataset:
    import datasets

    rows = _Rows(
        {"image": [os.path.abspath(listing.path(file)) for file in part.files]},
        {"image": datasets.Image(decode=False)},
    )
    if part.classes is not None:
        number: dict[str | None, int] = {name: i for i, name in enumerate(class_names)}
        rows.columns["label"] = [number.get(name, -1) for name in part.classes]
        rows.features["label"] = datasets.ClassLabel(names=class_names)
    return rows.dataset(split)


def load_dataset(source: str | Path, path: str | None = None, **options: Any) -> dict[str, Any]:
    """`datasets.load_dataset`, whose own failures (lists of examples, errors behind errors) become one line."""
    import datasets

    try:
        return datasets.load_dataset(path or str(source), **options)
    except (FileNotFoundError, ConnectionError) as error:
        raise OSError(
            f"{str(source)!r} is neither a path on this machine nor a data set that the Hub gives: {error}"
        ) from error
    except (ValueError, datasets.exceptions.DatasetsError, tarfile.TarError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        if "corresponds to no data" in reason:
            reason = "it holds no rows"
        hint = " (choose one with config_name=...)" if "config" in reason.lower() else ""
        raise ValueError(f"{source} cannot be opened: {reason}{hint}") from error
