"""The methods that a study compares, by name: its own, and every method of the library with its gated row and
controls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...methods import METHODS, Row, row_label, rows_by_name


@dataclass(frozen=True)
class Method:
    """
    Args:
        label (`str`): as tables have it.
        settings (`tuple[str]`): what of the study's settings it depends on: `"sae"` (and so a seed), `"gamma"`,
            `"lambda"`, `"gate"`, `"retrieval"`, `"rag_weight"`, `"pass_weight"`, `"views"`, `"inner"` (runs the whole
            model on images), `"sketch"` (fits something to unlabelled training rows).
        uses_labels (`str`): where labels enter, beside scoring: `""`, `"training"` or `"test"`.
        rule (`str`), dictionary (`str`), of the library's: the method that runs, and for a control the dictionary in
            the SAE's place, see [`control_model`].
        default (`bool`): whether a study has it that names no methods.
    """

    label: str
    settings: tuple[str, ...] = ()
    uses_labels: str = ""
    rule: str | None = None
    dictionary: str | None = None
    default: bool = True

    @property
    def seeded(self) -> bool:
        """Whether the SAE's seed matters."""
        return "sae" in self.settings


_STEP = ("gamma", "lambda")
_SAE = ("sae", *_STEP)
OWN: Mapping[str, Method] = {
    "clip": Method(row_label("clip")),
    "centroid": Method("centroid, no SAE", _STEP),
    "distribution_norm_0.5": Method("distribution norm 0.5, no SAE"),
    "distribution_norm_1": Method("distribution norm 1, no SAE"),
    "mean_logit": Method("mean-logit debiasing, no SAE"),
    "rec_a": Method("REC-A", ("sae", "inner")),
    "zero_out": Method("zero-out (gamma 0, lambda 1)", ("sae",)),
    "negate": Method("negate (gamma -1, lambda 1)", ("sae",)),
    "vs2_last2": Method("VS2, last 2 layers", (*_SAE, "inner")),
    "vs2_last3": Method("VS2, last 3 layers", (*_SAE, "inner")),
    "ens_aug": Method("augmented views", ("views",)),
    "vs2_ens_aug": Method("VS2, augmented views", (*_SAE, "views")),
    "vs2_pass": Method("VS2 + PASS", (*_SAE, "pass_weight"), uses_labels="training"),
    "oracle_prototypes": Method("oracle prototypes", _SAE, uses_labels="test"),
    "vs2++": Method("VS2++, pseudo-labels", (*_SAE, "retrieval")),
    "vs2++query": Method("VS2++, the query's pseudo-label", (*_SAE, "retrieval")),
    "vs2++oracle": Method("VS2++, oracle", (*_SAE, "retrieval"), uses_labels="training"),
    "rag": Method("weighted RAG", ("retrieval", "rag_weight")),
    "rag_pseudo": Method("weighted RAG, pseudo-labels", ("retrieval", "rag_weight")),
    "rag_oracle": Method("weighted RAG, oracle", ("retrieval", "rag_weight"), uses_labels="training"),
    "clip_steering_pseudo": Method("CLIP steering, pseudo-labels", (*_STEP, "retrieval")),
    "clip_steering_oracle": Method("CLIP steering, oracle", (*_STEP, "retrieval"), uses_labels="training"),
    "knn_vote": Method("k-NN vote of pseudo-labels", ("retrieval",)),
    "linear_probe": Method("linear probe on pseudo-labels"),
}
"""Methods that only a study has, and those whose row it makes otherwise than the library: see
[`hf_vs2.study.methods.RUNS`]."""

STEERED_LAYERS = {"vs2_last2": 2, "vs2_last3": 3}
"""How many layers these steer, which the encoder must have."""


GROUPS = ("without an SAE", "with an SAE", "the SAE replaced", "retrieval or pseudo-labels", "with labels")
"""What a method is, for tables and figures; "the SAE replaced" are the controls that run a rule with something
untrained in the SAE's place."""


def group_of(name: str) -> str:
    """The one of [`GROUPS`] that a method belongs to; those of a file that nothing knows are without an SAE."""
    about = study_methods().get(name)
    if about is None:
        return GROUPS[0]
    rule = METHODS.get(about.rule or "")
    if about.uses_labels:
        return GROUPS[4]
    if "retrieval" in about.settings or "pseudo" in about.label:
        return GROUPS[3]
    if about.dictionary is not None or rule is not None and rule.views and not rule.reads_latents:
        return GROUPS[2]
    return GROUPS[1] if about.seeded else GROUPS[0]


def label_of(name: str, written: Mapping[str, Any]) -> str:
    """What tables and figures call a method: as it is called today, or else as the result (its `meta["methods"]`) has
    it."""
    about = study_methods().get(name)
    return written.get(name, {}).get("label") or name if about is None else about.label


def study_methods() -> dict[str, Method]:
    """All of them, those registered by now from outside the package too."""
    found = dict(OWN)
    for name, row in rows_by_name().items():
        if row.rule.acts and not row.rule.needs_corpus:
            found.setdefault(name, _of_the_library(row))
    return found


def _of_the_library(row: Row) -> Method:
    rule = row.rule
    settings: tuple[str, ...] = ("sae",) if rule.reads_latents else ()
    settings += tuple(name for name in _STEP if name in rule.shows)
    settings += ("gate",) if row.gated else ()
    settings += ("sketch",) if rule.needs_statistics or row.dictionary else ()
    default = rule.compared_gated if row.gated else row.dictionary is not None or rule.compared
    return Method(row.label, settings, rule=rule.name, dictionary=row.dictionary, default=default)
