"""README's picture: `python docs/figures/gains.py`, from the committed results of a true CLIP and of the study on a small encoder."""

import json
from pathlib import Path

import numpy as np

from hf_vs2.files.figure_style import GRID_LINES, PAGE, STYLES, new_figure, save_figure, style
from hf_vs2.methods import row_label
from hf_vs2.study import StudyResult
from hf_vs2.study.results.catalog import GROUPS, group_of


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "examples" / "results"
ENCODER = "clip-vit-tiny-lit"
METHODS = (
    *(
        "centroid",
        "full_distribution_norm",
        "balanced_norm",
        "anchored_prototypes",
        "balanced_prototypes",
        "prototypes",
    ),
    *("reconstruct", "amplify", "vs2", "vs2+gate", "prototypes+sae"),
    *("vs2_random", "vs2_pca"),
)
# What the two result files call a method where that is not its name of today.
IN_STUDY = {"full_distribution_norm": "distribution_norm_1"}
ON_TRUE_CLIP = {"centroid": "centroid, in embeddings", "vs2": "vs2, in embeddings, alpha 1.05"}
TRUE = {"imagenet": "ImageNet", "caltech": "Caltech"}
SMALL = {"cifar10": "CIFAR-10", "tiny_imagenet": "Tiny-ImageNet", "cub100": "CUB, 100 birds"}
LOOKS = {GROUPS[0]: ("#666666", "s"), GROUPS[1]: STYLES[0], GROUPS[2]: (STYLES[1][0], "^")}
Gain = tuple[float, float, float]


def main() -> None:
    panels = [*true_clip(), *small_encoder()]
    with style():
        figure = new_figure(PAGE, 3.6)
        axes = figure.subplots(1, len(panels), sharex=True, sharey=True)
        for here, (title, gains) in zip(axes, panels, strict=True):
            draw(here, title, gains)
        axes[0].set_yticks(range(len(METHODS)), [row_label(name) for name in METHODS])
        axes[0].set_ylim(len(METHODS) - 0.4, -0.6)
        figure.supxlabel(
            "gain over plain CLIP in points of top-1 accuracy, 95 % interval; one scale\nhollow: the rule in embeddings instead of CLS rows; n/a: not measured",
            fontsize=7.5,
        )
        handles, labels = axes[-1].get_legend_handles_labels()
        chosen = dict(zip(labels, handles, strict=True))
        figure.legend(chosen.values(), chosen, loc="outside upper center", ncols=len(chosen), frameon=False)
        print(save_figure(figure, ROOT / "docs" / "images" / "gains.png"))


def true_clip() -> list[tuple[str, dict[str, Gain]]]:
    """Fitted to one half of the images and scored on the other, mean of four draws."""
    found = []
    files = [
        json.loads((RESULTS / "true-clip" / name).read_text()) for name in ("vs2_in_embeddings.json", "vit_b32.json")
    ]
    for name, title in TRUE.items():
        entries = [one for file in files for one in file if (one["set"], one["kind"]) == (name, "even")]
        entry = entries[-1]
        measured = {rule: gain for one in entries for rule, gain in one["rules"].items()}
        rules = {method: measured.get(ON_TRUE_CLIP.get(method, method)) for method in METHODS}
        gains = {method: (one["gain"], one["low"], one["high"]) for method, one in rules.items() if one is not None}
        found.append((f"CLIP ViT-B/32\n{title}\nCLIP {entry['plain']:.1f} %", gains))
    return found


def small_encoder() -> list[tuple[str, dict[str, Gain]]]:
    """Mean of three seeds of the SAE, one prompt."""
    result = StudyResult.from_json(RESULTS / "vit-tiny-lit" / "results.json")
    found = []
    for dataset, title in SMALL.items():
        gains = {}
        for method in METHODS:
            asked = {"dataset": dataset, "prompts": "single", "method": IN_STUDY.get(method, method)}
            cells = result.select("table", encoder=ENCODER, **asked)
            if cells:
                low, high = np.mean([one.figures["gain_ci"] for one in cells], axis=0)
                gains[method] = (float(np.mean([one.figures["gain"] for one in cells])), low, high)
        plain = result.plain(ENCODER, dataset, "single")
        assert plain is not None
        found.append((f"ViT-Ti stand-in\n{title}\nCLIP {plain.figures['top1']:.1f} %", gains))
    return found


def draw(axes, title: str, gains: dict[str, Gain]) -> None:
    for place, method in enumerate(METHODS):
        group = group_of(method)
        colour, marker = LOOKS[group]
        if place % 2:
            axes.axhspan(place - 0.5, place + 0.5, color="0.96", zorder=0, linewidth=0)
        if method not in gains:
            axes.text(0.3, place, "n/a", va="center", color="0.5", fontsize=7)
            continue
        gain, low, high = gains[method]
        axes.plot([low, high], [place, place], color=colour, linewidth=1.3)
        in_embeddings = "ViT-B" in title and method in ON_TRUE_CLIP
        face = "white" if in_embeddings else colour
        axes.plot(
            gain,
            place,
            marker,
            color=colour,
            markerfacecolor=face,
            markersize=3.5,
            label="" if in_embeddings else group,
        )
    axes.axvline(0, color="0.35", linewidth=0.8, zorder=1)
    axes.set_title(title, loc="left", fontsize=7.5)
    axes.grid(axis="x", color=GRID_LINES, linewidth=0.6)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


if __name__ == "__main__":
    main()
