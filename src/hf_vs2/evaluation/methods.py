"""What a comparison compares: the rows of its table, each a method with settings, and why one is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils import logging

from ..clip.modeling import VS2CLIPForZeroShot
from ..config.vs2_clip import METHODS, MethodParts


logger = logging.get_logger(__name__)

CONTROLS = {
    "vs2_random": ("vs2", "random"),
    "vs2_pca": ("vs2", "pca"),
    "prototypes+random": ("prototypes+sae", "random"),
}
"""A rule of the SAE with another dictionary, see [`control_model`]: name -> method, dictionary."""
EVALUATION_METHODS = (
    *("clip", "centroid", "distribution_norm", "reconstruct", "amplify", "vs2", "vs2+gate", "vs2_random", "vs2_pca"),
    *("corrected+distribution_norm", "balanced_norm", "balanced_prototypes", "prototypes", "prototypes+gate"),
    *("prototypes+pca", "prototypes+sae", "prototypes+random"),
)
"""The rows of a table where nobody names others."""
DISTRIBUTION_NORMS = ((0.5, "dot"), (1.0, "cosine"))
"""Coefficient and score of the two distribution-normalised rows, see [`distribution_norm_scores`]."""
GATE = "+gate"

_OFF = (("enabled", False),)


@dataclass(frozen=True)
class Variant:
    """One method with its settings; variants with equal `settings` and `dictionary` share their image features."""

    method: str
    settings: tuple[tuple[str, Any], ...]
    gamma: float | None = None
    lambda_: float | None = None
    tau: float | None = None
    gate: float | None = None
    coefficient: float | None = None
    score: str | None = None
    dictionary: str | None = None

    @property
    def scores_by_labels(self) -> bool:
        """Whether the model scores by something that it has fitted for the label set."""
        name = dict(self.settings).get("method")
        return name is not None and METHODS[name].scores != "cosine"

    @property
    def facts(self) -> dict[str, Any]:
        """What a result file says about the settings."""
        facts: dict[str, Any] = {"gamma": self.gamma, "lambda": self.lambda_, "tau": self.tau}
        if self.method.endswith(GATE):
            facts["gate"] = self.gate
        if self.coefficient is not None:
            facts |= {"coefficient": self.coefficient, "score": self.score}
        if self.dictionary is not None:
            facts["dictionary"] = self.dictionary
        return facts


CLIP = Variant("clip", _OFF)


def unknown_methods(methods: Sequence[str]) -> list[str]:
    """Those that no row can be made of."""
    known = {name for name in METHODS if name not in ("none", "vs2++")} | CONTROLS.keys() | {"clip"}
    return [name for name in methods if name not in known and name.removesuffix(GATE) not in known - {"clip"}]


def variants_of(model: VS2CLIPForZeroShot, methods: Sequence[str]) -> list[Variant]:
    """The rows to evaluate for one prompt set: plain CLIP, then those of `EVALUATION_METHODS` in its order, then others."""
    ordered = [name for name in EVALUATION_METHODS[1:] if name in methods]
    ordered += [name for name in dict.fromkeys(methods) if name not in EVALUATION_METHODS]
    missing = [name for name in ordered if _parts(name).needs_statistics and model.domain_statistics is None]
    if not _has_rows(model):
        missing += [name for name in ordered if name.removesuffix(GATE) in CONTROLS or _parts(name).needs_rows]
    missing = [name for name in missing if name != "distribution_norm"]  # takes its mean from the rows given
    if missing:
        logger.warning(
            f"No rows for {', '.join(dict.fromkeys(missing))}: the model has no statistics of unlabelled images to "
            "take them from, or they "
            "keep no rows. hf-vs2 calibrate measures them."
        )
    return [CLIP, *(variant for name in ordered if name not in missing for variant in _variants(model, name))]


def _parts(name: str) -> MethodParts:
    name = name.removesuffix(GATE)
    return METHODS[CONTROLS[name][0] if name in CONTROLS else name]


def _has_rows(model: VS2CLIPForZeroShot) -> bool:
    return model.domain_statistics is not None and model.domain_statistics.rows is not None


def _variants(model: VS2CLIPForZeroShot, name: str) -> list[Variant]:
    if name == "distribution_norm":
        return [Variant(name, _OFF, coefficient=c, score=score) for c, score in DISTRIBUTION_NORMS]
    base, now = name.removesuffix(GATE), model.steering_settings
    method, dictionary = CONTROLS.get(base, (base, None))
    # One number a latent is no figure for a table; `meta` holds them.
    gamma = None if isinstance(now.gamma, tuple) else now.gamma
    step = METHODS[method].step
    if gamma is None and (step in ("centroid", "corrected") or dictionary is not None):
        logger.warning(f"No {name!r} row: it needs one gamma, and this model has one a latent.")
        return []
    settings: dict[str, Any] = {"enabled": True, "gate": None, "fvu_threshold": None, "method": method}
    facts: dict[str, Any] = {"dictionary": dictionary}
    if step not in ("none", "reconstruct"):
        facts["gamma"] = gamma
        facts["lambda_"] = None if step == "amplify" else now.lambda_
    if name.endswith(GATE):
        gate = _gate(model, method, name)
        if gate is None:
            return []
        settings, facts = settings | gate[0], facts | gate[1]
    return [Variant(name, tuple(sorted(settings.items())), **facts)]


def _gate(model: VS2CLIPForZeroShot, method: str, name: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Settings and facts of the model's own gate, or else of the SAE's default one."""
    config, quantile = model.sae.config, model.steering_settings.gate
    tau = model.fvu_thresholds[model.num_layers - 1]
    if METHODS[method].reads_latents:
        if tau is None and config.gate is not None and config.fvu_quantiles:
            quantile = config.gate
            tau = model.sae.fvu_threshold(quantile)
        if tau is None:
            _no_gate(name, "default gate quantile" if config.gate is None else "calibrated FVU quantiles")
            return None
        return {"fvu_threshold": tau}, {"tau": tau, "gate": quantile}
    quantile = config.gate if quantile is None else quantile
    known = model.domain_statistics
    if quantile is None or known is None or not known.distance_quantiles:
        _no_gate(name, "default gate quantile" if quantile is None else "held-out distances")
        return None
    quantile = min(quantile, max(map(float, known.distance_quantiles)))
    return {"gate": quantile}, {"tau": known.distance_threshold(quantile), "gate": quantile}


def _no_gate(name: str, lacking: str) -> None:
    logger.warning(
        f"No {name!r} row: the model has no gate, and its SAE has no {lacking} to take one from. Calibrate the SAE, or set "
        "fvu_threshold=."
    )


__all__ = ["CLIP", "CONTROLS", "DISTRIBUTION_NORMS", "EVALUATION_METHODS", "Variant", "unknown_methods", "variants_of"]
