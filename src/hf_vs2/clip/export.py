"""The image side of a steered CLIP as one module of tensors, for `torch.export` and ONNX."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import normalize

from ..encoders.families import tower_of
from ..encoders.tail import bias, temperature
from ..steering.corpus_search import RetrievalInputs
from .modeling import VS2CLIPForZeroShot


class ImageScores(NamedTuple):
    """What [`ImageSide`] gives."""

    logits: torch.Tensor
    """`(batch, num_classes)`, float32: softmax gives the scores (of SigLIP a sigmoid)."""
    steered: torch.Tensor
    """bool `(batch,)`, of several SAEs `(batch, num_saes)`: which images the gate let through."""


class ImageSide(nn.Module):
    """
    `pixel_values` to the logits of fixed classes, with steering, gate and the fit of the method in force inside.

    Args:
        model ([`VS2CLIPForZeroShot`]): with the settings that are to be exported; used as it is.
        class_embeds (`torch.Tensor` of shape `(num_classes, projection_dim)`): of unit length, see
            [`class_embeddings`].

    Raises:
        `ValueError`: if the method looks for neighbours in a corpus, which no exported program can.

    Example:

    ```python
    >>> side = ImageSide(model, class_embeddings(model.clip, tokenizer, ["cat", "dog"]))
    >>> batch = {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
    >>> program = torch.export.export(side, (pixel_values,), dynamic_shapes=batch)
    ```
    """

    def __init__(self, model: VS2CLIPForZeroShot, class_embeds: torch.Tensor):
        super().__init__()
        self.class_embeds: torch.Tensor
        self.scale: torch.Tensor
        self.bias: torch.Tensor
        self.steerer = model.steerer
        if self.steerer.settings.rule.needs_corpus and self.steerer.is_steering:
            raise ValueError(
                f"method={self.steerer.settings.method!r} looks for neighbours in a corpus, which can't be exported. "
                "Choose another one by set_steering(method=...)."
            )
        self.model = model.eval()
        vision = tower_of(model.clip).config
        self.register_buffer("class_embeds", class_embeds.detach().float())
        self.register_buffer("scale", temperature(model.clip).detach())
        self.register_buffer("bias", bias(model.clip).detach().to(self.scale.device))
        with torch.no_grad():
            fits = self.steerer.is_steering and self.steerer.settings.rule.fit is not None
            self.fit = self.steerer.fit_classes(class_embeds).fit.on(class_embeds.device) if fits else None
            # Once here, so that tensors which are made at the first call are no part of the program's trace.
            self(torch.zeros(1, vision.num_channels, vision.image_size, vision.image_size).to(model.clip.device))

    def forward(self, pixel_values: torch.Tensor) -> ImageScores:
        """Of images `(batch, channels, height, width)`, as the image processor gives them."""
        images = self.steerer.features(pixel_values, False, RetrievalInputs())
        embeds = normalize(images.features.float(), dim=-1)  # type: ignore[union-attr]
        return ImageScores(
            self.steerer.scores(images, embeds, self.class_embeds, self.fit) * self.scale + self.bias, images.steered
        )
