"""Configuration of a top-k sparse autoencoder, and everything its checkpoint records about itself."""

import base64
import bisect
import math
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ..functional.equations import ACTIVATIONS
from ..version import INSTALLATION
from .checks import CheckpointConfig, strict_values
from .schema import is_finite


FORMAT_VERSION = 1
"""Version of the checkpoint format. It only grows: a reader of version n reads every version up to n."""


@strict_values
class SAEConfig(CheckpointConfig, PreTrainedConfig):
    r"""
    Configuration of a [`SAEModel`], a top-k sparse autoencoder on the CLS activations of a frozen CLIP image encoder
    (eq. 1 of arXiv 2506.01247).

    Args:
        hidden_size (`int`, *optional*, defaults to 768):
            Width of the activations: the hidden size of the CLIP vision tower (768 for ViT-B, 1024 for ViT-L).
        expansion_factor (`int`, *optional*, defaults to 4):
            `num_latents = expansion_factor * hidden_size`, unless `num_latents` is given.
        num_latents (`int`, *optional*):
            Number of latents.
        top_k (`int`, *optional*, defaults to 64):
            Number of latents active for one input. The paper uses 64 for ViT-B/32, 256 for ViT-B/16, 128 for ViT-L/14.
        activation (`str`, *optional*, defaults to `"relu"`):
            `"relu"` (ReLU, then the `top_k` largest: what the paper's released training used) or `"absolute"` (the
            `top_k` of largest absolute value, sign kept: eq. 1 as printed).
        aux_k (`int`, *optional*):
            How many dead latents the AuxK loss (Gao et al., arXiv 2406.04093) reconstructs the residual with.
            `hidden_size // 2` by default, at most `num_latents`.
        aux_k_coefficient (`float`, *optional*, defaults to 1/32):
            Weight of the AuxK loss; 0 turns it off.
        base_model_name_or_path (`str`, *optional*):
            Hub id or path of the CLIP whose activations the SAE was trained on.
        base_model_revision (`str`, *optional*):
            Commit of that CLIP.
        base_model_type (`str`, *optional*):
            Its family, the `model_type` of its configuration, such as `"clip"` or `"siglip"`.
        base_model_num_layers (`int`, *optional*):
            Number of layers of its vision tower.
        base_model_fingerprint (`list[float]`, *optional*):
            A few weights of its vision tower, by which another model of the same shape is recognised and refused.
            Set it to `None` to use the SAE on a fine-tuned relative of its CLIP.
        base_model_weights (`dict[str, str]`, *optional*):
            A sample of all its weights, the same in every precision, by which fine-tuned relatives are noticed and
            warned of. `None`, as in checkpoints of earlier versions: there is no such warning.
        layer (`int`, *optional*):
            Index of the encoder layer whose output the SAE reads, from 0. `None` means the last one.
        site (`str`, *optional*, defaults to `"cls"`):
            Which row: `"cls"`, that layer's CLS token, before `post_layernorm`; or `"pooled"`, what the vision tower
            gives (SigLIP, DINOv2).
        total_variance (`float`, *optional*):
            Mean squared distance of the training activations to their mean. Normalises the loss (FVU).
        fvu_quantiles (`dict[str, float]`, *optional*):
            Per-sample FVU quantiles on unlabelled rows held out from SAE training, level -> FVU. The gate reads its
            threshold here.
        num_calibration_rows (`int`, *optional*):
            How many held-out rows the quantiles come from.
        gamma (`float`, *optional*, defaults to 1.5), lambda_ (`float`, *optional*, defaults to 2.1):
            Default steering, eq. 2-3 (the paper's best on CIFAR-100).
        method (`str`, *optional*, defaults to `"vs2"`):
            Default method, one of [`METHODS`]; `hf-vs2 recommend --apply` writes it.
        gate (`float`, *optional*, defaults to 0.99):
            Default gate: the quantile of `fvu_quantiles` above which an input is left to plain CLIP. `None`: no gate.
        training_data (`dict`, *optional*):
            What it was trained on: data set, split, fingerprint, number of rows.
        training_metrics (`dict`, *optional*):
            FVU, L0 and share of dead latents on the held-out rows, at the end of training.
        holds_statistics (`bool`, *optional*, defaults to `False`):
            Whether [`DomainStatistics`] lie beside the weights.
        digests (`dict[str, str]`, *optional*):
            Digest of each safetensors file that was saved with this configuration; `save_pretrained` writes it.
        hf_vs2_version (`str`, *optional*):
            Version of this package that wrote the checkpoint.
        format_version (`int`, *optional*, defaults to 1):
            Version of the checkpoint format.
    """

    model_type = "vs2_sae"
    required_fields: ClassVar[tuple[str, ...]] = ("model_type", "hidden_size", "num_latents", "top_k", "activation")

    hidden_size: int = 768
    expansion_factor: int = 4
    num_latents: int | None = None
    top_k: int = 64
    activation: str = "relu"
    aux_k: int | None = None
    aux_k_coefficient: int | float = 1 / 32
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_model_type: str | None = None
    base_model_num_layers: int | None = None
    base_model_fingerprint: list[float] | None = None
    base_model_weights: dict[str, str] | None = None
    layer: int | None = None
    site: str = "cls"
    total_variance: int | float | None = None
    fvu_quantiles: dict[str, float] | None = None
    num_calibration_rows: int | None = None
    gamma: int | float = 1.5
    lambda_: int | float = 2.1
    method: str = "vs2"
    gate: float | None = 0.99
    training_data: dict | None = None
    training_metrics: dict | None = None
    holds_statistics: bool = False
    digests: dict[str, str] | None = None
    hf_vs2_version: str | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_latents is None:
            self.num_latents = self.expansion_factor * self.hidden_size
        if self.aux_k is None:
            self.aux_k = min(max(1, self.hidden_size // 2), self.num_latents)
        super().__post_init__(**kwargs)
        self._check_values(self.num_latents, self.aux_k)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """`(num_latents, hidden_size)`, the shape of both weight matrices."""
        assert self.num_latents is not None  # `__post_init__` filled it in
        return self.num_latents, self.hidden_size

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint, and its shape."""
        num_latents, hidden_size = self.weight_shape
        vectors = {"b_enc": (num_latents,), "b_pre": (hidden_size,), "mean": (hidden_size,)}
        return {"W_enc": self.weight_shape, "W_dec": self.weight_shape, **vectors}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        Raises:
            `ValueError`: if the dictionary is another model's, or can't be used; the message names the field.
        """
        model_type = config_dict.get("model_type", cls.model_type) if isinstance(config_dict, dict) else cls.model_type
        if model_type != cls.model_type:
            hint = "VS2CLIPForZeroShot.from_pretrained(...).sae" if model_type == "vs2_clip" else "an SAE checkpoint"
            raise ValueError(f"This is the configuration of a {model_type!r} model, not of an SAE. Use {hint}.")
        return super().from_dict(config_dict, **kwargs)

    def _check_values(self, num_latents: int, aux_k: int) -> None:
        """Refuse what no SAE can be, and say what to change. (A `validate_*` method of `@strict` would turn these
        plain `ValueError`s into an error class of its own, with a prefix before the message.)"""
        if self.hidden_size < 1 or self.expansion_factor < 1 or num_latents < 1:
            raise ValueError(
                "hidden_size, expansion_factor and num_latents must be positive, not "
                f"{self.hidden_size}, {self.expansion_factor} and {num_latents}."
            )
        if not 1 <= self.top_k <= num_latents:
            raise ValueError(
                f"top_k={self.top_k} must be between 1 and the number of latents ({num_latents}). "
                "Lower top_k, or raise expansion_factor or num_latents."
            )
        if not 0 <= aux_k <= num_latents:
            raise ValueError(f"aux_k={aux_k} must be between 0 and the number of latents ({num_latents}).")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is not known. Use one of {list(ACTIVATIONS)}.")
        if self.site not in ("cls", "pooled"):
            raise ValueError(f"site={self.site!r} is not known: expected 'cls', or 'pooled' (of SigLIP and DINOv2).")
        if self.layer is not None and self.layer < 0:
            raise ValueError(f"layer={self.layer} must be counted from 0. Resolve a negative index before saving it.")
        layers = self.base_model_num_layers
        if self.layer is not None and layers is not None and self.layer >= layers:
            raise ValueError(f"layer={self.layer} does not exist: base_model_num_layers={layers}.")
        if self.gate is not None and not 0 < self.gate < 1:
            raise ValueError(f"gate={self.gate} must be a quantile between 0 and 1 (0.99, say), or None for no gate.")
        self._check_statistics()
        if self.format_version < 1:
            raise ValueError(f"format_version={self.format_version} does not exist: versions count from 1.")
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"This checkpoint has format version {self.format_version}; this package reads up to "
                f"{FORMAT_VERSION}. Install a newer hf_vs2: {INSTALLATION}."
            )

    def _check_statistics(self) -> None:
        """Refuse numbers that would make every loss, gate or steering vector NaN."""
        for name in ("gamma", "lambda_", "aux_k_coefficient"):
            if not is_finite(getattr(self, name)):
                raise ValueError(f"{name}={str(getattr(self, name))[:20]} must be a finite number.")
        if self.total_variance is not None and not (is_finite(self.total_variance) and self.total_variance >= 0):
            raise ValueError(f"total_variance={str(self.total_variance)[:20]} must be finite and not negative.")
        if self.base_model_fingerprint is not None and not all(map(is_finite, self.base_model_fingerprint)):
            raise ValueError("base_model_fingerprint must be made of finite numbers.")
        if self.base_model_weights is not None and not holds_samples(self.base_model_weights):
            raise ValueError("base_model_weights must map parts of the model to base64 of pairs of float16 numbers.")
        if self.num_calibration_rows is not None and self.num_calibration_rows < 0:
            raise ValueError(f"num_calibration_rows={self.num_calibration_rows} must not be negative.")
        check_quantiles("fvu_quantiles", self.fvu_quantiles or {})  # infinity is the FVU of a row at the mean itself

    def fvu_threshold(self, quantile: float) -> float:
        """The gate's threshold tau: per-sample FVU at `quantile`, interpolated between the stored levels.

        Raises:
            `ValueError`: if the SAE is not calibrated, or if `quantile` lies outside the stored levels.
        """
        if not self.fvu_quantiles:
            raise ValueError(
                "This SAE holds no FVU quantiles, so a gate quantile means nothing for it. "
                "Calibrate it (hf_vs2.calibrate) or give the threshold itself as fvu_threshold=."
            )
        return quantile_of(self.fvu_quantiles, quantile, "calibrated quantiles", self.num_calibration_rows)

    def usable_gate(self, quantile: float) -> float:
        """A quantile, or the highest that the calibration's rows can vouch for, if that is lower: 1 % of a small set
        holds few."""
        return min(quantile, max(map(float, self.fvu_quantiles or {}), default=quantile))


def check_quantiles(name: str, quantiles: dict[str, float]) -> None:
    """Refuse, by a `ValueError`, other than levels between 0 and 1 with values that are not negative and rise."""
    try:
        levels = sorted((float(level), value) for level, value in quantiles.items())
    except ValueError:  # a level that is no number
        levels = [(math.nan, 0.0)]
    values = [value for _, value in levels]
    if not all(0 < level < 1 and value >= 0 for level, value in levels):
        raise ValueError(f"{name}={quantiles} must map levels between 0 and 1 to numbers that are not negative.")
    if values != sorted(values):
        raise ValueError(f"{name}={quantiles} must rise with the level.")


def quantile_of(quantiles: dict[str, float], quantile: float, what: str, num_rows: int | None = None) -> float:
    """The value at a quantile, interpolated between the stored levels; outside them a `ValueError`."""
    stored = sorted((float(level), value) for level, value in quantiles.items())
    levels = [level for level, _ in stored]
    if not levels or not levels[0] <= quantile <= levels[-1]:
        known = f"{levels[0]} to {levels[-1]}" if levels else "of which there are none"
        known += f" (from {num_rows} held-out rows)" if num_rows is not None else ""
        raise ValueError(
            f"gate={quantile} lies outside the {what} {known}. Choose one between them, calibrate on more rows, or "
            "give the threshold itself as fvu_threshold=."
        )
    upper = bisect.bisect_left(levels, quantile)
    (low, low_value), (high, high_value) = stored[max(upper - 1, 0)], stored[upper]
    if high == quantile or low_value == high_value:  # of infinite values there is no difference
        return high_value
    return low_value + (high_value - low_value) * (quantile - low) / (high - low)


def holds_samples(found: Any) -> bool:
    """Whether this can be what is recorded of a CLIP's weights: base64 of pairs of float16 numbers, by part of the
    model."""
    try:
        return all(len(base64.b64decode(text, validate=True)) % 4 == 0 for text in found.values())
    except (AttributeError, TypeError, ValueError):
        return False
