"""From unlabelled images and labels to a checkpoint that answers by the recommended method, and a report: see
[`adapt`]."""

from .run import adapt


__all__ = ["adapt"]
