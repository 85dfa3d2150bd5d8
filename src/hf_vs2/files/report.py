"""Result files, and the tables and pictures drawn from them, for a terminal, a model card or a paper.

[`EvaluationResult`] is what [`hf_vs2.evaluation`] measured. The pictures need the `report` extra (matplotlib), which
is imported when the first one is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from ..config.schema import Kind, number, optional
from ..methods import row_label
from .figure_style import GRID_LINES, PAGE, STYLES, as_text, check_drawing, in_legend, new_figure, save_figure, style
from .json_files import read_json, write_json
from .markdown import escaped, percent


if TYPE_CHECKING:
    from matplotlib.axes import Axes


COLUMNS = ("method", "prompts", "top-1", "top-5", "gain [95 % interval]", "steered", "FVU", "seconds")


@dataclass
class SampleOutputs:
    """What one evaluated row decided for each image; each tensor is `(n,)`, on the CPU."""

    predictions: torch.Tensor
    """int64: the class chosen."""
    fvu: torch.Tensor | None
    """float32: per-sample FVU; `None` for methods that do not ask the SAE."""
    steered: torch.Tensor
    """bool: whether the method touched the image."""


@dataclass
class EvaluationResult:
    """
    Evaluated rows, and what is needed to read them.

    Args:
        rows (`list[dict]`): one a method and prompt set. `top1`, `top5` (%, `None` for five classes or fewer, where it
            says nothing), `gain` over plain CLIP with the same prompts (points) with `gain_ci`, its 95 % paired
            bootstrap interval, `fixed` and `broken` (images that plain CLIP got wrong and this method right, and the
            other way round), `coverage` (share of images the method touched), `mean_fvu` (mean per-sample FVU over all
            images, steered or not), `n`, `gamma`, `lambda`, `tau`, `seconds` (steering and classifying; prompts and
            reading rows left out). Methods that are fitted to unlabelled images add `reference`, where these come from
            (`"checkpoint"` or `"train"`), and distribution norm its `coefficient`. Files of before have two rows of
            it, 0.5 and 1 (the full one), with a `score`.
        meta (`dict`): versions, model, data, templates, class names, seed.
        per_class (`dict`): `class_names`, `support` (images a class) and `accuracy`: for each row a list of one
            percentage a class, `None` for a class without images.
        labels (`torch.Tensor`, *optional*), samples (`list[SampleOutputs]`, *optional*): per-image outcomes, in the
            order of `rows`. Not written to the result file.
    """

    rows: list[dict[str, Any]]
    meta: dict[str, Any]
    per_class: dict[str, Any] = field(default_factory=dict)
    labels: torch.Tensor | None = None
    samples: list[SampleOutputs] | None = None

    def table(self) -> str:
        """The rows as an aligned Markdown table, for a terminal or a model card."""
        return format_table(self)

    def __str__(self) -> str:
        return self.table()

    def index(self, method: str, prompts: str = "single", coefficient: float | None = None) -> int:
        """Where the row of a method stands in `rows` and `samples`.

        Raises:
            KeyError: there is no such row.
        """
        for index, row in enumerate(self.rows):
            if (row["method"], row["prompts"]) == (method, prompts) and coefficient in (None, row.get("coefficient")):
                return index
        raise KeyError(f"no row for method {method!r} with prompts {prompts!r}; there are {sorted(self._names())}.")

    def row(self, method: str, prompts: str = "single", coefficient: float | None = None) -> dict[str, Any]:
        """The row of a method; see [`EvaluationResult.index`]."""
        return self.rows[self.index(method, prompts, coefficient)]

    def _names(self) -> set[tuple[str, str]]:
        return {(row["method"], row["prompts"]) for row in self.rows}

    def to_json(self, path: str | Path) -> Path:
        """Write the result file, whole or not at all."""
        return write_json(Path(path), self.content)

    @property
    def content(self) -> dict[str, Any]:
        """Of the result file."""
        return {"meta": self.meta, "rows": self.rows, "per_class": self.per_class}

    @classmethod
    def from_json(cls, path: str | Path) -> EvaluationResult:
        """Read a result file.

        Raises:
            ValueError: it is not one. OSError: it cannot be read.
        """
        try:
            content = read_json(Path(path))
            rows = [dict(row, method=row["method"], prompts=row["prompts"]) for row in content["rows"]]
            result = cls(rows, dict(content["meta"]), dict(content.get("per_class", {})))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a result file of hf_vs2: JSON with 'meta' and 'rows' was expected."
            ) from error
        for place, row in enumerate(rows):
            needed = ("n", "top1") if row["method"] == "clip" else ("n", "top1", "gain", "gain_ci")
            wrong = [name for name, value in row.items() if name in _KINDS and not _KINDS[name].accepts(value)]
            wrong += [name for name in needed if name not in row]
            if wrong:
                raise ValueError(
                    f"{path} is not a result file of hf_vs2, or damaged: {wrong[0]} of row {place} is "
                    f"{row.get(wrong[0])!r}."
                )
        return result


_NUMBER = number()
_TEXT = Kind("a text", lambda value: isinstance(value, str))
_INTERVAL = Kind(
    "two numbers", lambda value: isinstance(value, list) and len(value) == 2 and all(map(_NUMBER.accepts, value))
)
_KINDS = {"method": _TEXT, "prompts": _TEXT, "n": _NUMBER, "gain": _NUMBER, "gain_ci": _INTERVAL}
_KINDS |= dict.fromkeys(("top1", "top5", "coverage", "mean_fvu", "gamma", "lambda", "seconds"), optional(_NUMBER))
_KINDS |= dict.fromkeys(("coefficient", "fixed", "broken"), optional(_NUMBER))
_KINDS["tau"] = optional(number(infinite=True))
"""Of the values of a row; those of names that are not ours can be anything."""


Results: TypeAlias = EvaluationResult | str | Path
"""A result, or the path of its file."""


def result_of(results: Results) -> EvaluationResult:
    """The result; a `ValueError` where it has no row, or the path is that of something else."""
    result = results if isinstance(results, EvaluationResult) else EvaluationResult.from_json(results)
    if not result.rows:
        raise ValueError(f"there is no evaluated row to show{'' if results is result else f' in {results}'}.")
    return result


def rows_of(results: Results) -> list[dict[str, Any]]:
    """The evaluated rows of [`result_of`]."""
    return result_of(results).rows


def method_name(row: Mapping[str, Any], label: bool = False) -> str:
    """What tells a row's method apart: its name as flags have it (or its label), and for distribution normalisation
    the coefficient."""
    name, coefficient = row_label(row["method"]) if label else row["method"], row.get("coefficient")
    return name if coefficient is None else f"{name} {coefficient:g}"


def format_table(results: Results) -> str:
    """The rows as an aligned Markdown table that also reads well in a terminal, and a line that explains them."""
    rows = rows_of(results)
    cells = [list(COLUMNS), *(_cells(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(COLUMNS))]

    def line(row: list[str]) -> str:
        aligned = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(aligned) + " |"

    # Markdown aligns a column to the right where its rule ends in a colon.
    rule = "|" + "|".join("-" * (w + 2) if c < 2 else "-" * (w + 1) + ":" for c, w in enumerate(widths)) + "|"
    return "\n".join([line(cells[0]), rule, *(line(row) for row in cells[1:]), "", _caption(rows)])


def _cells(row: Mapping[str, Any]) -> list[str]:
    def cell(key: str, template: str) -> str:
        value = row.get(key)
        return "-" if value is None else template.format(value)

    gain = "-" if row["method"] == "clip" else "{:+.2f} [{:+.2f}, {:+.2f}]".format(row["gain"], *row["gain_ci"])
    return [
        escaped(method_name(row)),
        escaped(row["prompts"]),
        cell("top1", "{:.2f}"),
        cell("top5", "{:.2f}"),
        gain,
        "-" if row.get("coverage") is None else percent(row["coverage"]),
        cell("mean_fvu", "{:.3f}"),
        cell("seconds", "{:.3f}"),
    ]


def _caption(rows: list[dict[str, Any]]) -> str:
    parts = [f"{rows[0]['n']} images; gain over plain CLIP with the same prompts in points, 95 % paired bootstrap"]
    for key in ("gamma", "lambda"):
        values = list(dict.fromkeys(f"{row[key]:.4g}" for row in rows if row.get(key) is not None))
        if values:
            parts.append(f"{key} {', '.join(values)}")
    parts += map(escaped, thresholds(rows))
    if any(row.get("reference") == "evaluated" for row in rows):  # of versions before 0.2
        parts.append("distribution_norm took its image mean from the evaluated images themselves")
    return "; ".join(parts) + "."


def thresholds(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The gates' thresholds tau in words: `vs2+gate steers images of FVU up to 0.6454`."""
    named: dict[str, list[str]] = {}
    for row in rows:
        if row.get("tau") is not None:
            measure = "distance" if row.get("mean_fvu") is None else "FVU"
            named.setdefault(f"{measure} up to {row['tau']:.4g}", []).append(method_name(row))
    said = {limit: list(dict.fromkeys(names)) for limit, names in named.items()}
    return [
        f"{', '.join(names)} {'steers' if len(names) == 1 else 'steer'} images of {limit}"
        for limit, names in said.items()
    ]


