"""The paper's study, and studies like it: every method on every data set from one file. See `docs/study.md`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .config import StudyConfig
    from .documents.tables import study_markdown
    from .drawings.figures import draw_figures
    from .results.cells import StudyResult
    from .run import run_study

_LAZY = {
    "StudyConfig": "config",
    "StudyResult": "results",
    "draw_figures": "drawings.figures",
    "run_study": "run",
    "study_markdown": "documents.tables",
}

__all__ = ["StudyConfig", "StudyResult", "draw_figures", "run_study", "study_markdown"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
