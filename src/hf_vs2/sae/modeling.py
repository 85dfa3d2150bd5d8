"""The top-k sparse autoencoder of eq. 1 as a `PreTrainedModel`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from ..config.sae import SAEConfig
from ..files.foreign import prisma, sae_lens, sparsify
from ..files.foreign.parts import Converted
from ..files.place import HUB_ARGUMENTS, at_one_commit, one_dtype, refuse_variant
from ..files.progress import without_loading_bars
from ..files.sharing.hub import HubMixin
from ..files.weight_files import WeightFiles
from ..functional.equations import fvu_per_sample, top_k
from ..functional.shards import own_part
from ..functional.sparse_ops import LatentOrder, linear_at, sparse_decode
from .statistics import DomainStatistics


_CACHED_ROWS = 256
"""Directions at a time where a CPU goes through all of them more than once."""


@dataclass
class SAEOutput(ModelOutput):
    """
    Output of [`SAEModel`].

    Args:
        loss (`torch.Tensor` of shape `()`):
            Fraction of variance unexplained (FVU), plus the weighted AuxK loss when `dead_latents` was given.
        reconstruction (`torch.Tensor` of shape `(batch, hidden_size)`):
            `x~ = D(c)`.
        latent_values (`torch.Tensor` of shape `(batch, top_k)`):
            The active latents of each row.
        latent_indices (`torch.LongTensor` of shape `(batch, top_k)`):
            Which latents they are, in no particular order.
        fvu (`torch.Tensor` of shape `(batch,)`):
            Per-sample FVU against the training mean, float32, without gradient.
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    latent_values: torch.Tensor | None = None
    latent_indices: torch.Tensor | None = None
    fvu: torch.Tensor | None = None


