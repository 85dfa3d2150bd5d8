"""Sets of images, wherever people have them."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import ImageMode

from .folders.listing import IMAGE_EXTENSIONS, suffix_of
from .folders.local import DATA_SUFFIXES, load_dataset, open_file, open_folder
from .images import UnreadableImageError, open_image
from .labels.names import number_labels, with_numbered_labels


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


__all__ = ["IMAGE_EXTENSIONS", "UnreadableImageError", "load_images", "open_image"]


def load_images(
    source: str | os.PathLike,
    split: str | None = None,
    *,
    image_column: str = "image",
    label_column: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    on_error: str = "raise",
    class_words: bool = True,
) -> Dataset | IterableDataset:
    """
    Opens a set of images, wherever it is; no image is decoded. A path that exists wins over a Hub id of the same name.

    | path | what it gives |
    |---|---|
    | folder of images | one row an image, ordered by path. Other files are left out, and counted in a message |
    | `cat/`, `dog/` in it | a column `label`: the folders are the classes, by number where all are numbers |
    | `train/`, `test/`, `val/` in it | splits, whatever lies around them. Another folder beside them is a split, too |
    | an image beside splits or classes | beside splits it is left out; beside classes its label is -1. It is named |
    | class folders inside others | the level that names classes; refused, with the reason, where that is unclear |
    | Tiny-ImageNet as published | its classes, by `val_annotations.txt` and the words of `words.txt` |
    | folder with `metadata.csv` | its rows, the images by its column `file_name` (`.jsonl` and `.parquet` likewise) |
    | folder of `.parquet` or `.tar` files | their rows, splits by names of files and folders; others stay unread |
    | list: `.csv`, `.tsv`, `.jsonl`, `.parquet` | its rows; paths in a column such as `image` or `file_name` |
    | `.parquet`, `.arrow` or `.tar` file | its rows. A `.tar` is a webdataset: `.cls` is the label |
    | folder of `save_to_disk` | the saved data set |
    | folder with a card that has `configs` | what `datasets` makes of it |

    Hidden files and what systems leave (`__MACOSX`, `Thumbs.db`) are left out; linked folders are read. `.heic` files
    need `pillow-heif`; files without suffix are read if they hold an image. Paths in a list count from its own folder.

    Args:
        source: a local path or the id of a data set on the Hub.
        split (`str`, *optional*): `"train"`, `"train[:600]"`, `"train[10%:]"`, `"train+test"`; may be left out when
            there is only one. Streaming takes `"train"` and `"train[100:600]"`.
        image_column (`str`): column that holds the images. In a list of paths: that of the paths.
        label_column (`str`, *optional*): a column of names becomes one of class labels, the same for all splits;
            "label" is one without being named.
        config_name (`str`, *optional*): configuration of a Hub data set.
        revision (`str`, *optional*): branch, tag or commit of a Hub data set.
        streaming (`bool`): read rows one after another, without preparing a copy on disk.
        on_error (`str`): "skip" leaves out folders that may not be listed.
        class_words (`bool`): call folders named by WordNet ids by the words of a list beside them.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset` whose `image_column` is undecoded
        (`Image(decode=False)`), so that a broken image can be named when it is read.

    Raises:
        FileNotFoundError: the path does not exist.
        OSError: the Hub data set cannot be found or reached, or a folder may not be listed.
        ValueError: the split or column does not exist (the message lists those that do), nothing readable is there, or
            it is not clear what belongs to which split.
    """
    splits = open_splits(
        source,
        image_column=image_column,
        label_column=label_column,
        config_name=config_name,
        revision=revision,
        streaming=streaming,
        on_error=on_error,
        class_words=class_words,
    )
    return undecoded(_select_split(splits, split, source), image_column)


def open_splits(
    source: str | os.PathLike,
    *,
    image_column: str,
    label_column: str | None,
    config_name: str | None,
    revision: str | None,
    streaming: bool,
    on_error: str,
    class_words: bool = True,
) -> dict[str, Any]:
    """All splits of [`load_images`] by name, images decoded as `datasets` does it."""
    path = Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for data sets on the Hub, but {source} is a local path")
        if path.is_dir():
            splits = open_folder(path, image_column, config_name, streaming, on_error, class_words)
        else:
            splits = open_file(path, image_column, streaming)
        splits = number_labels(splits, label_column or "label")
    elif _looks_like_a_path(os.fspath(source)):
        raise FileNotFoundError(f"No data set at {source}: {_what_is_near(path)}")
    else:
        splits = load_dataset(os.fspath(source), name=config_name, revision=revision, streaming=streaming)
        if not streaming:
            splits = number_labels(splits, label_column or "label")
    return splits


def undecoded(dataset: Any, image_column: str) -> Any:
    """`dataset` with `image_column` left as bytes and paths; raises a `ValueError` when it has no such column."""
    import datasets

    features = dataset.features
    if features is None:  # an untyped stream: the columns are known only from its rows
        return dataset
    if image_column not in features:
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        hint = f"; pass image_column={images[0]!r}" if images else ""
        raise ValueError(f"The data set has no column {image_column!r}; it has {', '.join(features)}{hint}")
    feature = features[image_column]
    if isinstance(feature, datasets.Image) and feature.decode:
        return dataset.cast_column(image_column, datasets.Image(mode=feature.mode, decode=False))
    return dataset


def prepared(dataset: Any, image_column: str, label_column: str | None = None) -> Any:
    """A data set to be read by us: checked, undecoded, without a format and without the columns that are not needed.

    Raises:
        TypeError: it is none of `datasets`. ValueError: it has no such column, or no labels in it.
    """
    import datasets

    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        hint = ": open it with `hf_vs2.load_images(source, split=...)`" * isinstance(dataset, (dict, str, os.PathLike))
        raise TypeError(
            f"Expected one split as a `datasets.Dataset` or `IterableDataset`, got {type(dataset).__name__}{hint}"
        )
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom":
        return dataset  # `with_transform`: what the user's function returns is what is read
    dataset = undecoded(dataset, image_column)
    features = dataset.features
    if features is not None and label_column is not None:
        if label_column not in features:
            raise ValueError(f"The data set has no column {label_column!r}; it has {', '.join(features)}")
        if isinstance(dataset, datasets.Dataset):
            dataset = with_numbered_labels(dataset, label_column)
        kind = getattr(dataset.features[label_column], "dtype", "")
        if "int" not in kind and kind != "bool":
            hint = ": open the data set without streaming" if "string" in kind else ""
            raise ValueError(
                f"Column {label_column!r} holds {features[label_column]}: labels must be integers, or names in a data "
                f"set whose rows can be counted{hint}"
            )
    if isinstance(dataset, datasets.Dataset):
        dataset = dataset.select_columns([name for name in (image_column, label_column) if name is not None])
    return dataset.with_format(None)


def image_mode(dataset: Any, image_column: str) -> str | None:
    """
    What `datasets.Image(mode=...)` asks for where that changes RGB pixels, as [`open_image`] takes it: `"L"` for all
    kinds of grey, `"1"` or `"P"`. `None` for colour: it comes as 8-bit RGB anyway, and transparency lies on white, not
    dropped.

    Raises:
        ValueError: Pillow has no such mode.
    """
    mode = getattr((dataset.features or {}).get(image_column), "mode", None)
    if mode is None or getattr(dataset, "format", {}).get("type") == "custom":  # a user's function has been given it
        return None
    try:
        base = ImageMode.getmode(mode).basemode
    except KeyError:
        raise ValueError(f"Column {image_column!r} asks for mode={mode!r}, which Pillow does not have") from None
    return mode if mode == "1" else {"RGB": None}.get(base, base)


def undecoded_column(images: Any) -> tuple[Any, str | None]:
    """A column of a data set (`dataset["image"]`, or transformers' `KeyDataset`) with its images [`undecoded`], and
    their [`image_mode`]. Anything else as it is."""
    rows: Any = getattr(images, "dataset", getattr(images, "source", None))
    column: Any = getattr(images, "key", getattr(images, "column_name", None))
    datasets = sys.modules.get("datasets")  # imported by whoever has a data set
    if datasets is None or not isinstance(rows, datasets.Dataset) or rows.format["type"] == "custom":
        return images, None
    if not isinstance(rows.features.get(column), datasets.Image):
        return images, None
    return undecoded(rows, column).with_format(None)[column], image_mode(rows, column)


def _looks_like_a_path(source: str) -> bool:
    """A Hub id is `name` or `user/name`, never absolute, deeper, or with a data file's extension."""
    return (
        source.startswith((".", "~", os.sep))
        or source.count("/") > 1
        or "\\" in source
        or suffix_of(source) in IMAGE_EXTENSIONS | DATA_SUFFIXES
    )


def _what_is_near(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"the folder {parent} does not exist either"
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return f"{parent} holds {shown}" if names else f"{parent} is empty"


def _select_split(splits: dict[str, Any], split: str | None, source: Any) -> Any:
    import datasets

    there = ", ".join(splits)
    if split is None:
        if len(splits) > 1:
            raise ValueError(f"{source} has several splits ({there}): say which with split=...")
        return next(iter(splits.values()))
    if split in splits:
        return splits[split]
    if any(isinstance(part, datasets.IterableDataset) for part in splits.values()):
        return _select_from_stream(splits, split, source)
    try:
        pieces = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(s) for name, s in splits.items()})
    except (ValueError, AssertionError) as error:
        sizes = ", ".join(f"{name} ({len(part)} rows)" for name, part in splits.items())
        raise ValueError(f"{source} has no split {split!r}; it has {sizes}") from error
    parts = [splits[piece.splitname].select(range(piece.from_ or 0, piece.to)) for piece in pieces]
    joined = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    # `select` keeps the name of the whole split; what the rows were taken from belongs in the records.
    return datasets.Dataset(joined.data, info=joined.info, split=datasets.NamedSplit(split))


def _select_from_stream(splits: dict[str, Any], split: str, source: Any) -> Any:
    match = re.fullmatch(r"\s*([\w.]+)\s*\[\s*(\d*)\s*:\s*(\d*)\s*\]\s*", split)
    if match is None or match[1] not in splits:
        raise ValueError(
            f"{source} has no split {split!r}; it has {', '.join(splits)}"
            " (a stream can be cut by absolute numbers only, as in 'train[100:600]')"
        )
    start, stop = int(match[2] or 0), match[3]
    part = splits[match[1]].skip(start) if start else splits[match[1]]
    return part.take(max(int(stop) - start, 0)) if stop else part
