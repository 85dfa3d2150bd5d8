"""README's picture: `python docs/figures/gains.py`, from the committed results of the study on a small encoder."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from hf_vs2.study import StudyResult


ROOT = Path(__file__).parents[2]
ENCODER = "clip-vit-tiny-lit"
METHODS = {
    "centroid": "centroid, no SAE",
    "distribution_norm_1": "distribution norm, no SAE",
    "balanced_prototypes": "balanced prototypes, no SAE",
    "prototypes": "prototypes, no SAE",
    "reconstruct": "reconstruction",
    "amplify": "amplified reconstruction",
    "vs2": "VS2",
    "vs2+gate": "VS2, gated",
    "vs2++": "VS2++, pseudo-labels",
    "prototypes+sae": "prototypes + SAE view",
}
DATASETS = {"cifar10": "CIFAR-10", "tiny_imagenet": "Tiny-ImageNet", "cub100": "CUB-200, 100 classes"}


def main() -> None:
    result = StudyResult.from_json(ROOT / "examples" / "results" / "vit-tiny-lit" / "results.json")
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.7), sharey=True, layout="constrained")
    for axes, (dataset, title) in zip(panels, DATASETS.items(), strict=True):
        for place, method in enumerate(METHODS):
            cells = result.select("table", encoder=ENCODER, dataset=dataset, prompts="single", method=method)
            gain = np.mean([one.figures["gain"] for one in cells])
            low, high = np.mean([one.figures["gain_ci"] for one in cells], axis=0)
            ours = method.startswith("vs2") or method.endswith("sae")
            colour = "#0072B2" if ours else "#777777"
            axes.plot([low, high], [place, place], color=colour, lw=2)
            axes.plot(gain, place, "o" if ours else "s", color=colour, ms=6)
        axes.axvline(0, color="black", lw=0.8)
        plain = result.plain(ENCODER, dataset, "single")
        assert plain is not None
        axes.set_title(f"{title}\nplain CLIP {plain.figures['top1']:.1f} %", fontsize=10)
        axes.set_xlabel("gain in points, 95 % interval")
        axes.grid(axis="x", color="#DDDDDD", lw=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(METHODS)), list(METHODS.values()))
    panels[0].invert_yaxis()
    path = ROOT / "docs" / "images" / "gains.png"
    figure.savefig(path, dpi=110, metadata={"Software": None})
    print(path)


if __name__ == "__main__":
    main()
