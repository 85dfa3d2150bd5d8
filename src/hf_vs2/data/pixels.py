"""An image as a processor resizes and crops it, and pixels as the tower reads them."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from .images import UnreadableImageError


# Says nothing about the pixels: left out of what a store is keyed by.
_PROCESSOR_NOISE = ("processor_class", "feature_extractor_type", "return_tensors", "transformers_version", "auto_map")


def uint8_pixels(image: Image.Image, processor: Any, name: str) -> torch.Tensor:
    """
    The image as `processor` resizes and crops it, (channels, height, width) uint8. Rescaling and normalisation are
    left to [`Normalizer`]: one step for a whole batch, on the device.

    Raises:
        UnreadableImageError: `processor` would make it huge and does not crop it.
        TypeError: a processor that gives other than uint8.
    """
    image = _middle_of_a_thread(image, processor, name)
    if (pixels := _resized_and_cropped(image, processor)) is not None:
        return pixels
    pixels = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    if pixels.dtype != torch.uint8:
        raise TypeError(
            f"{type(processor).__name__} gives {pixels.dtype} with do_rescale=False and do_normalize=False, "
            "expected uint8: use CLIP's image processor or one built like it"
        )
    return pixels


def _resized_and_cropped(image: Image.Image, processor: Any) -> torch.Tensor | None:
    """What CLIP's own processor makes of an RGB image, to the bit (unless it [`reads_fast`]), without its ways to
    numpy and back; `None` where another class or a setting asks for something else."""
    if type(processor) is not CLIPImageProcessorPil or not processor.do_resize or not processor.do_center_crop:
        return None
    size = {side: pixels for side, pixels in dict(processor.size).items() if pixels is not None}
    padded = getattr(processor, "do_pad", None)
    if size.keys() != {"shortest_edge"} or not isinstance(processor.resample, int) or padded:
        return None
    short, edge = min(image.size), size["shortest_edge"]
    width, height = (int(edge * side / short) for side in image.size)
    crop = dict(processor.crop_size)
    left, top = (width - crop["width"]) // 2, (height - crop["height"]) // 2
    if left < 0 or top < 0:  # padded
        return None
    if reads_fast(processor):  # the crop alone: within 1 of 255 levels
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + crop["width"]) * across, (top + crop["height"]) * down)
        cropped = image.resize((crop["width"], crop["height"]), resample=processor.resample, box=box)
    else:
        resized = image.resize((width, height), resample=processor.resample)
        cropped = resized.crop((left, top, left + crop["width"], top + crop["height"]))
    return torch.from_numpy(np.array(cropped)).permute(2, 0, 1).contiguous()


def reads_fast(processor: Any) -> bool:
    """Whether images are read faster and to slightly other pixels: the setting `fast_decode` of the image processor,
    which is saved with it."""
    return getattr(processor, "fast_decode", False) is True


def reading_fast(processor: Any) -> Any:
    """A copy of the image processor that [`reads_fast`]."""
    processor = copy.copy(processor)
    processor.fast_decode = True
    return processor


def pixels_needed(processor: Any) -> int | None:
    """What [`open_image`] is told of each side (`at_least`): twice that of the resized image where [`reads_fast`], so
    that resizing still has pixels to average; else `None`."""
    if not reads_fast(processor) or not processor.do_resize:
        return None
    return 2 * max(side for side in dict(processor.size).values() if side is not None)


class Normalizer:
    """uint8 pixels to what the tower reads: the processor's rescaling and normalisation, on the tower's device."""

    def __init__(self, processor: Any, device: torch.device):
        def per_channel(values: Any) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device).reshape(-1, 1, 1)

        self.device = device
        self.scale: float | None = processor.rescale_factor if processor.do_rescale else None
        self.mean = per_channel(processor.image_mean) if processor.do_normalize else None
        self.std = per_channel(processor.image_std) if processor.do_normalize else None

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        values = pixels.to(self.device, non_blocking=True).float()
        if self.scale is not None:
            values = values.mul_(self.scale)
        if self.mean is not None and self.std is not None:
            values = values.sub_(self.mean).div_(self.std)
        return values


def describe_processor(processor: Any) -> dict[str, Any]:
    """The settings that decide the pixels, as plain JSON."""
    settings = {
        name: value
        for name, value in processor.to_dict().items()
        if value is not None and not name.startswith("_") and name not in _PROCESSOR_NOISE
    }
    if not reads_fast(processor):
        settings.pop("fast_decode", None)
    settings["backend"] = getattr(processor, "backend", None)
    settings["decoding"] = "exif rotation, rgb, transparency on white, 16 bits scaled"
    return json.loads(json.dumps(settings, default=str))  # tuples become the lists that a reader will find


def _middle_of_a_thread(image: Image.Image, processor: Any, name: str) -> Image.Image:
    """The image, or of one so threadlike that resized whole it would be as bad as a decompression bomb, the part
    around the middle that a centre crop looks at. The part's length is chosen so that the crop shows what it would
    show of the whole image, to within a hundredth of a pixel."""
    edge: Any = dict(processor.size).get("shortest_edge") if processor.do_resize else None
    short, long = sorted(image.size)
    pixels, most = edge * edge * long // short if edge else 0, Image.MAX_IMAGE_PIXELS
    if not most or pixels <= most:
        return image
    if not processor.do_center_crop:
        raise UnreadableImageError(
            f"{name} is {image.width} x {image.height}: resized to a shorter side of {edge} it would have "
            f"{pixels / 1e6:.0f} million pixels"
        )
    resized = edge * long // short
    least = short * 16 * max(edge, *dict(processor.crop_size).values()) // edge

    def misfit(length: int) -> tuple[int, float]:
        new = edge * length // short
        return (new - resized) % 2, abs(length / new - long / resized)

    # Of the parity of the whole, before and after resizing, so that the middle of both is at the same place.
    length = min(range(least + (long - least) % 2, 2 * least + 2, 2), key=misfit)
    start = (long - length) // 2
    box = (start, 0, start + length, short) if image.width == long else (0, start, short, start + length)
    return image.crop(box)
