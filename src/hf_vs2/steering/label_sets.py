"""Label sets at work in a model: what the statistics of unlabelled rows give for one set of labels, kept for the next
call."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch.nn.functional import normalize
from transformers import CLIPModel
from transformers.utils import cached_file

from ..config.steering import Steering
from ..encoders.families import embedding_width
from ..encoders.tail import softmax_temperature, tail_parameters, unit_embeds
from ..files.checkpoint_folder import LABEL_SETS_NAME
from ..files.weight_files import read_described, write_described
from ..files.weight_state import Kept, weights_state
from ..functional.label_free import LabelFit
from ..methods import BEFORE, METHODS, method_named
from ..sae.modeling import SAEModel
from ..sae.statistics import DomainStatistics
from .outputs import VS2ImageFeatures


_KIND = ("hf_vs2.label_sets", 1)
_BATCH = 1024
# Class embeddings of the same prompts differ by rounding from batch to batch and device to device; those of other
# prompts by more.
_SAME_CLASSES = 1e-4
_FIT_TENSORS = ("mean", "prototypes", "weights", "received", "scale")


class Steers(Protocol):
    """What label sets ask of a [`Steerer`]."""

    @property
    def clip(self) -> CLIPModel: ...
    @property
    def settings(self) -> Steering: ...
    @property
    def sae(self) -> SAEModel: ...
    @property
    def statistics(self) -> DomainStatistics: ...
    @property
    def unlabelled_rows(self) -> torch.Tensor: ...
    def with_(self, **settings: Any) -> Steers: ...
    def features_from_cls(self, rows: torch.Tensor) -> VS2ImageFeatures: ...


@dataclass(frozen=True, eq=False)
class FittedLabels:
    """
    What a method has fitted for one label set.

    Args:
        method (`str`), settings (`tuple`): the method, and coefficient, lambda and gamma where it depends on them.
        class_embeds (`torch.Tensor` of shape `(num_classes, projection_dim)`): of unit length; by these the set is
            recognised.
        fit ([`LabelFit`]): what scores images.
        labels (`tuple[str]`, *optional*): where they are known by name.
    """

    method: str
    settings: tuple[float, ...]
    class_embeds: torch.Tensor
    fit: LabelFit
    labels: tuple[str, ...] | None = None

    @property
    def rows_per_label(self) -> torch.Tensor:
        """How many unlabelled rows each prototype rests on, `(num_classes,)`; shares of rows add up."""
        return self.fit.received


@dataclass(frozen=True, eq=False)
class _Asked:
    """What is asked for: equal for the same method and settings, and class embeddings that are the same but for
    rounding."""

    method: str
    settings: tuple[float, ...]
    class_embeds: torch.Tensor

    def _exact(self) -> tuple[Any, ...]:
        return self.method, self.settings, self.class_embeds.shape

    def __hash__(self) -> int:
        return hash(self._exact())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Asked) or self._exact() != other._exact():
            return False
        mine, theirs = self.class_embeds, other.class_embeds
        return bool((mine.to(theirs.device) - theirs).abs().max() < _SAME_CLASSES)


class LabelSets:
    """
    What a model has fitted for label sets, for as long as its weights and statistics stay as they are. All steerers of
    a model share it; it may be used from several threads. A copy, and what another process receives, has the sets
    fitted by name.
    """

    max_floats = 2**24
    """How many numbers the fits that were not made by name may hold together (64 MB); the least recently used go
    first."""

    def __init__(self, named: tuple[FittedLabels, ...] = ()):
        self.named = named
        self._lock = threading.Lock()
        self._state: tuple[Any, ...] | None = None
        self._recent: Kept[FittedLabels] = Kept(self.max_floats, lambda kept: kept.fit.num_floats)
        self._sketch: Kept[tuple[torch.Tensor, tuple[torch.Tensor, ...]]] = Kept(1)

    def __reduce__(self) -> tuple[type[LabelSets], tuple[tuple[FittedLabels, ...]]]:
        return type(self), (self.named,)

    def clear(self) -> None:
        """Forget everything: the statistics are others now."""
        with self._lock:
            self.named, self._state = (), None

    @torch.compiler.disable  # locks and caches are nothing to trace
    def fitted(
        self, steerer: Steers, class_embeds: torch.Tensor, labels: tuple[str, ...] | None = None
    ) -> FittedLabels:
        """
        What the method in force makes of class embeddings `(num_classes, projection_dim)`: known, or fitted now. With
        `labels` it is kept by name, and saved with the model.

        Raises:
            `ValueError`: without statistics, or rows where the method needs them.
        """
        if steerer.settings.rule.needs_rows:
            # It refuses: what an earlier version fitted without rows was another method.
            steerer.unlabelled_rows  # noqa: B018
        with self._lock:
            asked = _Asked(
                steerer.settings.method, _settings(steerer), normalize(class_embeds.detach().float(), dim=-1)
            )
            state = self._checked_state(steerer)
            for known in self.named:
                if asked == _Asked(known.method, known.settings, known.class_embeds):
                    return known
            label_set = self._recent.get(state, asked, lambda: self._fit(steerer, asked))
            if labels is not None:
                label_set = replace(label_set, labels=labels)
                self.named = (*self.named, label_set)
            return label_set

    def _fit(self, steerer: Steers, asked: _Asked) -> FittedLabels:
        fit, classes = steerer.settings.rule.fit, asked.class_embeds.clone()
        if fit is None:
            fitting = [name for name, method in METHODS.items() if method.fit is not None]
            raise ValueError(f"method={asked.method!r} fits nothing to labels; these do: {fitting}.")
        return FittedLabels(
            asked.method, asked.settings, classes, fit(classes, _SketchRows(self, steerer, classes.device))
        )

    def image_mean(self, steerer: Steers) -> torch.Tensor:
        """Mean unit embedding under the step in force, `(projection_dim,)`: as measured, or that of the sketch."""
        with self._lock:
            self._checked_state(steerer)
            return _SketchRows(self, steerer, steerer.clip.device).mean()

    def named_now(self, steerer: Steers) -> tuple[FittedLabels, ...]:
        """The sets fitted by name, less those of other weights than the model has now."""
        with self._lock:
            self._checked_state(steerer)
            return self.named

    def _checked_state(self, steerer: Steers) -> tuple[Any, ...]:
        """What all fits are made of. The named ones are dropped when it changes; those that a copy brought belong to
        the weights of the first use."""
        clip, sae = steerer.clip, steerer.sae
        weights = weights_state([*tail_parameters(clip), *sae.parameters()])
        state = weights, (sae.config.top_k, sae.config.activation, sae.domain_statistics)
        if self._state is not None and (state[1] != self._state[1] or not _only_moved(self._state[0], weights)):
            self.named = ()
        self._state = state
        return state

    def sketch(self, steerer: Steers) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Unit embeddings `(m, projection_dim)` of the sketch under the step in force, and its views. Statistics that
        keep no rows are a `ValueError`."""
        rule, rows = steerer.settings.rule, steerer.unlabelled_rows

        def make() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
            every_row = steerer.with_(gate=None, fvu_threshold=None, enabled=True, edits=None)
            parts = [every_row.features_from_cls(block) for block in rows.split(_BATCH)]
            embeds = [unit_embeds(cast(torch.Tensor, part.features), "row {} of the sketch".format) for part in parts]
            views = zip(*(part.views or () for part in parts), strict=True)
            return torch.cat(embeds), tuple(map(torch.cat, views))

        return self._sketch.get(self._state, (rule.step, rule.views, _settings(steerer)), make)

    # On disk

    def save(self, folder: str | os.PathLike) -> None:
        """Write the sets fitted by name into `label_sets.safetensors`; it appears whole or not at all."""
        tensors: dict[str, torch.Tensor] = {}
        listed = []
        for number, known in enumerate(self.named):
            about = {"method": known.method, "settings": known.settings, "labels": known.labels}
            listed.append(about | {"facts": dict(known.fit.facts)})
            named = {"class_embeds": known.class_embeds} | {name: getattr(known.fit, name) for name in _FIT_TENSORS}
            named |= {f"view_{place}": view for place, view in enumerate(known.fit.views)}
            tensors |= {f"{number}.{name}": tensor.clone() for name, tensor in named.items()}
        write_described(Path(folder) / LABEL_SETS_NAME, tensors, _KIND, {"label_sets": listed})

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike,
        place: Mapping[str, Any],
        digests: Mapping[str, str] | None,
        steerer: Steers,
    ) -> LabelSets:
        """Those of a checkpoint in a folder or on the Hub, whose config has `digests` of its files, for the model that
        it holds. A file that is damaged, of another checkpoint, or something else is a `ValueError`."""

        def make(about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> LabelSets:
            listed = enumerate(about["label_sets"])
            return cls(tuple(_read(tensors, number, label_set, steerer) for number, label_set in listed))

        path = cached_file(os.fspath(name_or_path), LABEL_SETS_NAME, **place)
        label_sets = read_described(path, _KIND, make, "Save the model again.", digests)
        label_sets.named_now(steerer)  # they belong to these weights
        return label_sets


def _read(tensors: Mapping[str, torch.Tensor], number: int, about: Mapping[str, Any], steerer: Steers) -> FittedLabels:
    method = str(about["method"])
    if method == "distribution_norm" and "facts" not in about:  # of a version that subtracted the means in full
        method = BEFORE[method]
    if method_named(method).fit is None:
        raise ValueError(f"label set {number} is of method {method!r}, which fits nothing")
    own = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{number}.")}
    labels, width = tuple(map(str, about["labels"])), embedding_width(steerer.clip)
    num = len(labels)
    views = {
        f"view_{place}": (num, size)
        for place, size in enumerate(method_named(method).view_widths(*steerer.sae.config.weight_shape))
    }
    shapes = {"class_embeds": (num, width), "mean": (width,), "prototypes": (num, width), "weights": (num,)}
    shapes |= {"received": (num,), "scale": (), **views}
    if own.keys() != shapes.keys():
        raise ValueError(f"label set {number} holds {sorted(own)}, and {method!r} needs {sorted(shapes)}")
    for name, shape in shapes.items():
        if own[name].shape != shape or not own[name].is_floating_point():
            raise ValueError(
                f"{number}.{name} is {tuple(own[name].shape)}, for these labels and this model it is {shape}"
            )
    mean, prototypes, weights, received, scale = (own[name] for name in _FIT_TENSORS)
    facts = {str(name): float(value) for name, value in about.get("facts", {}).items()}
    fit = LabelFit(mean, prototypes, weights, received, scale, tuple(own[name] for name in views), facts)
    return FittedLabels(method, tuple(map(float, about["settings"])), own["class_embeds"], fit, labels)


@dataclass
class _SketchRows:
    """[`UnlabelledRows`]: the sketch of a model's statistics, on a device."""

    kept: LabelSets
    steerer: Steers
    device: torch.device

    def mean(self) -> torch.Tensor:
        measured = self.steerer.statistics.image_mean if self.steerer.settings.rule.step is None else None
        return (self.embeds().mean(0) if measured is None else measured).to(self.device)

    def embeds(self) -> torch.Tensor:
        return self.kept.sketch(self.steerer)[0].to(self.device)

    @property
    def coefficient(self) -> float:
        return self.steerer.settings.coefficient

    def temperature(self) -> float:
        return softmax_temperature(self.steerer.clip)

    def views(self) -> tuple[torch.Tensor, ...]:
        return tuple(view.to(self.device) for view in self.kept.sketch(self.steerer)[1])


def _only_moved(before: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    """Whether weights of these two [`weights_state`] are the same, on another device or under another autocast."""
    (_, parts, values), (_, others, values_now) = before, now
    moved = all(left == right or left[3] != right[3] for left, right in zip(parts, others, strict=True))
    return moved and values == values_now


def _settings(steerer: Steers) -> tuple[float, ...]:
    """What of the steering settings a fit depends on."""
    chosen, rule = steerer.settings, steerer.settings.rule
    step = () if rule.step is None else (float(chosen.lambda_), *map(float, chosen.gamma_factors))
    return (float(chosen.coefficient), *step) if "coefficient" in rule.shows else step
