"""What every format comes down to: the weights of eq. 1, with the factors that other libraries apply at run time
folded in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from transformers.utils import logging

from ...config.sae import SAEConfig
from ...version import __version__
from .checkpoint import ForeignCheckpoint


logger = logging.get_logger(__name__)

_RESIDUAL = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")


@dataclass
class Parts:
    """
    `c = TopK(W_enc (x - b_pre) + b_enc)`, `x~ = W_dec^T c + b_pre`, as [`SAEModel`] has them.

    Args:
        W_enc, W_dec (`torch.Tensor` of shape `(num_latents, hidden_size)`): one latent a row.
        b_enc (`torch.Tensor` of shape `(num_latents,)`), b_pre (`torch.Tensor` of shape `(hidden_size,)`): biases.
        top_k (`int`, *optional*): `None` for a plain ReLU: all latents.
        activation (`str`): `"relu"` or `"absolute"`.
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    b_pre: torch.Tensor
    top_k: int | None = None
    activation: str = "relu"

    @classmethod
    def of_columns(
        cls, checkpoint: ForeignCheckpoint, tensors: dict[str, torch.Tensor], hidden_size: int, num_latents: int
    ) -> Parts:
        """From the names and shapes that SAELens has and ViT-Prisma took over: an encoder with one latent a column.
        Others are a `ValueError`."""
        expected = {
            "W_enc": (hidden_size, num_latents),
            "b_enc": (num_latents,),
            "W_dec": (num_latents, hidden_size),
            "b_dec": (hidden_size,),
        }
        checkpoint.check(tensors, expected)
        return cls(tensors["W_enc"].T.contiguous(), tensors["b_enc"], tensors["W_dec"], tensors["b_dec"])

    def fold_scale(self, factor: float) -> None:
        """For an SAE of `factor * x`, whose reconstruction is divided by it."""
        self.W_enc, self.W_dec, self.b_pre = self.W_enc * factor, self.W_dec / factor, self.b_pre / factor

    def fold_input_bias(self) -> None:
        """For an encoder that reads `x`, not `x - b_pre`."""
        shift = self.W_enc.double() @ self.b_pre.double()
        self.b_enc = (self.b_enc.double() + shift).to(self.b_enc.dtype)

    def fold_decoder_norms(self, where: str) -> None:
        """For pre-activations multiplied by the length of the decoder row, and a decoder of unit rows. A row of zeros
        is a `ValueError`."""
        norms = torch.linalg.vector_norm(self.W_dec, dim=-1, dtype=torch.float64)
        if not norms.all():
            raise ValueError(
                f"{where}: decoder row {int((norms == 0).nonzero()[0])} is zero, and rescale_acts_by_decoder_norm "
                "divides by its length."
            )
        norms = norms.to(self.W_dec.dtype)
        self.W_enc, self.b_enc = self.W_enc * norms[:, None], self.b_enc * norms
        self.W_dec = self.W_dec / norms[:, None]


class Converted(NamedTuple):
    """What a checkpoint of another library is as an [`SAEModel`]."""

    config: SAEConfig
    state: dict[str, torch.Tensor]
    dtype: torch.dtype


def convert(parts: Parts, checkpoint: ForeignCheckpoint, layer: int | None, notes: tuple[str, ...] = ()) -> Converted:
    """Configuration and weights, with a warning of what the files can't tell. `layer`: what they tell, where nobody
    said it. Settings that no SAE has are a `ValueError`."""
    (num_latents, hidden_size), told = parts.W_dec.shape, checkpoint.told
    try:
        config = SAEConfig(
            hidden_size=hidden_size,
            num_latents=num_latents,
            expansion_factor=max(1, num_latents // hidden_size),
            top_k=num_latents if parts.top_k is None else parts.top_k,
            activation=parts.activation,
            base_model_name_or_path=told.base_model_name_or_path,
            base_model_revision=told.base_model_revision,
            layer=layer if told.layer is None else told.layer,
            training_data={"converted_from": checkpoint.origin},
            hf_vs2_version=__version__,
        )
    except ValueError as error:
        raise ValueError(f"{checkpoint.config_path}: {error}") from error
    state = {name: getattr(parts, name) for name in ("W_enc", "b_enc", "W_dec", "b_pre")}
    state["mean"] = parts.b_pre.to(torch.float32, copy=True)  # two parameters of one memory could not be saved
    _warn(config, checkpoint, notes)
    return Converted(config, state, told.dtype or parts.W_dec.dtype)


def _warn(config: SAEConfig, checkpoint: ForeignCheckpoint, notes: tuple[str, ...]) -> None:
    unknown = [*notes]
    if config.layer is None:
        unknown.append("The layer it reads is not in its files and is taken for the last; give layer= otherwise.")
    if config.base_model_name_or_path is None:
        unknown.append("Its CLIP is not recorded; give base_model_name_or_path=.")
    if config.top_k == config.num_latents:
        unknown.append(
            f"It is a plain ReLU SAE: top_k is all {config.num_latents} latents, and a code takes 12 bytes a latent "
            "and row."
        )
    text = " ".join(unknown)
    logger.warning(
        f"{checkpoint.origin['name']} was converted from {checkpoint.origin['format']}. The mean of its training rows "
        "is not in its files: b_pre stands in for it until hf_vs2.calibrate (hf-vs2 calibrate) has measured it, "
        f"without which there is no gate. {text}"
    )


def layer_of(checkpoint: ForeignCheckpoint, hook: Any) -> int | None:
    """The encoder layer whose output a hook of TransformerLens or Prisma is; `None` where somebody said the layer. A
    hook anywhere else than between two layers is a `ValueError`."""
    if checkpoint.told.layer is not None or hook is None:
        return None
    found = _RESIDUAL.fullmatch(str(hook))
    number = int(found[1]) - (found[2] == "pre") if found else -1
    if number < 0:
        refuse_hook(checkpoint, hook)
    return number


def refuse_hook(checkpoint: ForeignCheckpoint, hook: Any) -> NoReturn:
    """Say that an SAE reads something else than the output of an encoder layer."""
    raise ValueError(
        f"{checkpoint.config_path}: the SAE reads {str(hook)[:80]!r}, and hf_vs2 reads the output of an encoder layer "
        "(layers.N, blocks.N.hook_resid_post). Give layer= to use it on the output of that layer all the same."
    )
