"""An explanation as a picture: the image, the probabilities before and after, and what moved the scores."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.pixels import uint8_pixels
from ..files.figure_style import (
    GAIN,
    GREY,
    GRID_LINES,
    LOSS,
    PAGE,
    check_drawing,
    new_figure,
    save_figure,
    signed,
    style,
)
from .explanation import VS2Explanation


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

TOTAL = "0.25"
NO_LATENT = ("no latent", "normalisation")
UPPER_INCHES, ROW_INCHES = 2.9, 0.2
MAX_BARS = 8


def leading_labels(explanation: VS2Explanation, number: int, image: int = 0) -> list[int]:
    """Places of the labels to look at: steered CLIP's best, plain CLIP's best, and then steered CLIP's next."""
    order = explanation.steered_scores[image].argsort(descending=True, stable=True).tolist()
    first = [order[0], int(explanation.plain_scores[image].argmax())]
    return list(dict.fromkeys(first + order))[: max(1, number)]


def draw_explanation(
    explanation: VS2Explanation,
    picture: Image,
    path: str | Path,
    *,
    image: int = 0,
    title: str = "",
    num_labels: int = 3,
    num_latents: int = 6,
) -> Path:
    """
    Write the picture of one image's explanation; the suffix of `path` says in which format (`.png`, `.svg` or `.pdf`).

    Args:
        explanation: of a batch.
        picture: the image as the model saw it, see [`as_clip_sees`].
        path: where to; its folder is made when needed.
        image: which of the batch.
        title: of the image.
        num_labels: labels whose scores are taken apart.
        num_latents: latents drawn for each of them; the others are one bar.

    Raises:
        `ImportError`: matplotlib is missing. `ValueError`: another suffix.
    """
    path = Path(path)
    check_drawing(path)
    labels = leading_labels(explanation, num_labels, image)
    steps = [explanation.parts(label, image, num_latents) for label in labels] if explanation.steered[image] else []
    lower = 0.75 + ROW_INCHES * (num_latents + 5) if steps else 0.0
    with style():
        figure = new_figure(max(PAGE, 2.2 * len(steps)), UPPER_INCHES + lower + 0.45)
        figure.supxlabel(_caption(steps), fontsize=7, color="0.25", x=0.015, ha="left")
        shares = [UPPER_INCHES, lower] if steps else [UPPER_INCHES]
        panels: Any = figure.subfigures(len(shares), 1, height_ratios=shares, squeeze=False)[:, 0]
        upper, *below = panels
        left, right = upper.subplots(1, 2, width_ratios=[1, 2])
        _draw_image(left, picture, explanation, image, title)
        _draw_probabilities(right, explanation, image, labels)
        for panel in below:
            places = panel.subplots(1, len(steps), squeeze=False)[0]
            for axes, parts in zip(places, steps, strict=True):
                _draw_steps(axes, parts)
            _same_width(places)
        return save_figure(figure, path)


def as_clip_sees(picture: Image, image_processor: Any) -> Image:
    """The image resized and cropped as the model's processor does it: what lies beyond the crop moved nothing."""
    from PIL import Image as images

    pixels = uint8_pixels(picture, image_processor, "the image")
    return images.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _caption(steps: Sequence[dict[str, Any]]) -> str:
    if not steps:
        return "This image was not steered: its scores are plain CLIP's, and no latent moved them."
    score = "logit" if steps[0]["relative_to"] is None else "logit less the mean of all labels' logits"
    text = (
        f"Lower row: a label's score ({score}), from plain CLIP's to the steered one; each bar is what a latent added "
        "to it. Normalisation is what the LayerNorm and unit length of the steered row do to the plain score; it "
        "belongs to no single latent."
    )
    return "\n".join(textwrap.wrap(text, 118))


