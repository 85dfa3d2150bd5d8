"""Plain CLIP: nothing moves."""

from .base import PLAIN, Method, register


register(Method(PLAIN, "plain CLIP", "Plain CLIP, bit for bit."))
