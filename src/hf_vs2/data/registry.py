"""Image data sets by name: where they are, their splits and columns, CLIP's names for their classes, prompts and
metric.

An entry is a YAML file in `registry_data/`; `python scripts/datasets_table.py` prints them as the table of
docs/datasets.md.
A path may stand in for a Hub id, and a data set of your own takes a few lines of YAML or a dictionary: see
[`dataset_info`].
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..config.schema import FLAG, TEXT, Kind, check_fields, many, one_of, optional, read_fields, setting, shown
from ..files.yaml_files import read_yaml
from .labels.names import class_names_of, clean_class_names, find_names
from .labels.prompts import SINGLE_TEMPLATE, resolve_templates
from .load import load_images


if TYPE_CHECKING:
    from datasets import Dataset


METRICS = ("accuracy", "mean_per_class")


@dataclass(frozen=True)
class DatasetInfo:
    """
    One image data set.

    Args:
        name (`str`): what studies and results call it.
        source_id (`str`): id on the Hub, or a local path: anything [`hf_vs2.load_images`] takes.
        title (`str`): for tables; the name by default.
        config_name, revision (`str`, *optional*): of a Hub data set.
        train_split, test_split (`str`): as `load_images` takes them, slices and sums included: `"train[:600]"`.
        image_column, label_column (`str`): columns of images and of labels, whole numbers or names.
        classes (`Mapping[str, str]`, *optional*): the data set's own name of each label to the name that prompts use,
            in the order of the labels. `None`: the data set's own names are used.
        aliases (`Mapping[str, str]`): label names that other copies of the data set use, to the name that prompts use.
        templates (`tuple[str, ...]`): prompts with `{}` where the class name goes.
        metric (`str`): `"accuracy"`, or `"mean_per_class"` (the mean of the classes' accuracies).
        pitfalls, sources (`tuple[str, ...]`): what to watch out for; where names, templates and metric come from.
        verified (`bool`): columns, splits and label names were all seen in a public source; `verification` says where,
            or what was not seen.

    Raises:
        ValueError: something is missing or of a kind that cannot be used.
    """

    name: str = setting(TEXT)
    source_id: str = setting(TEXT)
    title: str = setting(TEXT, default="")
    config_name: str | None = setting(optional(TEXT), default=None)
    revision: str | None = setting(optional(TEXT), default=None)
    train_split: str = setting(TEXT, default="train")
    test_split: str = setting(TEXT, default="test")
    image_column: str = setting(TEXT, default="image")
    label_column: str = setting(TEXT, default="label")
    classes: Mapping[str, str] | None = None
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    templates: tuple[str, ...] = SINGLE_TEMPLATE
    metric: str = setting(one_of(METRICS), default="accuracy")
    pitfalls: tuple[str, ...] = setting(many(TEXT), default=())
    sources: tuple[str, ...] = setting(many(TEXT), default=())
    verified: bool = setting(FLAG, default=False)
    verification: str = setting(Kind("a text", lambda value: isinstance(value, str)), default="")

    def __post_init__(self) -> None:
        if not self.title:
            object.__setattr__(self, "title", self.name)
        check_fields(self, f"data set {shown(self.name)}: ")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DatasetInfo:
        """An entry from the keys of a YAML file: `name`, `path` or `hub_id`, and any other field of this class.

        Raises:
            ValueError: a key is unknown (the message has the nearest known one) or missing, or a value cannot be used.
        """
        given = _fields(content)
        where = f"data set {given['name']!r}" if "name" in given else "the data set"
        for field, key in (("name", "name"), ("source_id", "path (or hub_id)")):
            if not given.get(field):
                raise ValueError(f"{where} does not say its {key}.")
        return cls(**given)

    def replace(self, **overrides: Any) -> DatasetInfo:
        """The same data set with other settings, by the keys of [`DatasetInfo.from_dict`].

        A `path` or `hub_id` leaves `config_name` and `revision` behind, and `classes` the `aliases`, unless given too.
        """
        given = _fields(overrides)
        if "source_id" in given:
            given = {"config_name": None, "revision": None} | given
        if "classes" in given:  # the aliases are of the classes before
            given = {"aliases": {}} | given
        return dataclasses.replace(self, **given)

    def load(self, split: Literal["train", "test"]) -> Dataset:
        """The images and labels of one split; images are not decoded. Training images need no labels.

        Raises:
            FileNotFoundError, OSError: the path or the Hub data set is not there.
            ValueError: it has no such split or column (the message lists those it has).
        """
        if split not in ("train", "test"):
            raise ValueError(f"split={split!r} is neither 'train' nor 'test'; slices belong in {split}_split.")
        dataset = load_images(
            self.source_id,
            self.train_split if split == "train" else self.test_split,
            image_column=self.image_column,
            config_name=self.config_name,
            revision=self.revision,
            label_column=self.label_column,
            class_words=self.classes is None,  # entries know WordNet ids
        )
        if split == "test":
            self._check_label_column(dataset)
        return dataset

    def class_names(self, dataset: Dataset) -> list[str]:
        """The names that prompts use, in the order of the labels of `dataset`.

        Label names are matched to `classes` and `aliases` by name, never by position, see [`find_names`]. Only labels
        without names take the order of `classes`, when they are exactly 0, 1, ... of as many classes.

        Raises:
            ValueError: label names that `classes` does not have, labels whose number does not fit, or two equal names.
        """
        self._check_label_column(dataset)
        own = class_names_of(dataset, self.label_column)
        if own is not None:
            return clean_class_names(self._prompt_names(own))
        self._check_unnamed_labels(dataset)
        return clean_class_names(list((self.classes or {}).values()))

    def _check_label_column(self, dataset: Dataset) -> None:
        if self.label_column not in dataset.column_names:
            raise ValueError(
                f"data set {self.name!r} ({self.source_id}) has no column {self.label_column!r}; "
                f"it has {', '.join(dataset.column_names)}. Set label_column."
            )

    def _prompt_names(self, label_names: list[str]) -> list[str]:
        if self.classes is None:
            return label_names
        found = find_names(label_names, self.classes, self.aliases)
        unknown = [label for label, name in zip(label_names, found, strict=True) if name is None]
        if unknown:
            raise ValueError(
                f"data set {self.name!r} ({self.source_id}): {len(unknown)} of {len(label_names)} label names are not "
                f"among the classes of its entry: {shown(unknown)}. Add them to its `aliases`, or set `classes: null` "
                "to use the data set's own names."
            )
        return [name for name in found if name is not None]

    def _check_unnamed_labels(self, dataset: Dataset) -> None:
        where = f"data set {self.name!r} ({self.source_id}): column {self.label_column!r}"
        if self.classes is None:
            raise ValueError(f"{where} has no label names: give `classes`, a list in the order of the labels.")
        labels = dataset.unique(self.label_column)
        other = [label for label in labels if not isinstance(label, int)]
        if other:
            raise ValueError(f"{where} holds {other[0]!r}: expected whole numbers or names.")
        if sorted(labels) != list(range(len(self.classes))):
            raise ValueError(
                f"{where} has no label names, and its labels ({len(labels)} from {min(labels)} to {max(labels)}) are "
                f"not 0 to {len(self.classes) - 1}, the classes of its entry: give `classes`, a list in the order of "
                "the labels."
            )


def available() -> list[str]:
    """Names of the data sets that come with the package."""
    files = resources.files(__package__).joinpath("registry_data").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def dataset_info(spec: str | Mapping[str, Any]) -> DatasetInfo:
    """The data set that a study or a user names.

    Args:
        spec: a built-in name (see [`available`]); a mapping whose `name` is a built-in one, with what is to be
            different (`{"name": "cifar10", "path": "/data/cifar10", "image_column": "image"}`); a mapping of a data
            set of your own (`{"name": "mybirds", "path": "birds/"}`, by default with splits `train` and `test`,
            columns `image` and `label`, the prompt `"a photo of a {}."` and the data set's own label names); or a
            `.yaml` file with either.

    Raises:
        ValueError: no such name (the message lists those there are), an unknown key, or a value that cannot be used.
        FileNotFoundError: no such YAML file.
    """
    if isinstance(spec, Mapping):
        return _from_mapping(spec)
    if not isinstance(spec, str):
        raise ValueError(f"a data set must be a name or `key: value` lines, not {shown(spec)}.")
    if spec in available():
        return _built_in(spec)
    if spec.lower().endswith((".yaml", ".yml")):
        content = _read(Path(spec).expanduser())
        return _from_mapping({"name": Path(spec).stem} | dict(content))
    raise ValueError(_no_such_name(spec))


def _from_mapping(content: Mapping[str, Any]) -> DatasetInfo:
    name = content.get("name")
    if isinstance(name, str) and name in available():
        return _built_in(name).replace(**{str(key): value for key, value in content.items()})
    if name and not {"path", "hub_id"} & set(content):
        raise ValueError(_no_such_name(name))
    return DatasetInfo.from_dict(content)


def _no_such_name(name: Any) -> str:
    near = difflib.get_close_matches(str(name)[:100], available(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return (
        f"{shown(name)} is not a data set that comes with the package ({', '.join(available())}), and there is no "
        f"path to one of your own: give {{'name': ..., 'path': ...}} or a .yaml file.{hint}"
    )


@lru_cache
def _built_in(name: str) -> DatasetInfo:
    return DatasetInfo.from_dict(
        {"name": name} | dict(_read(resources.files(__package__) / "registry_data" / f"{name}.yaml"))
    )


def _read(file: Any) -> Mapping[str, Any]:
    """A YAML file on disk or in the package."""
    content = read_yaml(file, file)
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} must hold `key: value` lines: name, path and so on.")
    return content


_PLACE = Kind("a path or an id", lambda value: isinstance(value, (str, os.PathLike)), lambda value, _: str(value))
_AS_IT_IS = Kind("", lambda value: True)


def _fields(content: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of [`DatasetInfo`] from the keys and plain values of YAML."""
    where = f"data set {shown(content.get('name'))}"
    kinds = {"path": _PLACE, "hub_id": _PLACE}
    # The values of the others are read when the object is made.
    kinds |= {field.name: _AS_IT_IS for field in dataclasses.fields(DatasetInfo) if field.name != "source_id"}
    given = read_fields(content, kinds, where)
    if "path" in given and "hub_id" in given:
        raise ValueError(f"{where} has both path and hub_id: give one.")
    for key in {"path", "hub_id"} & set(given):
        given["source_id"] = given.pop(key)
    if "templates" in given:
        given["templates"] = resolve_templates(given["templates"] or [])
    for key in {"classes", "aliases"} & set(given):
        given[key] = _names(given[key], f"{where}: {key}")
    if "aliases" in given:
        given["aliases"] = given["aliases"] or {}
    return given


def _names(value: Any, where: str) -> dict[str, str] | None:
    """`{label name: prompt name}` from a mapping, or from a list of names that are both."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise ValueError(
                f"{where} must be a list of names, or `label name: name in prompts` lines, not {shown(value)}."
            )
        names = list(value)
        value = dict(zip(names, names, strict=True))
        if len(value) != len(names):
            raise ValueError(f"{where} has a name twice.")
    for pair in value.items():
        for name in pair:
            # YAML reads an unquoted `no` or 3 as something else than a name.
            if not isinstance(name, str):
                raise ValueError(f"{where} has {name!r}, which YAML does not read as a text: put it in quotes.")
    return dict(value)
