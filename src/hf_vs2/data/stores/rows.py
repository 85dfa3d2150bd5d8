"""CLS rows, wherever they are: a tensor, one layer of an activation store, or several stores taken together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

import torch

from ...encoders.families import recorded_family, refuse_family
from ...functional.finite import first_broken_row
from .store import ActivationStore
from .store_format import differences


T = TypeVar("T")


class Rows(ABC):
    """
    CLS rows of one layer of a vision tower, read when they are asked for; see [`rows_of`].

    Attributes:
        width (`int`): numbers of a row.
        labels (`torch.Tensor` of shape `(len,)`, *optional*): int64, -1 where there is none.
        class_names (`list[str]`, *optional*): in the order of the labels.
        name (`str`): how messages name them.
        origin (`dict`): the fields of [`SAEConfig`] that say which CLIP and layer the rows are of; empty where nothing
            tells.
    """

    width: int
    name: str = "the activations"
    labels: torch.Tensor | None = None
    class_names: list[str] | None = None
    origin: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows by number `(len(indices), width)`, float32, in the order asked for."""

    def batches(self, batch_size: int = 1024, indices: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """The rows (of `indices`, *optional*) in blocks, so that memory stays flat. One that is not finite is a
        `ValueError`."""
        for chosen in (torch.arange(len(self)) if indices is None else indices).split(batch_size):
            block = self.take(chosen)
            broken = first_broken_row(block)
            if broken is not None:
                raise ValueError(
                    f"Row {int(chosen[broken])} of {self.name} holds NaN or infinite values. Extract the activations "
                    "again in float32 or bfloat16 (float16 overflows in some CLIP models)."
                )
            yield block

    def data(self, chosen: torch.Tensor) -> dict[str, Any] | None:
        """The images behind the rows `chosen`, for `SAEConfig.training_data`; `None` where nothing tells."""
        return None


class TensorRows(Rows):
    """A `(rows, width)` tensor."""

    def __init__(self, tensor: torch.Tensor):
        if tensor.ndim != 2:
            raise ValueError(f"Activations must be a (rows, hidden_size) tensor, not {tuple(tensor.shape)}.")
        self.tensor, self.width = tensor, tensor.shape[1]

    def __len__(self) -> int:
        return len(self.tensor)

    def take(self, indices: torch.Tensor) -> torch.Tensor:
        return self.tensor[indices.to(self.tensor.device)].float()


class StoreRows(Rows):
    """One layer of an activation store; a `ValueError` if it is not clear which, or the rows are of an encoder that
    nothing can steer."""

    def __init__(self, store: ActivationStore, layer: int | None):
        model = store.metadata["model"]
        family = None if model["id"] is None else recorded_family(model["id"], model["revision"])
        if family is not None:
            refuse_family(family, f"{store.path} holds activations of {model['id']}, which", tower=True)
        self.store, self.width, self.class_names = store, store.hidden_size, store.class_names
        self.layer = store.resolve(layer)

    def __len__(self) -> int:
        return len(self.store)

    def take(self, indices: torch.Tensor) -> torch.Tensor:
        return self.store.take(indices, layer=self.layer)

    @property
    def labels(self) -> torch.Tensor | None:  # type: ignore[override]
        return self.store.labels

    @property
    def origin(self) -> dict[str, Any]:  # type: ignore[override]
        made_from = self.store.metadata
        return {
            "base_model_name_or_path": made_from["model"]["id"],
            "base_model_revision": made_from["model"]["revision"],
            "base_model_type": made_from.get("base_model_type"),
            "base_model_num_layers": made_from["num_layers"],
            "site": made_from["site"],
            "base_model_fingerprint": made_from["base_model_fingerprint"],
            "base_model_weights": made_from.get("base_model_weights"),
            "layer": self.layer,
        }

    def data(self, chosen: torch.Tensor) -> dict[str, Any]:
        made_from = self.store.metadata
        return {
            "num_rows": len(chosen),
            "id": made_from["dataset_id"],
            **made_from["dataset"],
            "skipped": len(made_from["skipped"]),
        }


class UnionRows(Rows):
    """The rows of several stores, one store after another. Stores of different CLIPs, layers, widths or preprocessing
    are a `ValueError` with both and the difference."""

    def __init__(self, parts: Sequence[StoreRows]):
        self.parts, self.width, self.origin = parts, parts[0].width, parts[0].origin
        # Part p holds rows _ends[p-1] up to _ends[p].
        self._ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        for other in parts[1:]:
            lines = differences(_kind(parts[0]), _kind(other))
            if lines:
                raise ValueError(
                    f"The stores {parts[0].store.path} and {other.store.path} can't be taken together: "
                    f"{'; '.join(lines)}. Extract both with the same CLIP, layer and image processor."
                )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, indices: torch.Tensor) -> torch.Tensor:
        part_of = torch.bucketize(indices, self._ends, right=True)
        rows = torch.empty(len(indices), self.width)
        for number in part_of.unique().tolist():
            places = (part_of == number).nonzero().squeeze(1)
            rows[places] = self.parts[number].take(indices[places] - self._ends[number] + len(self.parts[number]))
        return rows

    @property
    def class_names(self) -> list[str] | None:  # type: ignore[override]
        """Those of all parts; a `ValueError` where parts have different ones."""
        first, *others = [part.class_names for part in self.parts]
        if any(other != first for other in others):
            raise ValueError(
                "These stores have different class names, so their labels do not count the same classes: take each "
                "by itself, or give the labels of all rows as places among class_names."
            )
        return first

    @property
    def labels(self) -> torch.Tensor | None:  # type: ignore[override]
        """Labels of all parts, -1 for those without. Classes of different stores are different classes, unless the
        stores have the same class names."""
        of_parts = [part.labels for part in self.parts]
        if all(labels is None for labels in of_parts):
            return None
        names = [part.class_names for part in self.parts]
        one_numbering = names[0] is not None and all(other == names[0] for other in names)
        numbered, offset = [], 0
        for part, labels in zip(self.parts, of_parts, strict=True):
            if labels is None:
                labels = torch.full((len(part),), -1)
            numbered.append(torch.where(labels >= 0, labels + offset, -1))
            if not one_numbering:
                offset = max(offset, int(numbered[-1].max()) + 1)
        return torch.cat(numbered)

    def data(self, chosen: torch.Tensor) -> dict[str, Any]:
        """One record a store, in order."""
        part_of = torch.bucketize(chosen, self._ends, right=True)
        parts = [part.data(chosen[part_of == number]) for number, part in enumerate(self.parts)]
        return {"num_rows": len(chosen), "parts": parts}


