"""Pure tensor functions, torch only: the paper's equations (given here), label-free rules, sparse sums and kernels,
neighbours."""

from .equations import (
    ACTIVATIONS,
    ScoreParts,
    amplify,
    centroid_steer,
    contrastive_change,
    contrastive_direction,
    edited_change,
    fvu_per_sample,
    gate,
    keep_norm,
    prototype_alignment,
    score_parts,
    steer,
    steering_vector,
    top_k,
)


__all__ = [
    "ACTIVATIONS",
    "ScoreParts",
    "amplify",
    "centroid_steer",
    "contrastive_change",
    "contrastive_direction",
    "edited_change",
    "fvu_per_sample",
    "gate",
    "keep_norm",
    "prototype_alignment",
    "score_parts",
    "steer",
    "steering_vector",
    "top_k",
]
