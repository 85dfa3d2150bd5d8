"""What is measured on: rows, labels and class names, checked and brought together before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers.utils import logging

from ..clip.modeling import VS2CLIPForZeroShot
from ..data.lists import Names
from ..data.names import match_names, names_by_place
from ..encoders.base_model import warn_of_relative
from ..encoders.fingerprints import same_fingerprint, vision_fingerprint
from ..encoders.tail import check_temperature
from ..functional.finite import first_broken_row


if TYPE_CHECKING:
    from ..data.store import ActivationStore

logger = logging.get_logger(__name__)

Rows: TypeAlias = "torch.Tensor | ActivationStore"


def check_replayable(model: VS2CLIPForZeroShot) -> None:
    """Refuse a model with an inner layer steered, since cached rows of the last layer can't show what that does, and a
    CLIP whose scores would be infinite."""
    check_temperature(model.clip)
    last = _last_layer(model)
    if list(model.fvu_thresholds) != [last]:
        raise ValueError(
            f"only an SAE on the last layer ({last}) can be evaluated on cached rows; this model steers layers "
            f"{sorted(model.fvu_thresholds)}. Run the whole model on the images instead."
        )


def check_rows(model: VS2CLIPForZeroShot, rows: Rows, what: str) -> None:
    """Refuse rows of another shape, layer or CLIP than this model's; `what` is their name in the message."""
    width = model.clip.visual_projection.in_features
    if isinstance(rows, torch.Tensor):
        if rows.ndim != 2:
            raise ValueError(f"{what} must be (n, {width}); they are {tuple(rows.shape)}.")
        found = rows.shape[1]
    elif hasattr(rows, "iter_batches"):
        found = rows.hidden_size
    else:
        raise TypeError(f"{what} must be a tensor (n, {width}) or an ActivationStore, not {type(rows).__name__}.")
    if found != width:
        raise ValueError(
            f"{what} have width {found}, but the CLIP of this model has hidden size {width}. Extract them with that "
            "CLIP."
        )
    if len(rows) == 0:
        raise ValueError(f"{what} are empty: there is nothing to evaluate.")
    if not isinstance(rows, torch.Tensor):
        _check_store(model, rows, what)


def _check_store(model: VS2CLIPForZeroShot, store: ActivationStore, what: str) -> None:
    last = _last_layer(model)
    if last not in store.layers:
        raise ValueError(
            f"{what}: the store {store.path} holds layers {store.layers}, but the last layer, {last}, is the one to "
            "evaluate. Extract it with layers=(-1,)."
        )
    if not same_fingerprint(store.metadata["base_model_fingerprint"], vision_fingerprint(model.clip)):
        raise ValueError(
            f"{what}: the store {store.path} was extracted with another CLIP ({store.metadata['model']['id']}) than "
            "the one of this model. Extract the activations with this one."
        )
    extracted = f"{what}: the store {store.path} was extracted with {store.metadata['model']['id']}"
    warn_of_relative(model.clip, store.metadata.get("base_model_weights"), extracted)


def class_labels(rows: Rows, labels: Any, num_classes: int) -> torch.Tensor:
    """The labels as int64 `(n,)` on the CPU, checked against rows and class names."""
    if labels is None and not isinstance(rows, torch.Tensor):
        labels = rows.labels
    if labels is None:
        raise ValueError("labels are missing, and the rows bring none: accuracy needs the true class of each row.")
    target = torch.as_tensor(labels).cpu()
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"labels must be integers, the index of each row's class, not {target.dtype}.")
    if target.shape != (len(rows),):
        raise ValueError(
            f"there are {len(rows)} rows but labels of shape {tuple(target.shape)}: one label a row is needed."
        )
    outside = ((target < 0) | (target >= num_classes)).nonzero()
    if len(outside):
        row = int(outside[0])
        hint = " (data sets mark hidden labels with -1)" if target[row] == -1 else ""
        raise ValueError(
            f"label {int(target[row])} of row {row} is out of range: {num_classes} class names allow 0 to "
            f"{num_classes - 1}{hint}."
        )
    return target.long()


def named_labels(rows: Rows, labels: Any, class_names: Names | None) -> tuple[list[str] | None, Any]:
    """
    Class names, and the label of each row as a place among them; `None` for what there is none of.

    What was not given is the store's. Labels that are the store's are matched with names that were given by the
    store's own names for its classes, see [`match_names`]; a store without names, and labels of the caller's own,
    count places in the names given.

    Raises:
        ValueError: names that were given do not fit the store's classes.
    """
    own = None if isinstance(rows, torch.Tensor) else rows.class_names
    labels = rows.labels if labels is None and not isinstance(rows, torch.Tensor) else labels
    if class_names is None:
        return own, labels
    if not own or not are_stored(rows, labels):
        return names_by_place(class_names), labels
    matched = match_names(own, class_names)
    if class_names is not own:
        logger.warning(matched.told)
    stored = torch.as_tensor(labels).cpu().long()
    return matched.names, torch.where(stored >= 0, torch.tensor(matched.places)[stored], -1)


def are_stored(rows: Rows, labels: Any) -> bool:
    """Whether labels are those that a store holds, which count its own classes."""
    stored = None if labels is None or isinstance(rows, torch.Tensor) else rows.labels
    given = torch.as_tensor(labels).cpu() if stored is not None else None
    if stored is None or given is None or given.is_floating_point() or given.shape != stored.shape:
        return False
    return bool((given == stored).all())


def replay_batches(model: VS2CLIPForZeroShot, rows: Rows, batch_size: int, what: str) -> Iterator[torch.Tensor]:
    """The rows block by block, refused at the first NaN or infinity; `what` is their name in the message."""
    batches = (
        rows.split(batch_size) if isinstance(rows, torch.Tensor) else rows.iter_batches(batch_size, _last_layer(model))
    )
    start = 0
    for batch in batches:
        broken = first_broken_row(batch)
        if broken is not None:
            raise ValueError(
                f"{what} hold NaN or infinity, first in row {start + broken}. Extract the activations again."
            )
        start += len(batch)
        yield batch


def _last_layer(model: VS2CLIPForZeroShot) -> int:
    return len(model.clip.vision_model.encoder.layers) - 1


__all__ = ["Rows", "are_stored", "check_replayable", "check_rows", "class_labels", "named_labels", "replay_batches"]
