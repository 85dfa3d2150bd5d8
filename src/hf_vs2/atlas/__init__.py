"""A folder of static HTML in which a person browses the latents of an SAE: see [`build_atlas`]."""

from .build import build_atlas


__all__ = ["build_atlas"]
