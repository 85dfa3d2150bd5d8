"""What is measured on: rows, labels and class names, checked and brought together before anything is computed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.utils import logging

from ..clip.modeling import VS2CLIPForZeroShot
from ..data.labels.lists import Names
from ..data.labels.names import match_names, names_by_place
from ..data.stores.rows import Rows, RowSource, as_labels, checked_labels, rows_of
from ..encoders.base_model import warn_of_relative
from ..encoders.families import tower_of
from ..encoders.fingerprints import same_fingerprint, vision_fingerprint
from ..encoders.tail import check_temperature
from ..sae.statistics import DomainStatistics


logger = logging.get_logger(__name__)


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


def with_statistics(model: VS2CLIPForZeroShot, statistics: DomainStatistics | None) -> VS2CLIPForZeroShot:
    """The model with other statistics, and its own gamma, lambda and coefficient; it steers every row."""
    sae, now = copy.deepcopy(model.sae), model.steering_settings
    sae.set_domain_statistics(statistics)
    other = VS2CLIPForZeroShot(model.clip, sae.eval())  # the CLIP is shared, and stays in the mode that it is in
    other.set_steering(gamma=now.gamma, lambda_=now.lambda_, coefficient=now.coefficient)
    return other


def replayable_rows(model: VS2CLIPForZeroShot, source: RowSource, what: str) -> Rows:
    """CLS rows of the model's last layer; others are refused. `what` is their name in the message."""
    width, last = tower_of(model.clip).config.hidden_size, _last_layer(model)
    try:
        rows = rows_of(source, None if isinstance(source, torch.Tensor) else last)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{what}: {error}") from error
    rows.name = what
    if rows.width != width:
        raise ValueError(
            f"{what} have width {rows.width}, but the CLIP of this model has hidden size {width}. Extract them with "
            "that CLIP."
        )
    if len(rows) == 0:
        raise ValueError(f"{what} are empty: there is nothing to evaluate.")
    made_with = rows.origin.get("base_model_fingerprint")
    name = rows.origin.get("base_model_name_or_path")
    if made_with is not None and not same_fingerprint(made_with, vision_fingerprint(model.clip)):
        raise ValueError(
            f"{what} were extracted with another CLIP ({name}) than the one of this model. Extract the activations "
            "with this one."
        )
    warn_of_relative(model.clip, rows.origin.get("base_model_weights"), f"{what} were extracted with {name}")
    return rows


def class_labels(rows: Rows, labels: Any, num_classes: int) -> torch.Tensor:
    """The labels as int64 `(n,)` on the CPU, checked against rows and class names."""
    labels = rows.labels if labels is None else labels
    if labels is None:
        raise ValueError("labels are missing, and the rows bring none: accuracy needs the true class of each row.")
    return checked_labels(labels, len(rows), num_classes=num_classes, what="class names")


def named_labels(rows: Rows, labels: Any, class_names: Names | None) -> tuple[list[str] | None, Any]:
    """
    Class names, and the label of each row as a place among them; `None` for what there is none of.

    What was not given is the store's. Labels that are the store's are matched with names that were given by the
    store's own names for its classes, see [`match_names`]; a store without names, and labels of the caller's own,
    count places in the names given.

    Raises:
        ValueError: names that were given do not fit the store's classes.
    """
    labels = rows.labels if labels is None else labels
    if class_names is not None and not are_stored(rows, labels):
        return names_by_place(class_names), labels
    own = rows.class_names
    if class_names is None:
        return own, labels
    if not own:
        return names_by_place(class_names), labels
    matched = match_names(own, class_names)
    if class_names is not own:
        logger.warning(matched.told)
    stored = torch.as_tensor(labels).cpu().long()
    return matched.names, torch.where(stored >= 0, torch.tensor(matched.places)[stored], -1)


def are_stored(rows: Rows, labels: Any) -> bool:
    """Whether labels are those that a store holds, which count its own classes."""
    stored = None if labels is None else rows.labels
    given = as_labels(labels) if stored is not None else None
    if stored is None or given is None or given.is_floating_point() or given.shape != stored.shape:
        return False
    return bool((given == stored).all())


def _last_layer(model: VS2CLIPForZeroShot) -> int:
    return tower_of(model.clip).config.num_hidden_layers - 1
