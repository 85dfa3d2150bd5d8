"""The families of encoders that can be steered, one file each behind one interface (`base.Family`)."""

from . import clip, siglip  # noqa: F401  which register themselves
from .base import (
    FAMILIES,
    Family,
    embedding_width,
    family_of,
    is_steerable,
    recorded_family,
    refuse_family,
    register,
    steerable,
)


__all__ = [
    "FAMILIES",
    "Family",
    "embedding_width",
    "family_of",
    "is_steerable",
    "recorded_family",
    "refuse_family",
    "register",
    "steerable",
]
