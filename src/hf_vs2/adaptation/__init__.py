"""From unlabelled images and labels to a checkpoint that answers by the recommended method, and a report: see
[`adapt`]."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .run import adapt

__all__ = ["adapt"]


def __getattr__(name: str) -> Any:
    if name == "adapt":  # imported when first used: `classify` needs `in_use` alone
        return import_module(".run", __name__).adapt
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
