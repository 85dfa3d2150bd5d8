"""The options of a call of the pipeline: read, checked, and sorted by the step that takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import PreTrainedModel

from ..config.schema import COUNT, optional
from ..config.steering import Steering, excluding, refuse_settings_of_plain
from ..data.labels.lists import names_in
from ..data.labels.names import clean_class_names
from ..data.labels.prompts import resolve_templates
from ..encoders.families import refuse_without_texts
from ..explain.inputs import resolve_names
from ..steering.steerer import Steerer
from .modeling import VS2CLIPForZeroShot


# All settings of `Steering` but `enabled`, which is `steer` here.
_STEERING_OPTIONS = tuple(field.name for field in fields(Steering) if field.name != "enabled")
_OPTIONS = (
    *("candidate_labels", "hypothesis_template", "templates", "clean", "top_k", "return_details", "timeout", "steer"),
    *("explain", "top_latents", "latent_names", "tokenizer_kwargs"),
    *_STEERING_OPTIONS,
)


@dataclass
class OneCall:
    """What the batches of one call share; filled by the first."""

    classes: torch.Tensor | None = None
    steerer: Steerer | None = None
    """`None` for a plain CLIP."""


class OptionsMixin:
    """Of the pipeline: what was said at construction and in a call."""

    core: PreTrainedModel
    tokenizer: Any

    def _sanitize_parameters(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        unknown = [name for name in options if name not in _OPTIONS]
        if unknown:
            raise TypeError(f"Unknown option {unknown[0]!r}. The options are {', '.join(_OPTIONS)}.")
        preprocess: dict[str, Any] = {name: options[name] for name in options if name == "timeout"}
        postprocess: dict[str, Any] = {name: options[name] for name in options if name == "return_details"}
        forward = postprocess | {name: options[name] for name in options if name in ("clean", "tokenizer_kwargs")}
        if "explain" in options:
            forward["explain"] = self._check_explain(options["explain"])
        for name in ("top_k", "top_latents"):
            if name in options:
                postprocess[name] = optional(COUNT).read(options[name], name)
        if "latent_names" in options:
            postprocess["latent_names"] = resolve_names(options["latent_names"])
        if "candidate_labels" in options:
            if not isinstance(self.tokenizer, Mapping):
                refuse_without_texts(getattr(self.core, "clip", self.core))
            labels, clean = options["candidate_labels"], options.get("clean", self._given("clean", True))
            labels = tuple(names_in(labels, "candidate_labels"))
            clean_class_names(labels, clean, "candidate_labels")
            forward["candidate_labels"] = postprocess["candidate_labels"] = labels
        if options.get("templates") is not None or options.get("hypothesis_template") is not None:
            forward["templates"] = _check_templates(options.get("templates"), options.get("hypothesis_template"))
        steering = self._check_steering(options)
        if steering:
            forward["steering"] = steering
        forward["call"] = OneCall()
        return preprocess, forward, postprocess

    def _given(self, name: str, default: Any) -> Any:
        """What was said of an option at construction."""
        return getattr(self, "_forward_params", {}).get(name, default)

    def _check_explain(self, explain: Any) -> bool:
        if explain and not isinstance(self.core, VS2CLIPForZeroShot):
            raise ValueError("explain=True needs latents, and this is a plain CLIP. Load a VS2 or an SAE checkpoint.")
        return bool(explain)

    def _check_steering(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The call's settings on top of the pipeline's own, tried out so that a bad one fails before the first
        image."""
        given = {name: options[name] for name in _STEERING_OPTIONS if name in options}
        if options.get("steer") is not None:
            refuse_settings_of_plain("steer", options["steer"], given)
            given["enabled"] = bool(options["steer"])
        if not isinstance(self.core, VS2CLIPForZeroShot):
            if given not in ({}, {"enabled": False}):
                raise ValueError(
                    "Steering was asked for "
                    f"({', '.join(name for name in options if name in ('steer', *_STEERING_OPTIONS))}), but this is a "
                    "plain CLIP without SAE. Load a VS2 or an SAE checkpoint."
                )
            return {}
        if not given:
            return {}
        settings = dict(self._given("steering", {})) | excluding(given)
        self.core.steerer.with_(**settings)
        return settings


def _check_templates(templates: Any, hypothesis_template: Any) -> tuple[str, ...]:
    if templates is None:
        return resolve_templates([hypothesis_template])
    if hypothesis_template is not None:
        raise ValueError("hypothesis_template= and templates= exclude each other: give one of them.")
    return resolve_templates(templates)
