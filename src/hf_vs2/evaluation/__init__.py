"""Methods compared on labelled images, recommended for unlabelled ones, and drawn."""

from .comparison import EvaluationResult, evaluate
from .metrics import paired_bootstrap


__all__ = ["EvaluationResult", "evaluate", "paired_bootstrap"]
