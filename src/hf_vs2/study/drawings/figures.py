"""A study's results as figures, PNG and SVG. They need the `report` extra (matplotlib), imported when the first one is
drawn.

Colours are Okabe and Ito's, or a diverging map that colour-blind readers can tell apart; a marker, a dash or a number
always says the same. Nothing here picks a setting: where one is varied, the study's own is marked as the default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files.atomic import replace_file
from ..results.cells import StudyResult
from . import figure_cells, figure_curves, figure_images
from .figure_sheets import StudyReader, file_word


if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
# A fixed salt gives SVG elements the same ids on each run; class names may hold a dollar sign, which is no formula.
RC: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "svg.hashsalt": "hf_vs2",
    "text.parse_math": False,
    "text.usetex": False,
}


def draw_figures(result: StudyResult, folder: str | Path) -> list[Path]:
    """
    Draw all that a result holds into `folder`, each figure as PNG and as SVG, named by figure and encoder.

    A section without cells gives no file, and neither does one about single images whose files of outcomes are gone.
    Where data sets do not fit on one sheet, sheets are numbered. The same result gives the same SVG, byte for byte.

    Returns:
        `list[Path]`: the files written.

    Raises:
        ImportError: matplotlib is missing. OSError: the folder cannot be written.
    """
    folder = Path(folder)
    written = []
    for name, figure in study_figures(result):
        for suffix in SUFFIXES:
            written.append(_save(figure, folder / f"{name}{suffix}"))
    return written


def study_figures(result: StudyResult) -> Iterator[tuple[str, Figure]]:
    """The name and the matplotlib figure of everything that [`draw_figures`] writes.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise ImportError("Drawing needs matplotlib: pip install matplotlib.") from error
    study = StudyReader(result)
    for encoder in study.encoders():
        for name, draw in FIGURES.items():
            with rc_context(RC):
                sheets = list(draw(study, encoder))
            for suffix, figure in sheets:
                yield f"{name}-{file_word(encoder)}{suffix}", figure


def _save(figure: Figure, path: Path) -> Path:
    from matplotlib import rc_context

    kind = path.suffix[1:]
    options: dict[str, Any] = {"format": kind, "dpi": 150, "metadata": {"Date": None} if kind == "svg" else None}
    with rc_context(RC):
        replace_file(path, lambda temporary: figure.savefig(temporary, **options))
    return path


FIGURES: dict[str, Callable[[StudyReader, str], Iterator[tuple[str, Figure]]]] = {
    "gains": figure_cells.gains,
    "grid": figure_cells.grid,
    "share": figure_curves.share,
    "top_k": figure_curves.top_k,
    "expansion": figure_curves.expansion,
    "fvu_deciles": figure_images.deciles,
    "risk_coverage": figure_images.risk,
    "per_class": figure_images.classes,
    "pass": figure_curves.pass_trade_off,
    "neighbors": figure_curves.neighbors,
    "agreement": figure_curves.agreement,
}

__all__ = ["draw_figures", "study_figures"]
