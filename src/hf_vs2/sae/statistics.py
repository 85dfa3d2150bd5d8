"""What an SAE's checkpoint knows of the unlabelled images that it is for: means, principal components, a sketch of
rows.

On disk it is `statistics.safetensors`, whose header says what the tensors were measured on. No label is stored; the
sketch is activations of images, which their owner may not want to give away: leave it out then
([`DomainStatistics.without_rows`]).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..config.sae import check_quantiles, quantile_of
from ..files.checkpoint_folder import STATISTICS_NAME
from ..files.place import look_for
from ..files.weight_files import read_described, write_described
from ..functional.label_free import RowStatistics


logger = logging.get_logger(__name__)

_KIND = ("hf_vs2.statistics", 1)


@dataclass(frozen=True, eq=False)
class DomainStatistics:
    """
    Statistics of unlabelled CLS rows of the SAE's layer.

    Args:
        mean (`torch.Tensor` of shape `(hidden_size,)`), components (`(hidden_size, hidden_size)`), variances
        (`(hidden_size,)`):
            see [`RowStatistics`].
        latent_mean, latent_frequency (`torch.Tensor` of shape `(num_latents,)`): of the SAE's code, see
            [`latent_view`].
        num_rows (`int`): how many rows these come from.
        rows (`torch.Tensor` of shape `(m, hidden_size)`, *optional*): the sketch, a random sample of the rows, in
            bfloat16: `2 m hidden_size` bytes, 6.3 MB for 4,096 rows of ViT-B. What is fitted for a label set is fitted
            on it.
        image_mean (`torch.Tensor` of shape `(projection_dim,)`, *optional*): mean unit embedding of plain CLIP, where
            it was measured on all rows; else that of the sketch is taken.
        distance_quantiles (`dict[str, float]`): level -> [`row_distance`] on rows that were not used for the rest.

    Raises:
        `ValueError`: on shapes that do not belong together.
    """

    mean: torch.Tensor
    components: torch.Tensor
    variances: torch.Tensor
    latent_mean: torch.Tensor
    latent_frequency: torch.Tensor
    num_rows: int
    rows: torch.Tensor | None = None
    image_mean: torch.Tensor | None = None
    distance_quantiles: dict[str, float] = field(default_factory=dict)
    _placed: dict[torch.device, DomainStatistics] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        width, latents = len(self.mean), len(self.latent_mean)
        expected = {
            "mean": (width,),
            "components": (width, width),
            "variances": (width,),
            "latent_mean": (latents,),
            "latent_frequency": (latents,),
        }
        if self.rows is not None:
            expected["rows"] = (max(1, len(self.rows)), width)
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(
                    f"The {name} of statistics of width {width} must be {shape}; they are "
                    f"{tuple(getattr(self, name).shape)}."
                )

    def __repr__(self) -> str:
        rows = "no rows" if self.rows is None else f"a sketch of {len(self.rows)}"
        return f"DomainStatistics(of {self.num_rows} rows of width {len(self.mean)}, {rows})"

    def __deepcopy__(self, memo: dict[int, Any]) -> DomainStatistics:
        return self  # never changed

    @property
    def of_rows(self) -> RowStatistics:
        """Mean and principal components."""
        return RowStatistics(self.mean, self.components, self.variances)

    def on(self, device: torch.device) -> DomainStatistics:
        """The same without the sketch on a device, put there once."""
        if self.mean.device == device:
            return self
        if device not in self._placed:
            tensors: dict[str, Any] = {
                name: tensor.to(device) for name, tensor in self._tensors().items() if name != "rows"
            }
            self._placed[device] = replace(self, **{**tensors, "rows": None})
        return self._placed[device]

    def without_rows(self, image_mean: torch.Tensor | None = None) -> DomainStatistics:
        """The same without the sketch: no activation of a single image is given away. Prototypes and balanced methods
        can't be fitted then; distribution norm can.

        Args:
            image_mean (*optional*): what distribution norm needs, where the statistics have none
                ([`VS2CLIPForZeroShot.image_mean`] gives it).

        Raises:
            `ValueError`: if there would be no image mean left.
        """
        image_mean = self.image_mean if image_mean is None else image_mean
        if image_mean is None:
            raise ValueError(
                "Without its rows there is nothing to take the mean image from: give image_mean=model.image_mean()."
            )
        return replace(self, rows=None, image_mean=image_mean)

    def distance_threshold(self, quantile: float) -> float:
        """The distance under which a fresh row of the same kind falls with probability `quantile`; of a quantile
        higher than the held-out rows can vouch for, the highest that they can, which passes fewer.

        Raises:
            `ValueError`: without held-out rows, or for a quantile below all of theirs.
        """
        if not self.distance_quantiles:
            raise ValueError(
                f"gate={quantile} goes by the distance to the training rows for this method, and no rows were held "
                "out to measure it. Use gate=None, or calibrate: hf-vs2 calibrate."
            )
        highest = max(map(float, self.distance_quantiles))
        return quantile_of(self.distance_quantiles, min(quantile, highest), "distance quantiles")

    def check_fits(self, hidden_size: int, num_latents: int, where: str) -> None:
        """Refuse statistics of another model's rows, by a `ValueError` with both."""
        found = len(self.mean), len(self.latent_mean)
        if found != (hidden_size, num_latents):
            raise ValueError(
                f"{where}: statistics of rows of width {found[0]} and {found[1]} latents; the SAE has {hidden_size} "
                f"and {num_latents}. Calibrate it again."
            )

    # On disk

    def save(self, folder: str | os.PathLike) -> None:
        """Write `statistics.safetensors` into a folder; it appears whole or not at all."""
        about = {"num_rows": self.num_rows, "distance_quantiles": self.distance_quantiles}
        write_described(Path(folder) / STATISTICS_NAME, self._tensors(), _KIND, about)

    @classmethod
    def load(
        cls, name_or_path: str | os.PathLike, place: Mapping[str, Any], digests: Mapping[str, str] | None = None
    ) -> DomainStatistics | None:
        """Those of a checkpoint in a folder or on the Hub, whose config has `digests` of its files. `None`, with a
        warning, where the file was left out: VS2 does without. A file that is damaged, of another checkpoint, or
        something else is a `ValueError`."""
        path = look_for(name_or_path, STATISTICS_NAME, place)
        if path is None:
            logger.warning(
                f"{name_or_path} says that it has {STATISTICS_NAME}, which is not there. Methods beyond VS2 can't be "
                "used; hf-vs2 calibrate measures the statistics again."
            )
            return None
        return read_described(path, _KIND, cls._read, "Calibrate the checkpoint again.", digests)

    @classmethod
    def _read(cls, about: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> DomainStatistics:
        quantiles = {str(level): float(value) for level, value in about["distance_quantiles"].items()}
        given: dict[str, Any] = dict(tensors)
        found = cls(**given, num_rows=int(about["num_rows"]), distance_quantiles=quantiles)
        found._check_values()
        return found

    def _check_values(self) -> None:
        """Refuse numbers that would make scores NaN, or a gate that means nothing."""
        for name, tensor in self._tensors().items():
            if not tensor.is_floating_point():
                raise ValueError(f"the {name} are of type {tensor.dtype}")
        if (self.variances < 0).any():
            raise ValueError("variances are negative")
        if not ((self.latent_frequency > 0) & (self.latent_frequency <= 1)).all():
            raise ValueError("latent_frequency is made of shares above 0 and up to 1")
        check_quantiles("distance_quantiles", self.distance_quantiles)
        if math.inf in self.distance_quantiles.values():
            raise ValueError("distance_quantiles must be finite")

    def _tensors(self) -> dict[str, torch.Tensor]:
        names = ("mean", "components", "variances", "latent_mean", "latent_frequency", "rows", "image_mean")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