def _draw_image(axes: Axes, picture: Image, explanation: VS2Explanation, image: int, title: str) -> None:
    small = min(picture.size) < 100
    axes.imshow(np.asarray(picture.convert("RGB")), interpolation="nearest" if small else "antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("0.8")
    active = int((explanation.latent_values[image] != 0).sum())
    state = "steered" if explanation.steered[image] else "not steered"
    axes.set_xlabel(
        f"as CLIP sees it; {state}\nFVU {explanation.fvu[image]:.2f}, {active} active latents", color="0.25"
    )
    axes.set_title("\n".join(textwrap.wrap(title, 24)), fontweight="bold", loc="left")


def _draw_probabilities(axes: Axes, explanation: VS2Explanation, image: int, labels: Sequence[int]) -> None:
    """Two bars a label, plain above steered, the best first; labels beyond the first few are left out."""
    before, after = (part[image].tolist() for part in explanation.probabilities())
    order = sorted(range(len(before)), key=lambda one: -max(before[one], after[one]))
    shown = sorted({*order[:MAX_BARS], *labels}, key=lambda one: -after[one])
    places = np.arange(len(shown))
    for offset, values, colour, name in ((-0.2, before, GREY, "plain CLIP"), (0.2, after, GAIN, "steered")):
        numbers = [values[one] for one in shown]
        axes.barh(places + offset, numbers, height=0.38, color=colour, label=name)
        for place, number in zip(places + offset, numbers, strict=True):
            text = "<0.1%" if number < 0.0005 else ">99.9%" if 0.9995 <= number < 1 else f"{number:.1%}"
            axes.annotate(text, (number, place), (3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(places, [_short(explanation.labels[one], 26) for one in shown])
    for tick, one in zip(axes.get_yticklabels(), shown, strict=True):
        tick.set_fontweight("bold" if one in labels else "normal")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(before + after))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.legend(loc="lower right", frameon=False)
    left_out = len(before) - len(shown)
    axes.set_xlabel("probability" + (f" ({left_out:,} labels left out)" if left_out else ""))
    _finish(axes, "Before and after")


def _draw_steps(axes: Axes, parts: dict[str, Any]) -> None:
    """From plain CLIP's score down to the steered one, one bar a part, each beginning where the last one ended."""
    rows = [(f"{_name(latent)}", latent["contribution"]) for latent in parts["latents"]]
    rows += [("other latents", parts["others"]), (NO_LATENT[0], parts["replacement"])]
    rows = [row for row in rows if row[1] != 0] + [(NO_LATENT[1], parts["normalisation"])]
    at = parts["plain"]
    names, ends = ["plain CLIP"], [at]
    for place, (name, size) in enumerate(rows, 1):
        colour = GREY if name in NO_LATENT else GAIN if size > 0 else LOSS
        axes.barh(place, size, left=at, height=0.62, color=colour)
        axes.vlines(at, place - 1, place, color="0.7", linewidth=0.8, zorder=0)
        edge = max(at, at + size)
        axes.annotate(signed(size, 2), (edge, place), (3, 0), textcoords="offset points", va="center")
        at += size
        names.append(name)
        ends.append(at)
    axes.vlines(at, len(rows), len(rows) + 1, color="0.7", linewidth=0.8, zorder=0)
    names.append("steered")
    ends.append(at)
    for place, score in ((0, parts["plain"]), (len(rows) + 1, parts["steered"])):
        axes.plot([score], [place], "D", color=TOTAL, markersize=4)
        axes.annotate(
            signed(score, 2),
            (score, place),
            (7, 0),
            textcoords="offset points",
            va="center",
            weight="bold",
            fontsize=7,
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(min(ends), max(ends))
    axes.set_xlabel("score")
    _finish(axes, "\n".join(textwrap.wrap(_short(parts["label"], 38), 20)))


def _same_width(places: Sequence[Axes]) -> None:
    """Scores of all labels on scales of one width, with room for the numbers: bars can be compared across labels."""
    width = 1.35 * max(0.02, *(high - low for low, high in (axes.get_xlim() for axes in places)))
    for axes in places:
        low, high = axes.get_xlim()
        middle = (low + high) / 2 + 0.06 * width
        axes.set_xlim(middle - width / 2, middle + width / 2)


def _name(latent: dict[str, Any]) -> str:
    name = "" if latent["name"] is None else f"{_short(latent['name'], 16)} "
    return f"{name}#{latent['latent']}"


def _short(text: str, length: int) -> str:
    """The beginning and the end: what tells labels apart may stand in either."""
    if len(text) <= length:
        return text
    tail = length // 3
    return text[: length - tail - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}" + text[-tail:].lstrip()


def _finish(axes: Axes, title: str) -> None:
    axes.grid(axis="x", color=GRID_LINES)
    axes.tick_params(axis="y", length=0)
    axes.set_title(title, loc="left", fontweight="bold")
