"""The methods that a study knows, by name: what their rows are called, and which settings they depend on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """
    Args:
        label (`str`): as the paper's table has it.
        settings (`tuple[str]`): what of the study's settings it depends on: `"sae"` (and so a seed), `"gamma"`, `"lambda"`,
            `"gate"`, `"retrieval"`, `"rag_weight"`, `"pass_weight"`, `"views"`, `"inner"` (runs the whole model on images), `"sketch"`
            (fits something to unlabelled training rows).
        uses_labels (`str`): where labels enter, beside scoring: `""`, `"training"` or `"test"`.
    """

    label: str
    settings: tuple[str, ...] = ()
    uses_labels: str = ""

    @property
    def seeded(self) -> bool:
        """Whether the SAE's seed matters."""
        return "sae" in self.settings


_STEP = ("gamma", "lambda")
_SAE = ("sae", *_STEP)
METHODS = {
    "clip": Method("CLIP zero-shot"),
    "centroid": Method("centroid, no SAE", _STEP),
    "distribution_norm_0.5": Method("distribution norm 0.5, no SAE"),
    "distribution_norm_1": Method("distribution norm 1, no SAE"),
    "mean_logit": Method("mean-logit debiasing, no SAE"),
    "rec_a": Method("REC-A", ("sae", "inner")),
    "rec_f": Method("REC-F", ("sae",)),
    "rec_f_gamma": Method("REC-F+gamma", ("sae", "gamma")),
    "zero_out": Method("zero-out (gamma 0, lambda 1)", ("sae",)),
    "negate": Method("negate (gamma -1, lambda 1)", ("sae",)),
    "vs2": Method("VS2", _SAE),
    "vs2_gate": Method("VS2, gated", (*_SAE, "gate")),
    "vs2_last2": Method("VS2, last 2 layers", (*_SAE, "inner")),
    "vs2_last3": Method("VS2, last 3 layers", (*_SAE, "inner")),
    "ens_aug": Method("augmented views", ("views",)),
    "vs2_ens_aug": Method("VS2, augmented views", (*_SAE, "views")),
    "vs2_pass": Method("VS2 + PASS", (*_SAE, "pass_weight"), uses_labels="training"),
    "oracle_prototypes": Method("oracle prototypes", _SAE, uses_labels="test"),
    "vs2pp_majority": Method("VS2++, pseudo-labels", (*_SAE, "retrieval")),
    "vs2pp_query": Method("VS2++, the query's pseudo-label", (*_SAE, "retrieval")),
    "vs2pp_oracle": Method("VS2++, oracle", (*_SAE, "retrieval"), uses_labels="training"),
    "rag": Method("weighted RAG", ("retrieval", "rag_weight")),
    "rag_pseudo": Method("weighted RAG, pseudo-labels", ("retrieval", "rag_weight")),
    "rag_oracle": Method("weighted RAG, oracle", ("retrieval", "rag_weight"), uses_labels="training"),
    "clip_steering_pseudo": Method("CLIP steering, pseudo-labels", (*_STEP, "retrieval")),
    "clip_steering_oracle": Method("CLIP steering, oracle", (*_STEP, "retrieval"), uses_labels="training"),
    "knn_vote": Method("k-NN vote of pseudo-labels", ("retrieval",)),
    "linear_probe": Method("linear probe on pseudo-labels"),
    "vs2_random": Method("VS2's rule, random dictionary", (*_SAE, "sketch")),
    "vs2_pca": Method("VS2's rule, PCA", (*_SAE, "sketch")),
    "vs2_dn": Method("VS2, then distribution norm", (*_SAE, "sketch")),
    "corrected_dn": Method("corrected VS2, then distribution norm", (*_SAE, "sketch")),
    "distribution_norm_gate": Method("distribution norm 1, gated", ("gate", "sketch")),
    "balanced_norm": Method("balanced norm", ("sketch",)),
    "balanced_prototypes": Method("balanced prototypes", ("sketch",)),
    "prototypes": Method("prototypes (KM-MAP)", ("sketch",)),
    "prototypes_gate": Method("prototypes, gated", ("gate", "sketch")),
    "prototypes_pca": Method("prototypes + PCA view", ("sketch",)),
    "prototypes_sae": Method("prototypes + SAE view", ("sae", "sketch")),
    "prototypes_random": Method("prototypes + view of a random dictionary", ("sae", "sketch")),
    "prototypes_pca_sae": Method("prototypes + PCA and SAE views", ("sae", "sketch")),
}