RowSource: TypeAlias = "Rows | ActivationStore | Sequence[ActivationStore] | torch.Tensor"


def rows_of(source: RowSource, layer: int | None = None) -> Rows:
    """CLS rows of one layer behind one interface, of a tensor `(n, hidden_size)`, an activation store, several stores
    to be taken as one set, or [`Rows`]; anything else is a `TypeError`. `layer`: of stores that hold several; negative
    ones count from the last. Stores that do not fit together, or have not that layer, are a `ValueError`."""
    if isinstance(source, Rows):
        return source
    if isinstance(source, torch.Tensor):
        return TensorRows(source)
    stores = [source] if isinstance(source, ActivationStore) else source
    if (
        not isinstance(stores, Sequence)
        or not stores
        or not all(isinstance(store, ActivationStore) for store in stores)
    ):
        raise TypeError(
            "Activations must be a tensor (rows, hidden_size), an ActivationStore or a list of stores, not "
            f"{type(source).__name__}."
        )
    parts = [StoreRows(store, layer) for store in stores]
    return parts[0] if len(parts) == 1 else UnionRows(parts)


def _kind(rows: StoreRows) -> dict[str, Any]:
    """What rows must have in common to be rows of one distribution. Weights tell models apart, not their names."""
    found = rows.store.metadata
    same = {name: found[name] for name in ("hidden_size", "num_layers", "site", "preprocessing")}
    return {"model": {"fingerprint": found["model"]["fingerprint"]}, "layer": rows.layer, **same}


def chosen_rows(indices: torch.Tensor | Sequence[int] | None, num_rows: int) -> torch.Tensor:
    """Row numbers to use, in ascending order `(n,)`; all of them for `None`. Anything but different integers in
    `[0, num_rows)` is a `ValueError`."""
    if indices is None:
        return torch.arange(num_rows)
    chosen = torch.as_tensor(indices).cpu()
    if chosen.ndim != 1 or chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise ValueError(
            f"indices must be a vector of row numbers, not {chosen.dtype} of shape {tuple(chosen.shape)}."
        )
    chosen = chosen.long().sort().values
    if len(chosen) and not (chosen[0] >= 0 and chosen[-1] < num_rows):
        raise ValueError(
            f"indices must lie in [0, {num_rows}), the rows there are; they reach from {chosen[0]} to {chosen[-1]}."
        )
    if (chosen.diff() == 0).any():
        raise ValueError(
            "indices names a row twice: it could end up in training and in calibration. Give each row once."
        )
    return chosen


def checked_labels(
    labels: Any, num_rows: int, lowest: int = 0, num_classes: int | None = None, what: str = "classes"
) -> torch.Tensor:
    """The class of each row as int64 `(num_rows,)`, on the CPU: integers from `lowest` (-1 where some may be unknown)
    to below `num_classes`. Anything else is a `ValueError`, which says of `what` the classes are."""
    target = as_labels(labels)
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool or target.shape != (num_rows,):
        raise ValueError(
            f"labels must be one integer a row, ({num_rows},), not {target.dtype} of shape {tuple(target.shape)}."
        )
    target = target.long()
    outside = target < lowest
    if num_classes is not None:
        outside |= target >= num_classes
    if outside.any():
        row = int(outside.nonzero()[0])
        hint = " (data sets mark hidden labels with -1)" if target[row] == -1 else ""
        start = "-1 (unknown)" if lowest == -1 else "0"
        end = "or a class number from 0" if num_classes is None else f"to {num_classes - 1}, for {num_classes} {what}"
        raise ValueError(f"label {int(target[row])} of row {row} is out of range: it must be {start} {end}{hint}.")
    return target


def as_labels(labels: Any) -> torch.Tensor:
    """A sequence of numbers as a tensor on the CPU; names are refused."""
    try:
        return torch.as_tensor(labels).cpu()
    except (TypeError, ValueError) as error:  # "too many dimensions 'str'"
        first = next(iter(labels), None) if isinstance(labels, Iterable) else labels
        raise ValueError(
            f"labels must be one integer a row, the place of its class among the names, not {first!r}."
        ) from error


def training_labels(labels: torch.Tensor | Sequence[int] | None, rows: Rows) -> torch.Tensor:
    """One label a row `(rows,)` int64, -1 where unknown: those given, else the stores'. A `ValueError` if there are
    none, or they do not fit the rows."""
    labels = rows.labels if labels is None else labels
    if labels is None:
        raise ValueError(
            "label_loss needs labels, and the rows have none. Give labels=, or extract the activations with "
            "label_column=."
        )
    found = checked_labels(labels, len(rows), lowest=-1)
    if not (found >= 0).any():
        raise ValueError("All labels are -1 (unknown): label_loss has nothing to learn from.")
    return found
