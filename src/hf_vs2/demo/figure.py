"""The demo's picture: gains, accuracy per class, the gate, and images whose answer changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..files.figure_style import GREY, PAGE, STYLES, new_figure, save_figure, style
from ..files.markdown import percent
from ..files.report import draw_gains
from .folds import outcomes


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

    from .result import DemoResult

BLUE, ORANGE, GREEN = (colour for colour, _ in STYLES[:3])
MAX_RELATIVE_FVU = 3.0
NUM_FLIPPED = 12


def draw_demo(result: DemoResult, images: Sequence[Image], path: Path) -> None:
    """Write the picture of a demo run to `path`; `images` are the evaluated ones, in order."""
    with style():
        figure = new_figure(PAGE, 7.6)
        figure.suptitle(
            f"A CLIP that learned typefaces reads {len(images):,} handwritten digits: VS2 without labels, out of fold"
        )
        rows: Any = figure.subfigures(3, 1, height_ratios=[4.2, 2.8, 2])
        top, middle, bottom = rows
        axes = top.subplots()
        draw_gains(axes, result.evaluation)
        left, right = middle.subfigures(1, 2)
        _draw_classes(left.subplots(), result)
        _draw_gate(right.subplots(), result)
        _draw_flipped(bottom, result, images)
        save_figure(figure, path)


def _draw_classes(axes: Axes, result: DemoResult) -> None:
    """Accuracy of every class, plain and steered, joined by a line."""
    evaluation = result.evaluation
    plain, steered = (
        np.array(evaluation.per_class["accuracy"][evaluation.index(method)]) for method in ("clip", "vs2+gate")
    )
    names = evaluation.per_class["class_names"]
    places = np.arange(len(names))
    axes.hlines(places, np.minimum(plain, steered), np.maximum(plain, steered), color=GREY, linewidth=1.5)
    axes.plot(plain, places, "o", color="white", markeredgecolor="black", markersize=4.5, label="plain CLIP")
    axes.plot(steered, places, "D", color=BLUE, markersize=4, label="VS2 with gate")
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel("top-1 accuracy of each class, % (one prompt)")
    axes.grid(axis="x", color="0.9")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)


def _draw_gate(axes: Axes, result: DemoResult) -> None:
    """FVU relative to the gate's threshold: a histogram for the target and each foreign set, one above the other."""
    groups = [("handwritten digits", result.relative_fvu, BLUE)]
    groups += [(one.name, one.relative_fvu, ORANGE) for one in result.foreign]
    edges = np.linspace(0, MAX_RELATIVE_FVU, 61)
    axes.axvspan(0, 1, color="0.95", zorder=0)
    for place, (_, relative, colour) in enumerate(reversed(groups)):
        counts, _ = np.histogram(relative.clamp(max=MAX_RELATIVE_FVU - 1e-6), edges)
        axes.stairs(place + 0.85 * counts / counts.max(), edges, baseline=place, fill=True, color=colour, alpha=0.8)
        steered = (relative <= 1).double().mean().item()
        axes.text(1.02, place + 0.3, f"{percent(steered, 0)} steered", transform=axes.get_yaxis_transform())
    axes.axvline(1, color="black", linestyle="--", linewidth=1.2)
    axes.set_yticks(np.arange(len(groups)) + 0.3, [name for name, _, _ in reversed(groups)])
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, MAX_RELATIVE_FVU)
    axes.set_xlabel(f"FVU over the gate's threshold ({MAX_RELATIVE_FVU:g}: and above)")
    axes.set_title("The gate: left of the line steered", loc="left")


def _draw_flipped(panel: Any, result: DemoResult, images: Sequence[Image]) -> None:
    """Images whose answer VS2 changed, for the better and for the worse, in the order of the data set."""
    evaluation = result.evaluation
    labels, samples = outcomes(evaluation)
    row = evaluation.row("vs2+gate")
    before, after = (samples[evaluation.index(method)].predictions for method in ("clip", "vs2+gate"))
    right_before, right_after = before.eq(labels), after.eq(labels)
    kinds = (
        (f"fixed ({row['fixed']})", ~right_before & right_after, GREEN),
        (f"broken ({row['broken']})", right_before & ~right_after, ORANGE),
    )
    panel.suptitle(
        "Answers that VS2 with gate changed: plain \N{RIGHTWARDS ARROW} steered", x=0.02, ha="left", fontsize="medium"
    )
    cells = panel.subplots(len(kinds), NUM_FLIPPED, squeeze=False)
    for kind, (name, chosen, colour) in enumerate(kinds):
        indices = torch.nonzero(chosen).flatten().tolist()[:NUM_FLIPPED]
        places = cells[kind]
        for axes in places:
            axes.set_axis_off()
        for axes, index in zip(places, indices, strict=False):
            axes.imshow(np.asarray(images[index]), cmap="gray", vmin=0, vmax=255)
            axes.set_title(f"{before[index]} \N{RIGHTWARDS ARROW} {after[index]}", color=colour, pad=3)
        places[0].text(
            -0.25, 0.5, name, transform=places[0].transAxes, rotation=90, va="center", ha="right", color=colour
        )
