"""A frozen CLIP vision tower as the extraction uses it: read, never changed, run only as deep as needed."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .base_model import loaded_revision
from .families import family_of, tower_of
from .fingerprints import model_fingerprint, weight_samples
from .loading import check_clip, load_clip, refuse_offloaded
from .processing import load_image_processor
from .wrapped import unwrapped


logger = logging.get_logger(__name__)


class VisionTower:
    """
    The vision tower of a model, read and never changed.

    Attributes:
        module (`nn.Module`): the tower; a CLIP's has `embeddings`, `pre_layrnorm`, `encoder.layers` and
            `post_layernorm`.
        name (`str`, *optional*): Hub id or path of the model it belongs to.
        revision (`str`, *optional*): its commit where known, else the revision asked for.
        weights (`dict[str, str]`): a sample of the weights of the whole model, see [`weight_samples`].
        model_type (`str`): of the configuration of the whole model.
    """

    def __init__(self, module: Any, name: str | None, revision: str | None, weights: dict[str, str], model_type: str):
        self.module = module
        self.name = name
        self.revision = revision
        self.weights = weights
        self.model_type = model_type
        self.num_layers: int = module.config.num_hidden_layers
        self.hidden_size: int = module.config.hidden_size
        parameter = next(module.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    @classmethod
    def of(
        cls,
        model: nn.Module | str | os.PathLike,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
    ) -> VisionTower:
        """
        Args:
            model: a `CLIPModel`, a CLIP vision model, a model that holds one as `.clip`, or a Hub id or path.
            revision: only for an id.
            dtype: in which to run a model given by name; "auto" is that of its file.
            device: where to run; a model on another device is not moved, its tower is copied.

        Raises:
            TypeError: no model. ValueError: a model of a family that nothing can steer yet, or with weights that can't
                be used; a revision or dtype together with a model that is already loaded. OSError: files of a model
                given by name are missing.
        """
        if isinstance(model, (str, os.PathLike)):
            model = load_clip(os.fspath(model), {"revision": revision}, dtype=dtype)
            device = device or best_device()
        elif revision is not None:
            raise ValueError(f"revision={revision!r} is for a model given by its Hub id, this one is already loaded")
        elif dtype != "auto":
            raise ValueError(
                f"model_dtype={dtype!r} is for a model given by name; this one is loaded: model.to(dtype)"
            )
        model = unwrapped(model)
        owner: Any = getattr(model, "clip", model)
        module: Any = tower_of(owner)
        config = getattr(owner, "config", None)
        if not isinstance(module, nn.Module) or config is None:
            raise TypeError(
                f"{type(owner).__name__} has no CLIP vision tower: expected a CLIPModel, or the Hub id or path of one"
            )
        parts = family_of(owner).parts
        if not all(hasattr(module, part) for part in parts):
            raise TypeError(f"{type(owner).__name__} has no CLIP vision tower: expected one with {', '.join(parts)}")
        refuse_offloaded(owner, config._name_or_path or type(owner).__name__)
        check_clip(owner)
        weights = weight_samples(owner)
        if device is not None and torch.device(device) != next(module.parameters()).device:
            module = copy.deepcopy(module).to(device)
        loaded_from = loaded_revision(SimpleNamespace(config=config, vision_model=module))
        return cls(module, config._name_or_path or None, loaded_from or revision, weights, config.model_type)

    def identity(self) -> dict[str, Any]:
        """What a store is keyed by: id, revision, weights, and the dtype they run in."""
        return {
            "id": self.name,
            "revision": self.revision,
            "fingerprint": model_fingerprint(self.module),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def image_processor(self) -> Any:
        """The image processor saved with the model; OpenAI's, with a warning, for a model without a name."""
        from transformers import CLIPImageProcessorPil

        if self.name is not None:
            try:
                return load_image_processor(self.name, {"revision": self.revision or "main"})
            except OSError as error:
                raise ValueError(
                    f"{self.name} has no image processor that can be loaded ({error}): pass image_processor=..."
                ) from error
        size = self.module.config.image_size
        logger.warning(
            f"The model has no name to load its image processor by: images are resized to {size} and normalised as in "
            "OpenAI's CLIP. Pass image_processor=... to choose."
        )
        return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})

    def cls_rows(self, pixel_values: torch.Tensor, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """The CLS token after each of `layers`, counted from 0; the last layer's is the input of `post_layernorm`. Of
        images (batch, channels, height, width), {layer: (batch, hidden) in the tower's dtype}."""
        vision, family = self.module, family_of(self.module)
        if not family.has_tokens:
            self.check_layers(layers)
            return {self.num_layers - 1: family.row(vision(pixel_values=pixel_values))}
        hidden = vision.pre_layrnorm(vision.embeddings(pixel_values))
        rows = {}
        for number, layer in enumerate(vision.encoder.layers[: max(layers) + 1]):
            hidden = layer(hidden, None)
            if number in layers:
                rows[number] = hidden[:, 0]
        return rows

    def check_layers(self, layers: Sequence[int]) -> None:
        """Refuse, by a `ValueError`, layers whose rows can't be read."""
        if not family_of(self.module).has_tokens and set(layers) != {self.num_layers - 1}:
            raise ValueError(
                f"{self.name or type(self.module).__name__} has no CLS token: of its layers only the last one's "
                f"pooled row can be read (layer {self.num_layers - 1}, or -1), not {sorted(layers)}."
            )

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """[`evaluating`], no autograd, no autocast."""
        with evaluating(self.module), torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            yield


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; every submodule's mode is put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def best_device() -> torch.device:
    """This process's accelerator, or the CPU."""
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        return torch.device(kind.type, torch.accelerator.current_device_index())  # type: ignore[union-attr]
    return torch.device("cpu")
