"""What a study has measured: its methods, cells and figures, read and summed up."""

from .cells import Cell, CellResult, Outputs, StudyResult, load_cell, save_cell


__all__ = ["Cell", "CellResult", "Outputs", "StudyResult", "load_cell", "save_cell"]