class SAEModel(HubMixin, PreTrainedModel):
    """
    Top-k sparse autoencoder, eq. 1: `c = TopK(W_enc (x - b_pre) + b_enc)`, `x~ = W_dec^T c + b_pre`.

    Parameters are `W_enc` and `W_dec`, both `(num_latents, hidden_size)` with one latent a row, `b_enc`
    `(num_latents,)` and `b_pre` `(hidden_size,)`. The buffer `mean` `(hidden_size,)`, always float32, is the mean of
    the training activations, the `mu` of the per-sample FVU. `domain_statistics` ([`DomainStatistics`], *optional*) is
    what is known of unlabelled rows beyond that; it is saved and loaded with the weights.

    Example:

    ```python
    >>> import torch
    >>> from hf_vs2 import SAEConfig, SAEModel

    >>> sae = SAEModel(SAEConfig(hidden_size=768, expansion_factor=4, top_k=64))
    >>> out = sae(torch.randn(8, 768))
    >>> out.reconstruction.shape, out.latent_indices.shape, out.fvu.shape
    (torch.Size([8, 768]), torch.Size([8, 64]), torch.Size([8]))
    ```
    """

    config_class = SAEConfig
    base_model_prefix = "sae"
    main_input_name = "x"
    config: SAEConfig
    mean: torch.Tensor
    domain_statistics: DomainStatistics | None

    def __init__(self, config: SAEConfig):
        super().__init__(config)
        num_latents, hidden_size = config.weight_shape
        self.W_enc = nn.Parameter(torch.empty(num_latents, hidden_size))
        self.b_enc = nn.Parameter(torch.empty(num_latents))
        self.W_dec = nn.Parameter(torch.empty(num_latents, hidden_size))
        self.b_pre = nn.Parameter(torch.empty(hidden_size))
        self.register_buffer("mean", torch.zeros(config.hidden_size, dtype=torch.float32))
        self.domain_statistics = None
        self.post_init()

    @classmethod
    @without_loading_bars()
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: Any = None,
        **kwargs: Any,
    ) -> SAEModel:
        """
        As `PreTrainedModel.from_pretrained`, from `config.json` and `model.safetensors` alone.

        Raises:
            `OSError`: if there are no such files; a pickle is not opened. `ValueError`: if they are damaged, do not
                belong together, or are another model's. transformers would warn, and fill in random numbers.
        """
        refuse_variant(kwargs)
        kwargs = one_dtype(kwargs)
        source = pretrained_model_name_or_path
        if source is None:  # the weights are given as state_dict=
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        place = at_one_commit(source, {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs})
        if not isinstance(config, SAEConfig):
            names = {field.name for field in fields(SAEConfig)} - {"dtype"}
            changed = {name: kwargs.pop(name) for name in names & kwargs.keys()}
            config = SAEConfig.from_pretrained(source if config is None else config, **place, **changed)
        files = WeightFiles.find(source, place)
        files.check(config.tensor_shapes)
        state = files.read(config.digests)
        statistics = DomainStatistics.load(source, place, config.digests) if config.holds_statistics else None
        model = super().from_pretrained(None, *model_args, config=config, state_dict=state, **kwargs)
        loaded, *_ = model if isinstance(model, tuple) else (model,)  # with output_loading_info=True
        loaded.config.name_or_path = loaded.name_or_path = str(source)
        loaded.set_domain_statistics(statistics)
        return model

    def set_domain_statistics(self, statistics: DomainStatistics | None) -> None:
        """Give the SAE [`DomainStatistics`], or with `None` take them away.

        Raises:
            `ValueError`: if they are of rows of another width, or of another number of latents.
        """
        if statistics is not None:
            num_latents, hidden_size = self.config.weight_shape
            statistics.check_fits(hidden_size, num_latents, self.config.name_or_path or "This SAE")
        self.domain_statistics = statistics
        self.config.holds_statistics = statistics is not None

    def save_beside(self, folder: Path, **kwargs: Any) -> None:
        """Write what belongs to a checkpoint beside weights and configuration, into a folder."""
        # An SAE made from the config of another has none, whatever that config says.
        self.config.holds_statistics = self.domain_statistics is not None
        if self.domain_statistics is not None:
            self.domain_statistics.save(folder)

    @classmethod
    def from_sparsify(cls, name_or_path: str | os.PathLike, **options: Any) -> SAEModel:
        """
        An SAE that EleutherAI's `sparsify` trained: the same encode and decode. What its checkpoint does not tell (the
        mean of the training rows, so the gate) [`calibrate`] measures.

        Args:
            name_or_path (`str` or path): folder with `cfg.json` and `sae.safetensors`, or Hub id (with `subfolder=`).
            options: `layer`, `base_model_name_or_path`, `base_model_revision` (which CLIP it reads and where),
                `dtype`; of the Hub `revision`, `subfolder`, `cache_dir`, `force_download`, `local_files_only`,
                `token`.

        Raises:
            `OSError`: if files are missing. `ValueError`: on a setting that this model can't express exactly, and on
                damaged files.
        """
        return cls._converted(sparsify.load(name_or_path, **one_dtype(options)))

    @classmethod
    def from_sae_lens(cls, name_or_path: str | os.PathLike, **options: Any) -> SAEModel:
        """
        As [`SAEModel.from_sparsify`], for SAELens: `cfg.json` and `sae_weights.safetensors`; architectures `topk`,
        `abstopk` and `standard` (a plain ReLU: `top_k` is then the number of latents). `scaling_factor` is the
        constant that activations were multiplied by, where `normalize_activations` is `expected_average_only_in`.
        """
        return cls._converted(sae_lens.load(name_or_path, **one_dtype(options)))

    @classmethod
    def from_prisma(cls, name_or_path: str | os.PathLike, **options: Any) -> SAEModel:
        """
        As [`SAEModel.from_sae_lens`], for ViT-Prisma: `config.json` and `weights_name` (by default the one
        `.safetensors` or `.pt` file; on the Hub `weights.pt`). A `.pt` file that holds anything else than tensors is
        refused: it may be code.
        """
        return cls._converted(prisma.load(name_or_path, **one_dtype(options)))

    @classmethod
    def _converted(cls, converted: Converted) -> SAEModel:
        return cls.from_pretrained(None, config=converted.config, state_dict=converted.state, dtype=converted.dtype)

    def save_sparsify(self, folder: str | os.PathLike) -> None:
        """
        Write `cfg.json` and `sae.safetensors`, which sparsify's `SparseCoder.load_from_disk` loads: the same encode
        and decode. The gate and its statistics, and which CLIP and layer it is for, have no place there.

        Raises:
            `ValueError`: if `activation` is `"absolute"`. `OSError`: if the folder can't be written.
        """
        sparsify.save(self, folder)

    def save_sae_lens(self, folder: str | os.PathLike) -> None:
        """As [`SAEModel.save_sparsify`], for SAELens' `SAE.load_from_disk`, which has a place for CLIP and layer (in
        `metadata`). It knows `"absolute"` as `abstopk`."""
        sae_lens.save(self, folder)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Random unit-norm decoder directions, encoder tied to them at the start (Gao et al., arXiv 2406.04093)."""
        if module is not self:
            return
        init.copy_(self.W_dec, F.normalize(torch.randn_like(self.W_dec, dtype=torch.float32), dim=-1))
        init.copy_(self.W_enc, self.W_dec)
        init.zeros_(self.b_enc)
        init.zeros_(self.b_pre)
        init.zeros_(self.mean)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """There is no attention in it: transformers leaves it out where that of a steered CLIP is set."""
        return False

    def get_input_embeddings(self) -> None:
        """None: there are no tokens. accelerate asks when it shards a model (FSDP)."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SAEModel:
        # `.to(torch.bfloat16)` and friends move everything but must not round the statistics: the FVU and so the gate
        # hang on it.
        mean = self.mean
        super()._apply(fn, recurse)
        if self.mean.dtype != torch.float32:
            self.mean = mean.to(self.mean.device)
        return self

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The active latents of each row of `x` `(batch, hidden_size)`: `(values, indices)`, each `(batch, top_k)`.

        Raises:
            `ValueError`: if `x` has another shape.
        """
        values, order, _ = self._encode(x)
        return values, order.indices

    def _encode(self, x: torch.Tensor) -> tuple[torch.Tensor, LatentOrder, torch.Tensor]:
        """The code, and the `(batch, num_latents)` pre-activations, without a graph in training."""
        self._check_width(x)
        config = self.config
        x = x.to(self.b_pre.dtype)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            pre_activations = F.linear(x - self.b_pre, self.W_enc, self.b_enc)
            values, indices = top_k(pre_activations, config.top_k, config.activation)
            return values, LatentOrder(indices, config.weight_shape[0]), pre_activations
        with torch.no_grad():
            pre_activations = F.linear(x - self.b_pre, self.W_enc, self.b_enc)
            values, indices = top_k(pre_activations, config.top_k, config.activation)
        order = LatentOrder(indices, config.weight_shape[0])
        values = linear_at(x, self.b_pre, self.W_enc, self.b_enc, order, values)
        if config.activation == "relu":
            # Changes no value; stops the gradient where ReLU did.
            values = torch.relu(values)
        return values, order, pre_activations

    def decode(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """`x~ = sum_j values_j d_j + b_pre`, `(batch, hidden_size)`; nothing of width `num_latents` is formed."""
        return sparse_decode(values, indices, self.W_dec) + self.b_pre

    @can_return_tuple
    def forward(
        self, x: torch.Tensor, dead_latents: torch.Tensor | None = None, return_loss: bool = True, **kwargs: Any
    ) -> SAEOutput:
        """
        Args:
            x (`torch.Tensor` of shape `(batch, hidden_size)`):
                CLS activations.
            dead_latents (`torch.BoolTensor` of shape `(num_latents,)`, *optional*):
                Latents that have not been active for long. When given, the loss holds the AuxK term that revives them.
            return_loss (`bool`, *optional*, defaults to `True`):
                Whether to say the loss. By this default transformers' `Trainer` knows that there is one without labels
                (`eval_loss`).

        The squared error is divided by the total variance of the training activations (`config.total_variance`), a
        constant, so that the loss of a batch is the mean of the losses of its parts; without it, by the batch's own.
        The loss of a batch of 0 rows is 0.
        """
        values, order, pre_activations = self._encode(x)
        reconstruction = sparse_decode(values, order, self.W_dec) + self.b_pre
        target = x.float()
        if x.shape[0] == 0:  # not `len`, which would make the batch size a constant of an exported model
            return SAEOutput(reconstruction.float().sum(), reconstruction, values, order.indices, target.new_zeros(0))
        error = target - reconstruction.float()
        scale = self.config.total_variance or (target - target.mean(0)).square().sum(-1).mean()
        loss = error.square().sum(-1).mean() / scale
        if dead_latents is not None and self.config.aux_k_coefficient:
            aux_k_loss = self._aux_k_loss(x, pre_activations, error.detach(), dead_latents)
            loss = loss + self.config.aux_k_coefficient * aux_k_loss / scale
        with torch.no_grad():
            fvu = fvu_per_sample(target, reconstruction, self.mean)
        return SAEOutput(loss if return_loss else None, reconstruction, values, order.indices, fvu)

    def _aux_k_loss(
        self, x: torch.Tensor, pre_activations: torch.Tensor, residual: torch.Tensor, dead_latents: torch.Tensor
    ) -> torch.Tensor:
        """Squared error of the residual reconstructed by the `aux_k` most active dead latents (Gao et al., appendix
        A.2).

        Where fewer are dead, the loss shrinks with their share. The gradient reaches the encoder rows and biases of
        exactly the latents that are to be revived.
        """
        aux_k = self.config.aux_k or 0
        x = x.to(self.b_pre.dtype)
        if torch.compiler.is_compiling() or _counting_is_free(x.device):
            values, order, share = self._few_dead_latents(x, dead_latents, aux_k)
        else:
            values, order, share = self._any_dead_latents(x, pre_activations.detach(), dead_latents, aux_k)
        if not values.numel():
            return residual.new_zeros(())
        prediction = sparse_decode(values, order, self.W_dec).float()
        return share * (residual - prediction).square().sum(-1).mean()

    def _few_dead_latents(
        self, x: torch.Tensor, dead: torch.Tensor, aux_k: int
    ) -> tuple[torch.Tensor, LatentOrder, torch.Tensor | float]:
        """The code of each row among the dead, and their share of `aux_k`. They are counted, and only theirs are
        computed."""
        rows = dead.nonzero().squeeze(-1)
        k = min(aux_k, len(rows))
        pre_activations = F.linear(x - self.b_pre.detach(), self.W_enc[rows], self.b_enc[rows])
        values, chosen = top_k(pre_activations, k, self.config.activation)
        return values, LatentOrder(rows[chosen], len(dead)), k / aux_k if k else 0.0

    def _any_dead_latents(
        self, x: torch.Tensor, pre_activations: torch.Tensor, dead: torch.Tensor, aux_k: int
    ) -> tuple[torch.Tensor, LatentOrder, torch.Tensor | float]:
        """The same without the host knowing how many are dead: a GPU would have to finish all its work to tell."""
        strength = pre_activations.abs() if self.config.activation == "absolute" else pre_activations
        k = min(aux_k, len(dead))
        indices = strength.masked_fill(~dead, -torch.inf).topk(k, dim=-1, sorted=False).indices
        values = pre_activations.gather(-1, indices)
        order = LatentOrder(indices, len(dead))
        values = linear_at(x, self.b_pre.detach(), self.W_enc, self.b_enc, order, values)
        if self.config.activation == "relu":
            values = torch.relu(values)
        # Where fewer than aux_k are dead the rest are living ones: they must neither count nor learn.
        return values * dead[indices], order, dead.sum().clamp(max=k) / max(aux_k, 1)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Set every decoder direction to unit norm. Call it after the optimizer's step. A zero row stays zero."""
        weight = own_part(self.W_dec)
        norms = torch.linalg.vector_norm(weight, dim=-1, keepdim=True, dtype=torch.float32)
        weight.div_(torch.where(norms > 0, norms, 1).to(weight.dtype))

    @torch.no_grad()
    def remove_parallel_decoder_gradient(self) -> None:
        """Remove from `W_dec.grad` the component along each direction, which `normalize_decoder` would undo. Call it
        between backward and the optimizer's step.

        Raises:
            `RuntimeError`: if there is no gradient yet.
        """
        if self.W_dec.grad is None:
            raise RuntimeError("W_dec has no gradient: call remove_parallel_decoder_gradient() after backward().")
        weights, grads = own_part(self.W_dec), own_part(self.W_dec.grad)
        # On a CPU in blocks that stay in its cache: a product of the size of W_dec would cost three times as much.
        rows = _CACHED_ROWS if weights.device.type == "cpu" else max(1, len(weights))
        for weight, grad in zip(weights.split(rows), grads.split(rows), strict=True):
            along = (grad * weight).sum(-1, keepdim=True)
            length = weight.square().sum(-1, keepdim=True)
            grad.addcmul_(along / torch.where(length > 0, length, 1), weight, value=-1)

    @torch.no_grad()
    def set_statistics(self, mean: torch.Tensor, total_variance: float) -> None:
        """Store the mean `(hidden_size,)` and total variance of the training activations, and start `b_pre` at the
        mean."""
        self.mean.copy_(mean)
        self.b_pre.copy_(mean)
        self.config.total_variance = float(total_variance)

    def fvu_threshold(self, quantile: float) -> float:
        """See [`SAEConfig.fvu_threshold`]."""
        return self.config.fvu_threshold(quantile)

    def _check_width(self, x: torch.Tensor) -> None:
        if x.ndim != 2 or x.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"This SAE reads rows of width {self.config.hidden_size}, so x must be (batch, "
                f"{self.config.hidden_size}); it is {tuple(x.shape)}. Pass CLS activations of the CLIP it was trained "
                f"on ({self.config.base_model_name_or_path or 'not recorded'})."
            )


def _counting_is_free(device: torch.device) -> bool:
    return device.type == "cpu"