def draw_gains(axes: Axes, results: Results) -> None:
    """Each method's gain over plain CLIP with its 95 % interval, one colour and marker a prompt set, on `axes`."""
    rows = rows_of(results)
    gains = [row for row in rows if row["method"] != "clip"]
    if not gains:
        raise ValueError("there is no method but plain CLIP in these results, so there is no gain to draw.")
    labels = list(dict.fromkeys(method_name(row, label=True) for row in gains))
    prompt_sets = list(dict.fromkeys(row["prompts"] for row in gains))
    plain = {row["prompts"]: row["top1"] for row in rows if row["method"] == "clip"}
    for index, prompts in enumerate(prompt_sets):
        colour, marker = STYLES[index % len(STYLES)]
        shift = (index - (len(prompt_sets) - 1) / 2) * 0.26
        chosen = [row for row in gains if row["prompts"] == prompts]
        x = np.array([row["gain"] for row in chosen])
        interval = np.array([row["gain_ci"] for row in chosen])
        axes.errorbar(
            x,
            np.array([labels.index(method_name(row, label=True)) for row in chosen]) + shift,
            # A percentile interval need not hold the gain itself, but matplotlib wants lengths that are not negative.
            xerr=np.stack([x - interval[:, 0], interval[:, 1] - x]).clip(min=0),
            fmt=marker,
            color=colour,
            markersize=4,
            capsize=2,
            elinewidth=1.2,
            label=in_legend(prompts if prompts not in plain else f"{prompts} (CLIP {plain[prompts]:.1f} %)"),
        )
    axes.axvline(0, color="0.35", linewidth=1)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    for row in range(1, len(labels), 2):  # bands keep the markers of a method together
        axes.axhspan(row - 0.5, row + 0.5, color="0.96", zorder=0, linewidth=0)
    axes.set_xlabel("top-1 gain over plain CLIP, points (95 % paired bootstrap)")
    axes.grid(axis="x", color=GRID_LINES)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="prompts", frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(prompt_sets))
    as_text(axes)


