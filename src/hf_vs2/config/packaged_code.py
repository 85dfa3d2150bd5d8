"""Configs and models whose code comes with this package and never travels in a checkpoint."""

from typing import Any

from transformers.utils import logging


logger = logging.get_logger(__name__)


class PackagedCode:
    """A config or model class that transformers does not take for remote code when it was reached through the shim. It
    would copy the package's source files into every checkpoint saved from then on."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Without effect: who loads a checkpoint has the code from the package."""
        logger.info(f"{cls.__name__} comes with hf_vs2; its code is not written into checkpoints.")
