"""A study's results as figures, PNG, SVG and PDF. They need the `report` extra (matplotlib), imported when the first
one is drawn.

Colours are Okabe and Ito's, or a diverging map that colour-blind readers can tell apart; a marker, a dash or a number
always says the same. Nothing here picks a setting: where one is varied, the study's own is marked as the default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ...files.figure_style import SUFFIXES, save_figure, style
from ..results.cells import StudyResult
from . import figure_cells, figure_curves, figure_images
from .figure_sheets import StudyReader, file_word


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_figures(result: StudyResult, folder: str | Path, notes: bool = True) -> list[Path]:
    """
    Draw all that a result holds into `folder`, each figure as PNG, SVG and PDF, named by figure and encoder.

    A figure is as wide as a page of a paper (6.8 inches), or as a column (3.3) if it has one panel. A section without
    cells gives no file, and neither does one about single images whose files of outcomes are gone. Where data sets do
    not fit on one sheet, sheets are numbered. The same result gives the same SVG and PDF, byte for byte.

    Args:
        result: of a study.
        folder: made when needed.
        notes: whether title and explanation stand in the drawing; without them a caption has to say both.

    Returns:
        `list[Path]`: the files written.

    Raises:
        ImportError: matplotlib is missing. OSError: the folder cannot be written.
    """
    folder = Path(folder)
    return [
        save_figure(figure, folder / f"{name}{suffix}")
        for name, figure in study_figures(result, notes)
        for suffix in SUFFIXES
    ]


def study_figures(result: StudyResult, notes: bool = True) -> Iterator[tuple[str, Figure]]:
    """The name and the matplotlib figure of everything that [`draw_figures`] writes.

    Raises:
        ImportError: matplotlib is missing.
    """
    study = StudyReader(result, notes)
    for encoder in study.encoders():
        for name, draw in FIGURES.items():
            with style():
                sheets = list(draw(study, encoder))
            for suffix, figure in sheets:
                yield f"{name}-{file_word(encoder)}{suffix}", figure


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
