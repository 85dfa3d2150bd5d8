"""The table of docs/label-free.md: `python docs/figures/label_free_table.py`, from the committed results of the study.

Mean over SAE seeds; the interval is the mean of the seeds' 95 % paired bootstrap intervals over images.
"""

import argparse
from pathlib import Path

import numpy as np

from hf_vs2.study import StudyResult


ROOT = Path(__file__).parents[2]
ENCODER = "clip-vit-tiny-lit"
DATASETS = {"cifar10": "CIFAR-10", "tiny_imagenet": "Tiny-ImageNet", "cub100": "CUB, 100 classes"}
METHODS = {
    "anchored_prototypes": "anchored prototypes",
    "centroid": "centroid",
    "distribution_norm": "distribution norm (both means x 0.25)",
    "distribution_norm_1": "full distribution norm",
    "full_distribution_norm": "full distribution norm, gated",
    "balanced_norm": "balanced norm",
    "balanced_prototypes": "balanced prototypes",
    "prototypes": "prototypes",
    "prototypes+gate": "prototypes, gated",
    "prototypes+pca": "prototypes + PCA view",
    "vs2": "**VS2**",
    "vs2+gate": "**VS2, gated**",
    "vs2_random": "VS2's rule, random directions",
    "vs2_pca": "VS2's rule, principal components",
    "vs2++": "VS2++, pseudo-labels",
    "corrected+distribution_norm": "corrected VS2, then full distribution norm",
    "prototypes+sae": "prototypes + SAE view",
    "prototypes+random": "prototypes + view of random directions",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "examples/results/vit-tiny-lit/results.json")
    parser.add_argument("--prompts", default="single")
    args = parser.parse_args()
    result = StudyResult.from_json(args.results)
    print("| method |", " | ".join(DATASETS.values()), "|")
    print("|---|", "---:|" * len(DATASETS), sep="")
    plain = [result.plain(ENCODER, dataset, args.prompts) for dataset in DATASETS]
    print("| plain CLIP, top-1 |", " | ".join(f"{one.figures['top1']:.2f}" for one in plain if one is not None), "|")
    for method, label in METHODS.items():
        fields = [_field(result, dataset, args.prompts, method) for dataset in DATASETS]
        print(f"| {label} |", " | ".join(fields), "|")


def _field(result: StudyResult, dataset: str, prompts: str, method: str) -> str:
    cells = result.select("table", encoder=ENCODER, dataset=dataset, prompts=prompts, method=method)
    gain = np.mean([one.figures["gain"] for one in cells])
    low, high = np.mean([one.figures["gain_ci"] for one in cells], axis=0)
    return f"{gain:+.2f} [{low:+.1f}, {high:+.1f}]"


if __name__ == "__main__":
    main()
