"""Sets of images, wherever people have them."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import ImageMode

from .images import UnreadableImageError, open_image


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


__all__ = ["UnreadableImageError", "load_images", "open_image"]

IMAGE_EXTENSIONS = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".webp", ".bmp", ".dib"),
        *(".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
    )
)
METADATA_FILES = frozenset({"metadata.csv", "metadata.jsonl", "metadata.parquet"})
# Folder and file names that mean a split; the same words as the `datasets` library.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def load_images(
    source: str | os.PathLike,
    split: str | None = None,
    *,
    image_column: str = "image",
    config_name: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """
    Opens a set of images, wherever it is; no image is decoded.

    Args:
        source: a data set id on the Hub, or a local path: a folder of images (class folders become a `label` column,
            top-level `train` / `test` / `validation` folders become splits), a folder of parquet files
            (`data/train-00000-of-00001.parquet`, ...), one parquet or arrow file, or a folder written by
            `save_to_disk`. A path that exists wins over a Hub id of the same name.
        split (`str`, *optional*): `"train"`, `"train[:600]"`, `"train[10%:]"`, `"train+test"`; may be left out when
            there is only one. Streaming takes `"train"` and `"train[100:600]"`.
        image_column (`str`): column that holds the images.
        config_name (`str`, *optional*): configuration of a Hub data set.
        revision (`str`, *optional*): branch, tag or commit of a Hub data set.
        streaming (`bool`): read rows one after another, without preparing a copy on disk.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset` whose `image_column` is undecoded
        (`Image(decode=False)`), so that a broken image can be named when it is read.

    Raises:
        FileNotFoundError: the path does not exist.
        OSError: the Hub data set cannot be found or reached.
        ValueError: the split or column does not exist (the message lists those that do), or nothing readable is there.
    """
    path = Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for data sets on the Hub, but {source} is a local path")
        splits = _load_local(path, config_name, streaming)
    elif _looks_like_a_path(os.fspath(source)):
        raise FileNotFoundError(f"No data set at {source}: {_what_is_near(path)}")
    else:
        name = os.fspath(source)
        splits = _load_dataset(name, name, name=config_name, revision=revision, streaming=streaming)
    return undecoded(_select_split(splits, split, source), image_column)


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
    suffix = os.path.splitext(source)[1].lower()
    return (
        source.startswith((".", "~", os.sep))
        or source.count("/") > 1
        or "\\" in source
        or suffix in IMAGE_EXTENSIONS | {".parquet", ".arrow"}
    )


def _what_is_near(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"the folder {parent} does not exist either"
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return f"{parent} holds {shown}" if names else f"{parent} is empty"


def _load_dataset(source: str | Path, *arguments: str, **options: Any) -> dict[str, Any]:
    """`datasets.load_dataset`, whose own failures (lists of examples, errors behind errors) become one line."""
    import datasets

    try:
        return datasets.load_dataset(*arguments, **options)
    except (FileNotFoundError, ConnectionError) as error:
        raise OSError(
            f"{str(source)!r} is neither a path on this machine nor a data set that the Hub gives: {error}"
        ) from error
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        hint = " (choose one with config_name=...)" if "config" in reason.lower() else ""
        raise ValueError(f"{source} cannot be opened: {reason}{hint}") from error


def _load_local(path: Path, config_name: str | None, streaming: bool) -> dict[str, Any]:
    """A local path to {split name: data set}."""
    import datasets

    if path.is_file():
        return _load_file(path, streaming)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = datasets.load_from_disk(str(path))
        splits = dict(saved) if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
        return {name: part.to_iterable_dataset() if streaming else part for name, part in splits.items()}

    files = _list_files(path)
    names = {file.name for file in files}
    has_parquet = any(file.suffix.lower() == ".parquet" and file.name not in METADATA_FILES for file in files)
    if (has_parquet and "README.md" in names) or config_name is not None:  # the card may define configurations
        return _load_dataset(path, str(path), name=config_name, streaming=streaming)
    if has_parquet:
        return _load_dataset(path, "parquet", data_dir=str(path), streaming=streaming)
    if names & METADATA_FILES:
        return _load_dataset(path, "imagefolder", data_dir=str(path), streaming=streaming)

    images = [file for file in files if file.suffix.lower() in IMAGE_EXTENSIONS]
    if not images:
        found = ", ".join(sorted({file.suffix or file.name for file in files})[:10]) or "nothing"
        raise ValueError(
            f"{path} holds no data set that can be read: expected images ({', '.join(sorted(IMAGE_EXTENSIONS))}), "
            f"parquet files or a folder written by `save_to_disk`, found {found}"
        )
    splits = _image_folder(path, images)
    return {name: part.to_iterable_dataset() if streaming else part for name, part in splits.items()}


def _load_file(path: Path, streaming: bool) -> dict[str, Any]:
    import datasets

    split = SPLIT_WORDS.get(re.split(r"[-._ ]", path.name.lower())[0], "train")
    if path.suffix.lower() == ".parquet":
        return _load_dataset(path, "parquet", data_files={split: str(path)}, streaming=streaming)
    if path.suffix.lower() == ".arrow":
        part = datasets.Dataset.from_file(str(path))
        return {split: part.to_iterable_dataset() if streaming else part}
    raise ValueError(f"{path} is not a data set: expected a folder, or a .parquet or .arrow file")


def _list_files(root: Path) -> list[Path]:
    """All files below `root` (links followed, hidden ones left out), in an order that is the same on every system."""
    files: list[Path] = []
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__MACOSX"))]
        files.extend(Path(folder, name) for name in names if not name.startswith("."))
    return sorted(files, key=lambda file: _nfc(file.relative_to(root).as_posix()))


def _nfc(name: str) -> str:
    """macOS stores accents decomposed; composed names sort and compare equal everywhere."""
    return unicodedata.normalize("NFC", name)


def _image_folder(root: Path, images: list[Path]) -> dict[str, Dataset]:
    """
    {split: data set} of a plain folder of images.

    `load_dataset("imagefolder")` is not used here because it takes words in *file names* for splits (`my test.jpg`
    leaves the train split) and the split folders themselves for classes.
    """
    parts = {image: image.relative_to(root).parts for image in images}
    has_splits = all(len(p) > 1 and p[0].lower() in SPLIT_WORDS for p in parts.values())
    by_split: dict[str, list[Path]] = {}
    for image, p in parts.items():
        by_split.setdefault(SPLIT_WORDS[p[0].lower()] if has_splits else "train", []).append(image)
    depth = 1 + has_splits
    class_names = None
    if all(len(p) > depth for p in parts.values()):
        class_names = sorted({_nfc(image.parent.name) for image in images})
    return {split: _dataset_of_files(members, class_names, split) for split, members in by_split.items()}


def _dataset_of_files(images: list[Path], class_names: list[str] | None, split: str) -> Dataset:
    import datasets

    columns: dict[str, list] = {"image": [os.path.abspath(image) for image in images]}
    features = datasets.Features({"image": datasets.Image(decode=False)})
    if class_names is not None:
        number = {name: i for i, name in enumerate(class_names)}
        columns["label"] = [number[_nfc(image.parent.name)] for image in images]
        features["label"] = datasets.ClassLabel(names=class_names)
    try:
        return datasets.Dataset.from_dict(columns, features=features, split=datasets.NamedSplit(split))
    except UnicodeEncodeError as error:
        raise ValueError(f"A file name is not valid Unicode, rename it: {error.object!r}") from error


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
