"""Label sets at work in a model: what the statistics of unlabelled rows give for one set of labels, kept for the next call."""

from __future__ import annotations

import contextlib
import copy
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn.functional import normalize
from transformers.utils import cached_file

from ..config.vs2_clip import METHODS
from ..encoders.tail import unit_embeds
from ..files.checkpoint_folder import LABEL_SETS_NAME
from ..files.weight_files import read_described, write_described
from ..files.weight_state import weights_state
from ..functional.label_free import LabelFit, balanced_mean, fit_balanced_prototypes, fit_prototypes, norm_fit


if TYPE_CHECKING:
    from ..clip.modeling import VS2CLIPForZeroShot
    from ..sae.statistics import DomainStatistics


_KIND = ("hf_vs2.label_sets", 1)
_BATCH = 1024
# Class embeddings of the same prompts differ by rounding from batch to batch and device to device; those of other prompts by more.
_SAME_CLASSES = 1e-4
_FIT_TENSORS = ("mean", "prototypes", "weights", "received", "scale")


@dataclass(frozen=True, eq=False)
class FittedLabels:
    """
    What a method has fitted for one label set.

    Args:
        method (`str`), settings (`tuple`): the method, and gamma and lambda where its step depends on them.
        class_embeds (`torch.Tensor` of shape `(num_classes, projection_dim)`): of unit length; by these the set is recognised.
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

    def is_of(self, method: str, settings: tuple[float, ...], classes: torch.Tensor) -> bool:
        """Whether it is what `method` would fit for these classes."""
        if (self.method, self.settings, self.class_embeds.shape) != (method, settings, classes.shape):
            return False
        return bool((self.class_embeds.to(classes.device) - classes).abs().max() < _SAME_CLASSES)


class LabelScoring:
    """
    What a model has fitted for label sets, for as long as its weights and statistics stay as they are. Shallow copies of a model
    share it; it may be used from several threads. A copy, and what another process receives, has the sets fitted by name.
    """

    max_floats = 2**24
    """How many numbers the fits that were not made by name may hold together (64 MB); the least recently used go first."""

    def __init__(self, named: tuple[FittedLabels, ...] = ()):
        self.named = named
        self._lock = threading.Lock()
        self._state: tuple[Any, ...] | None = None
        self._recent: list[FittedLabels] = []
        self._sketch: tuple[Any, torch.Tensor, tuple[torch.Tensor, ...]] | None = None

    def __reduce__(self) -> tuple[type[LabelScoring], tuple[tuple[FittedLabels, ...]]]:
        return type(self), (self.named,)

    def clear(self) -> None:
        """Forget everything: the statistics are others now."""
        with self._lock:
            self.named, self._recent, self._sketch, self._state = (), [], None, None

    @torch.compiler.disable  # locks and caches are nothing to trace
    def fitted(
        self, model: VS2CLIPForZeroShot, class_embeds: torch.Tensor, labels: tuple[str, ...] | None = None
    ) -> FittedLabels:
        """
        What the method in force makes of class embeddings `(num_classes, projection_dim)`: known, or fitted now. With `labels` it is
        kept by name, and saved with the model.

        Raises:
            `ValueError`: without statistics, or rows where the method needs them.
        """
        method, settings = model.steering_settings.method, _settings(model)
        if model.steering_settings.parts.needs_rows and statistics_of(model).rows is None:
            raise ValueError(lacking_rows(method))
        with self._lock, _kept_tensors():
            classes = normalize(class_embeds.float(), dim=-1)
            self._check_state(model)
            for known in (*self.named, *self._recent):
                if known.is_of(method, settings, classes):
                    if labels is None or known.labels is not None:
                        self._keep(known)
                        return known
                    found = replace(known, labels=labels)
                    break
            else:
                found = FittedLabels(method, settings, classes.clone(), self._fit(model, settings, classes), labels)
            if labels is not None:
                self.named = (*self.named, found)
            else:
                self._keep(found)
            return found

    def _keep(self, used: FittedLabels) -> None:
        if used.labels is not None:
            return
        self._recent = [*(one for one in self._recent if one is not used), used]
        while len(self._recent) > 1 and sum(one.fit.num_floats for one in self._recent) > self.max_floats:
            del self._recent[0]

    def image_mean(self, model: VS2CLIPForZeroShot) -> torch.Tensor:
        """Mean unit embedding under the step in force, `(projection_dim,)`: as measured, or that of the sketch."""
        with self._lock, _kept_tensors():
            self._check_state(model)
            return self._image_mean(model, _settings(model))

    def named_now(self, model: VS2CLIPForZeroShot) -> tuple[FittedLabels, ...]:
        """The sets fitted by name, less those of other weights than the model has now."""
        with self._lock:
            self._check_state(model)
            return self.named

    def _check_state(self, model: VS2CLIPForZeroShot) -> None:
        """Everything is dropped when weights or statistics change that it was made of; what a copy brought belongs to those of the
        first use."""
        clip, sae = model.clip, model.sae
        parts = (clip.vision_model.post_layernorm, clip.visual_projection, sae)
        weights = weights_state([parameter for part in parts for parameter in part.parameters()])
        state = weights, (sae.config.top_k, sae.config.activation, sae.domain_statistics)
        if self._state is not None and state != self._state:
            self._recent, self._sketch = [], None
            if state[1] != self._state[1] or not _only_moved(self._state[0], weights):
                self.named = ()
        self._state = state

    def _fit(self, model: VS2CLIPForZeroShot, settings: tuple[float, ...], classes: torch.Tensor) -> LabelFit:
        scores = model.steering_settings.parts.scores
        mean = self._image_mean(model, settings).to(classes.device)
        if scores == "distribution_norm":
            nothing = tuple(classes.new_zeros(len(classes), width) for width in _view_widths(model))
            return norm_fit(classes, mean)._replace(views=nothing)
        embeds, views = self._sketch_rows(model, settings)
        embeds = embeds.to(classes.device)
        if scores == "balanced_norm":
            return norm_fit(classes, balanced_mean(embeds, classes))
        if scores == "balanced_prototypes":
            return fit_balanced_prototypes(embeds, classes)
        if scores == "prototypes":
            return fit_prototypes(embeds, classes, mean, [view.to(classes.device) for view in views])
        raise ValueError(f"method={model.steering_settings.method!r} scores by {scores!r}, which fits nothing.")

    def _image_mean(self, model: VS2CLIPForZeroShot, settings: tuple[float, ...]) -> torch.Tensor:
        steps = model.steering_settings.parts.step != "none"
        known = statistics_of(model)
        if known.image_mean is not None and not steps:
            return known.image_mean
        if known.rows is None:
            raise ValueError(lacking_rows(model.steering_settings.method))
        return self._sketch_rows(model, settings)[0].mean(0)

    def _sketch_rows(
        self, model: VS2CLIPForZeroShot, settings: tuple[float, ...]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Unit embeddings `(m, projection_dim)` of the sketch under the step in force, and its views."""
        parts, rows = model.steering_settings.parts, statistics_of(model).rows
        assert rows is not None  # who calls has looked
        key = (parts.step, parts.views, settings)
        if self._sketch is None or self._sketch[0] != key:
            # A shallow copy: the settings of the model itself are not touched.
            with copy.copy(model).steering(gate=None, fvu_threshold=None, enabled=True, edits=None) as every_row:
                found = [every_row.image_features_from_cls(block) for block in rows.split(_BATCH)]
            embeds = torch.cat(
                [unit_embeds(cast(torch.Tensor, part.features), "row {} of the sketch".format) for part in found]
            )
            views = tuple(torch.cat(parts) for parts in zip(*(part.views or () for part in found), strict=True))
            self._sketch = key, embeds, views
        return self._sketch[1:]

    # On disk

    def save(self, folder: str | os.PathLike) -> None:
        """Write the sets fitted by name into `label_sets.safetensors`; it appears whole or not at all."""
        tensors: dict[str, torch.Tensor] = {}
        listed = []
        for number, known in enumerate(self.named):
            listed.append({"method": known.method, "settings": known.settings, "labels": known.labels})
            named = {"class_embeds": known.class_embeds} | {name: getattr(known.fit, name) for name in _FIT_TENSORS}
            named |= {f"view_{place}": view for place, view in enumerate(known.fit.views)}
            tensors |= {f"{number}.{name}": tensor.clone() for name, tensor in named.items()}
        write_described(Path(folder) / LABEL_SETS_NAME, tensors, _KIND, {"label_sets": listed})

    @classmethod
    def load(
        cls, name_or_path: str | os.PathLike, place: Mapping[str, Any], model: VS2CLIPForZeroShot
    ) -> LabelScoring:
        """
        Those of a checkpoint in a folder or on the Hub, for the model that it holds.

        Raises:
            `OSError`: if there are none, or they can't be reached. `ValueError`: if the file is damaged or something else.
        """
        path = cached_file(os.fspath(name_or_path), LABEL_SETS_NAME, **place)
        named = read_described(
            path,
            _KIND,
            lambda about, tensors: [
                _read(tensors, number, one, model) for number, one in enumerate(about["label_sets"])
            ],
            "Save the model again.",
        )
        found = cls(tuple(named))
        found.named_now(model)  # they belong to these weights
        return found


