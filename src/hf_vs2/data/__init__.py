"""Images and text to rows: folders and data sets of images, prompts, extraction of activations and the store that
keeps them."""

from .images import UnreadableImageError, open_image
from .load import IMAGE_EXTENSIONS, load_images, undecoded


__all__ = ["IMAGE_EXTENSIONS", "UnreadableImageError", "load_images", "open_image", "undecoded"]
