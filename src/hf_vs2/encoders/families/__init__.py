"""The families of encoders that can be steered, one file each behind one interface (`base.Family`)."""

# ruff: noqa: F401
from . import clip, siglip, vision_only  # noqa: I001  which register themselves
from . import dual_encoder  # of their towers
from .base import (
    FAMILIES,
    Family,
    embedding_width,
    family_of,
    family_of_config,
    is_steerable,
    recorded_family,
    refuse_family,
    refuse_without_texts,
    register,
    steerable,
    tower_of,
    vision_config_of,
)