def _read(
    tensors: Mapping[str, torch.Tensor], number: int, about: Mapping[str, Any], model: VS2CLIPForZeroShot
) -> FittedLabels:
    method = str(about["method"])
    if method not in METHODS or METHODS[method].scores == "cosine":
        raise ValueError(f"label set {number} is of method {method!r}, which fits nothing")
    own = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{number}.")}
    labels, width = tuple(map(str, about["labels"])), model.clip.config.projection_dim
    num = len(labels)
    views = {f"view_{place}": (num, size) for place, size in enumerate(_view_widths(model, method))}
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
    fit = LabelFit(mean, prototypes, weights, received, scale, tuple(own[name] for name in views))
    return FittedLabels(method, tuple(map(float, about["settings"])), own["class_embeds"], fit, labels)


@contextlib.contextmanager
def _kept_tensors() -> Iterator[None]:
    """What is kept from inference may serve a training step: no inference tensors, and no graph (which leaving the mode would switch on
    again)."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _only_moved(before: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    """Whether weights of these two [`weights_state`] are the same, on another device or under another autocast."""
    (_, parts, values), (_, others, found) = before, now
    moved = all(one == other or one[3] != other[3] for one, other in zip(parts, others, strict=True))
    return moved and values == found


def _view_widths(model: VS2CLIPForZeroShot, method: str | None = None) -> list[int]:
    """Of the views that a method, by default the one in force, looks at."""
    num_latents, hidden_size = model.sae.config.weight_shape
    widths = {"pca": hidden_size, "sae": num_latents}
    return [widths[view] for view in METHODS[method or model.steering_settings.method].views]


def lacking_rows(method: str) -> str:
    return (
        f"method={method!r} is fitted to rows of unlabelled images, and the statistics of this model keep none "
        "(--sketch_rows 0, or "
        "without_rows()). Use method='distribution_norm', which needs none, or calibrate again with rows: hf-vs2 "
        "calibrate."
    )


def statistics_of(model: VS2CLIPForZeroShot) -> DomainStatistics:
    """The model's statistics.

    Raises:
        `ValueError`: if it has none.
    """
    if model.domain_statistics is None:  # `set_steering` refuses such methods, a bare configuration may name one
        raise ValueError(
            f"method={model.steering_settings.method!r} needs statistics of unlabelled images: see set_domain_statistics."
        )
    return model.domain_statistics


def _settings(model: VS2CLIPForZeroShot) -> tuple[float, ...]:
    """What of the steering settings a fit depends on."""
    chosen = model.steering_settings
    return () if chosen.parts.step == "none" else (float(chosen.lambda_), *map(float, chosen.gamma_factors))


__all__ = ["FittedLabels", "LabelScoring", "lacking_rows", "statistics_of"]
