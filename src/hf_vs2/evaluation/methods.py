"""What a comparison compares: the rows of its table, each a method with settings, and why one is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers.utils import logging

from ..clip.modeling import VS2CLIPForZeroShot
from ..encoders.tail import is_sigmoid
from ..methods import GATE, METHODS, Method, find_method, method_named, rows_by_name


logger = logging.get_logger(__name__)


def evaluation_methods() -> tuple[str, ...]:
    """The rows of a table where nobody names others: plain CLIP, then of each method that is compared its own row, its
    gated one and its controls."""
    names = ["clip"]
    for method in METHODS.values():
        if method.compared:
            names += [method.name, *([method.name + GATE] if method.compared_gated else []), *method.controls]
    return tuple(names)


def controls() -> dict[str, tuple[str, str]]:
    """Rows that run a method with another dictionary in the SAE's place, see [`control_model`]: name -> method,
    dictionary."""
    return {name: (row.rule.name, row.dictionary) for name, row in rows_by_name().items() if row.dictionary}


_OFF = (("enabled", False),)


@dataclass(frozen=True)
class Variant:
    """One method with its settings; variants with equal `settings` and `dictionary` share their image features."""

    method: str
    settings: tuple[tuple[str, Any], ...]
    dictionary: str | None = None
    shown: tuple[tuple[str, Any], ...] = ()
    """What the settings are called in a result file."""

    @property
    def scores_by_labels(self) -> bool:
        """Whether the model scores by something that it has fitted for the label set."""
        name = dict(self.settings).get("method")
        return name is not None and method_named(name).fit is not None

    @property
    def takes_reference(self) -> bool:
        """Whether the mean of reference rows is all that it is fitted to."""
        rule = method_named(dict(self.settings).get("method", "none"))
        return rule.fit is not None and not rule.needs_rows

    @property
    def facts(self) -> dict[str, Any]:
        """What a result file says about the settings."""
        facts: dict[str, Any] = {"gamma": None, "lambda": None, "tau": None} | dict(self.shown)
        return facts if self.dictionary is None else facts | {"dictionary": self.dictionary}


CLIP = Variant("clip", _OFF)


def check_methods(methods: Sequence[str]) -> None:
    """Refuse names that no row can be made of.

    Raises:
        `ValueError`: naming the first such, and those that there are.
    """
    for name in methods:
        base = name.removesuffix(GATE)
        if name in ("clip", *controls()):
            continue
        method = find_method(base)
        if method is None or method.needs_corpus or not method.acts:
            known = [name for name, one in METHODS.items() if one.acts and not one.needs_corpus]
            raise ValueError(
                f"{name!r} is no row of a comparison. Use some of {['clip', *known, *controls()]}; methods may end in "
                f"{GATE!r}, but neither 'clip' nor controls."
            )


def variants_of(model: VS2CLIPForZeroShot, methods: Sequence[str], has_reference: bool = False) -> list[Variant]:
    """The rows to evaluate for one prompt set: plain CLIP, then those of [`evaluation_methods`] in its order, then
    others.
    `has_reference`: whether there are reference rows for methods that need but a mean image."""
    default = evaluation_methods()
    ordered = [name for name in default[1:] if name in methods]
    ordered += [name for name in dict.fromkeys(methods) if name not in default]
    if is_sigmoid(model.clip):
        ordered = [name for name in ordered if not _method(name).needs_softmax or name not in default]
    missing = [name for name in ordered if _method(name).needs_statistics and model.domain_statistics is None]
    if not _has_rows(model):
        missing += [name for name in ordered if name.removesuffix(GATE) in controls() or _method(name).needs_rows]
    if has_reference:
        missing = [name for name in missing if _method(name).fit is None or _method(name).needs_rows]
    if missing:
        logger.warning(
            f"No rows for {', '.join(dict.fromkeys(missing))}: the model has no statistics of unlabelled images to "
            "take them from, or they keep no rows. hf-vs2 calibrate measures them."
        )
    return [CLIP, *(variant for name in ordered if name not in missing for variant in _variants(model, name))]


def _method(name: str) -> Method:
    name = name.removesuffix(GATE)
    return method_named(controls()[name][0] if name in controls() else name)


def _has_rows(model: VS2CLIPForZeroShot) -> bool:
    return model.domain_statistics is not None and model.domain_statistics.rows is not None


def _variants(model: VS2CLIPForZeroShot, name: str) -> list[Variant]:
    base, now = name.removesuffix(GATE), model.steering_settings
    method, dictionary = controls().get(base, (base, None))
    # One number a latent is no figure for a table; `meta` holds them.
    gamma = None if isinstance(now.gamma, tuple) else now.gamma
    rule = method_named(method)
    if gamma is None and (rule.one_direction or dictionary is not None):
        logger.warning(f"No {name!r} row: it needs one gamma, and this model has one a latent.")
        return []
    settings: dict[str, Any] = {"enabled": True, "gate": None, "fvu_threshold": None, "method": method}
    values = {"gamma": gamma, "lambda": now.lambda_, "coefficient": now.coefficient}
    shown = {name: values[name] for name in rule.shows}
    if name.endswith(GATE):
        gate = _gate(model, method, name)
        if gate is None:
            return []
        settings, shown = settings | gate[0], shown | gate[1]
    return [Variant(name, tuple(sorted(settings.items())), dictionary, tuple(shown.items()))]


def _gate(model: VS2CLIPForZeroShot, method: str, name: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Settings and facts of the model's own gate, or else of the SAE's default one."""
    config, now, known = model.sae.config, model.steering_settings, model.domain_statistics
    quantile = config.gate if now.gate is None else now.gate
    if replace(now, method=method, gate=None, fvu_threshold=None).measures_fvu:
        if now.fvu_threshold is not None:
            return {"fvu_threshold": now.fvu_threshold}, {"tau": now.fvu_threshold, "gate": None}
        if quantile is None or not config.fvu_quantiles:
            _no_gate(name, "default gate quantile" if quantile is None else "calibrated FVU quantiles")
            return None
        quantile = config.usable_gate(quantile)
        tau = config.fvu_threshold(quantile)
        return {"fvu_threshold": tau}, {"tau": tau, "gate": quantile}
    if quantile is None or known is None or not known.distance_quantiles:
        _no_gate(name, "default gate quantile" if quantile is None else "held-out distances")
        return None
    quantile = min(quantile, max(map(float, known.distance_quantiles)))
    return {"gate": quantile}, {"tau": known.distance_threshold(quantile), "gate": quantile}


def _no_gate(name: str, lacking: str) -> None:
    logger.warning(
        f"No {name!r} row: the model has no gate, and its SAE has no {lacking} to take one from. Calibrate the SAE, "
        "or set fvu_threshold=."
    )
