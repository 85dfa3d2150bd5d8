"""A checkpoint in use: whether the images are like those that it was fitted to, and when the answer is none of the
labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..clip.modeling import VS2CLIPForZeroShot
from ..clip.pipeline import VS2ZeroShotImageClassificationPipeline
from ..data.labels.prompts import class_embeddings
from ..encoders.tail import is_sigmoid, softmax_temperature
from ..evaluation.evidence import Sureness, embeds_of, why_others
from ..evaluation.recommendation import LEAST_IMAGES
from ..files.json_files import read_json
from ..files.place import look_for
from .names import REPORT_NAME


NONE_OF_THESE = "none of these labels"
_GATE = 0.99


class Familiarity:
    """
    Counts answers, and says in the end whether the images are others than the checkpoint's. Memory does not grow with
    them.

    Args:
        classifier: its model's statistics must keep rows, else it stays silent.
        labels, templates, clean: as the classifier is asked.
    """

    def __init__(
        self,
        classifier: VS2ZeroShotImageClassificationPipeline,
        labels: Sequence[str],
        templates: Any,
        clean: bool = True,
    ):
        self.classifier, self.labels, self.templates, self.clean = classifier, list(labels), templates, clean
        self.places = {label: place for place, label in enumerate(self.labels)}
        self.ours = Sureness(len(self.labels))
        self.measured = self.inside = 0
        model = classifier.model
        self.known = model.domain_statistics if isinstance(model, VS2CLIPForZeroShot) and model.saes else None
        levels = None if self.known is None else self.known.distance_quantiles
        self.threshold = None if self.known is None or not levels else self.known.distance_threshold(_GATE)

    def add(self, answer: Mapping[str, Any]) -> None:
        """An answer with details."""
        plain, distance = answer["plain"][0], answer.get("distance")
        self.ours.add(torch.tensor([self.places[plain["label"]]]), torch.tensor([plain["score"]]))
        if self.threshold is not None and isinstance(distance, float):
            self.measured += 1
            self.inside += distance <= self.threshold

    @torch.no_grad()
    def sentence(self) -> str:
        """Empty where nothing speaks against it, or there are too few images to tell."""
        if self.known is None or self.known.rows is None or self.ours.sums[0].sum() < LEAST_IMAGES:
            return ""
        model, tokenizer = self.classifier.model, self.classifier.tokenizer
        if is_sigmoid(model.clip):  # how sure it is of a label says nothing of the others
            return ""
        classes = class_embeddings(model.clip, tokenizer, self.labels, self.templates, clean=self.clean).cpu()
        theirs = Sureness.of(embeds_of(model, self.known.rows, 1024), classes, softmax_temperature(model.clip))
        inside = self.inside / self.measured if self.measured else 1.0
        why = why_others(inside, *self.ours.drift_from(theirs))
        return f"{why} hf-vs2 adapt fits a checkpoint to images." if why else ""


def asked_in(checkpoint: str, place: Mapping[str, Any]) -> tuple[list[str], list[str], bool] | None:
    """The labels, templates and cleaning of labels that `adapt` fitted this checkpoint to; `None` of one that it did
    not write.

    Raises:
        OSError: there is no such checkpoint.
    """
    path = look_for(checkpoint, REPORT_NAME, place)
    try:
        asked = {} if path is None else read_json(Path(path))["request"]
        return list(map(str, asked["labels"])), list(map(str, asked["templates"])), bool(asked["clean"])
    except (ValueError, KeyError, TypeError):
        return None


def rejection_threshold(
    checkpoint: str, place: Mapping[str, Any], labels: Sequence[str], templates: Sequence[str], clean: bool
) -> float:
    """
    The cosine with plain CLIP's answer below which an image is none of the labels, as `adapt` measured it.

    Raises:
        ValueError: it measured none for this checkpoint, or for other labels or prompts.
    """
    path = look_for(checkpoint, REPORT_NAME, place)
    try:
        report = read_json(Path(path or ""))
        asked, threshold = report["request"], float(report["reject"]["similarity"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{checkpoint} holds no threshold for {NONE_OF_THESE!r}: hf-vs2 adapt measures it ({REPORT_NAME})."
        ) from None
    other = [
        name
        for name, mine in (("labels", list(labels)), ("templates", list(templates)), ("clean", clean))
        if asked[name] != mine
    ]
    if other:
        raise ValueError(
            f"the threshold for {NONE_OF_THESE!r} in {checkpoint} is for other "
            f"{'prompts' if other[0] != 'labels' else 'labels'}: ask as hf-vs2 adapt was asked, or adapt again."
        )
    return threshold


def rejected(answer: Mapping[str, Any], threshold: float) -> dict[str, Any]:
    """The answer with [`NONE_OF_THESE`] in the place of its first label where the image is too far from all labels."""
    none = answer["similarity"] < threshold
    first, *others = answer["predictions"]
    return {
        **answer,
        "predictions": [first | {"label": NONE_OF_THESE}, *others] if none else answer["predictions"],
        "rejected": none,
    }