def draw_fvu_histogram(axes: Axes, fvu: Mapping[str, Any], threshold: float | None = None, bins: int = 40) -> None:
    """Per-sample FVU of one or several sets of images (label -> values), and the gate's threshold, on `axes`.

    Each set's bars add up to 100 %, so that sets of different size compare. The last bar also counts everything
    beyond it. An infinite threshold is no gate.
    """
    groups = {label: np.asarray(values, dtype=np.float64) for label, values in fvu.items()}
    groups = {label: values[~np.isnan(values)] for label, values in groups.items()}
    if not groups or not all(len(values) for values in groups.values()):
        raise ValueError("fvu must map a label to at least one per-sample FVU that is not NaN.")
    threshold = None if threshold == math.inf else threshold  # which holds nothing back
    # One far outlier, or an infinite FVU, must not squeeze everything else into one bar.
    top = max(float(np.quantile(values, 0.99, method="lower")) for values in groups.values())
    limit = max(top if math.isfinite(top) else 1.0, 1.3 * (threshold or 0.0), 1e-6)
    edges = np.linspace(0, limit, bins + 1)
    for index, (label, values) in enumerate(groups.items()):
        colour = STYLES[index % len(STYLES)][0]
        # Fills lie over each other: only the first is filled, the others are outlines of another dash.
        look = {"histtype": "stepfilled", "alpha": 0.45} if index == 0 else {"histtype": "step"}
        axes.hist(
            values.clip(max=limit),
            bins=list(edges),
            weights=np.full(len(values), 100 / len(values)),
            color=colour,
            linewidth=1.3,
            linestyle=("-", "--", "-.", ":")[index % 4],
            label=in_legend(
                label if threshold is None else f"{label}: {percent(float(np.mean(values <= threshold)), 0)} steered"
            ),
            **look,
        )
    if threshold is not None:
        axes.axvline(threshold, color="black", linestyle="--", linewidth=1.2, label=f"gate, tau = {threshold:.3g}")
    axes.set_xlabel("per-sample FVU")
    axes.set_ylabel("images, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    as_text(axes)


def plot_gains(results: Results, path: str | Path, title: str | None = None) -> Path:
    """Draw [`draw_gains`] into a file, PNG, SVG or PDF by its suffix, as wide as a page of a paper.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: another suffix, or no row to draw.
    """
    labels = {method_name(row, label=True) for row in rows_of(results)}
    return _plotted(path, 0.9 + 0.2 * len(labels), title, lambda axes: draw_gains(axes, results))


def plot_fvu_histogram(
    fvu: Mapping[str, Any], path: str | Path, threshold: float | None = None, title: str | None = None
) -> Path:
    """Draw [`draw_fvu_histogram`] into a file; errors as in [`plot_gains`]."""
    return _plotted(path, 2.6, title, lambda axes: draw_fvu_histogram(axes, fvu, threshold))


def _plotted(path: str | Path, height: float, title: str | None, draw: Callable[[Axes], None]) -> Path:
    check_drawing(path)
    with style():
        figure = new_figure(PAGE, height)
        axes = figure.add_subplot()
        draw(axes)
        if title:
            axes.set_title(title, loc="left")
        return save_figure(figure, path)
