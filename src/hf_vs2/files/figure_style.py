"""How every drawing looks: sizes of a paper's column, letters, colours, and files whose text is text.

matplotlib (the `report` extra) is imported when the first drawing is made. Figures are made without pyplot: no window,
no global state, and nothing left open in a notebook or a server.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .atomic import replace_file


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

COLUMN, PAGE = 3.3, 6.8
"""Inches: the width of one column of a paper, and of the page. Letters have 7 to 9 points at that size."""
SUFFIXES = (".png", ".svg", ".pdf")
# Okabe and Ito's palette, and a marker for each, so that colour never carries the meaning alone.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))
GAIN, LOSS = STYLES[0][0], STYLES[1][0]
GREY, DARK, GRID_LINES = "0.55", "0.25", "0.9"
RC: dict[Any, Any] = {
    "font.size": 8,
    "figure.titlesize": 9,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.title_fontsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.3,
    "figure.dpi": 200,
    # Text stays text, to be searched and edited; a fixed salt gives SVG elements the same ids on each run.
    "svg.fonttype": "none",
    "svg.hashsalt": "hf_vs2",
    "pdf.fonttype": 42,
    # A class name may hold a dollar sign, which is no formula.
    "text.parse_math": False,
    "text.usetex": False,
}


def style() -> AbstractContextManager[None]:
    """The settings of matplotlib under which figures are made and saved; an `ImportError` where it is missing."""
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise ImportError("Drawing needs matplotlib: pip install matplotlib.") from error
    return rc_context(RC)


def check_drawing(path: str | PathLike) -> None:
    """Refuse a drawing that can't be saved, before long work begins: another suffix is a `ValueError`, a missing
    matplotlib an `ImportError`."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"cannot draw to {path}: its suffix must be one of {', '.join(SUFFIXES)}, not {suffix!r}.")
    style()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches whose parts make room for each other."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: str | PathLike) -> Path:
    """The figure as PNG, SVG or PDF by its file's suffix; the same figure gives the same file."""
    path = Path(path)
    check_drawing(path)
    as_text(figure)
    kind = path.suffix[1:].lower()
    dated = {"svg": "Date", "pdf": "CreationDate"}.get(kind)
    options: dict[str, Any] = {"format": kind, "dpi": 200, "metadata": None if dated is None else {dated: None}}
    with style():
        # By kind: the temporary file has another suffix.
        replace_file(path, lambda temporary: figure.savefig(temporary, **options))
    return path


def as_text(drawn: Figure | Axes) -> None:
    """Everything that is written in a drawing as it is: in a label, a title or a file name, `$` begins no formula."""
    from matplotlib.text import Text

    for text in drawn.findobj(Text):
        text.set_parse_math(False)
        text.set_usetex(False)


def in_legend(name: str) -> str:
    """matplotlib leaves out of its legend what begins with `_`."""
    return f" {name}" if name.startswith("_") else name


def signs() -> Colormap:
    """Losses orange, 0 white, gains blue, as in all drawings and in the atlas."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("signs", ["#8A3B00", LOSS, "#F7F7F7", GAIN, "#003C66"])


def signed(value: float, digits: int = 1) -> str:
    """`+1.2`, `−0.3` or `0.0`: no "-0.0", which would look like a loss."""
    text = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def draw_cells(axes: Axes, gain: Any, rows: Any, columns: Any, limit: float) -> Any:
    """A heat map of gains `(len(rows), len(columns))` in points, row 0 the lowest, with a number in each cell,
    coloured by sign; `limit` is the gain of the deepest colour. Returns what a colour bar is made for."""
    import numpy as np

    gain = np.asarray(gain)
    mesh = axes.pcolormesh(gain, cmap=signs(), vmin=-limit, vmax=limit, edgecolors="white", linewidth=0.5)
    for row, column in np.ndindex(*gain.shape):
        value = gain[row, column]
        colour = "white" if abs(value) > 0.42 * limit else "black"
        text = signed(value, 1 if abs(value) < 10 else 0)
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(np.arange(len(columns)) + 0.5, [f"{value:.3g}" for value in columns])
    axes.set_yticks(np.arange(len(rows)) + 0.5, [f"{value:.3g}" for value in rows])
    axes.tick_params(length=0)
    return mesh


def frame_cell(axes: Axes, rows: Sequence[float], columns: Sequence[float], cell: tuple[float, float]) -> bool:
    """Frames the cell of [`draw_cells`] that has these values of the two settings; `False` where none has them."""
    from matplotlib.patches import Rectangle

    row, column = (
        next((place for place, value in enumerate(values) if math.isclose(value, wanted)), None)
        for values, wanted in zip((rows, columns), cell, strict=True)
    )
    if row is None or column is None:
        return False
    for colour, width in (("white", 4.0), ("black", 2.0)):
        frame = Rectangle((column, row), 1, 1, fill=False, edgecolor=colour, linewidth=width, zorder=5)
        frame.set_gid(f"default-{colour}")
        axes.add_patch(frame)
    return True
