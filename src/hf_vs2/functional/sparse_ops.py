"""The fast path of a top-k SAE: encode and decode with gradients that touch only the active latents.

A dense SAE step costs five products of `batch x num_latents x hidden_size`; only the encoder's forward is needed. The
rest has a sparse form of cost `batch x top_k x hidden_size`, which wins while `top_k / num_latents` is small; above
`sparse_limit` the dense form of the same gradient is faster and is taken instead. Both give the same numbers up to
float rounding (`tests/functional/test_sparse_ops.py`). On a GPU the sparse form runs in the kernels of
`sparse_triton.py`, where there is Triton.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


SPARSE_LIMIT = {"cpu": 0.09, "float32": 0.07, "tf32": 0.012, "half": 0.0}
"""Largest `top_k / num_latents` for which the backward is sparse; `benchmarks/sparse_backward.py` measures it.

On a GPU it hangs on the arithmetic: in TF32 (`torch.set_float32_matmul_precision("high")`) and half precision a dense
product costs a small part of what it does in float32, a sparse one as much as before.
"""

# The same for decoding: a ReLU SAE from elsewhere has every latent in its code, VS2++ sums the codes of many
# neighbours. The GPU's is no more than an estimate, from kernels timed at 2 and 8 %.
_DECODE_LIMIT = {"cpu": 0.09, "gpu": 0.2}
_SUM_MODE = 0  # embedding_bag's number for mode="sum"


class LatentOrder:
    """The entries of a code, `indices` `(batch, top_k)`, by latent. Encoder and decoder share one, so they are sorted
    once."""

    def __init__(self, indices: torch.Tensor, num_latents: int):
        self.indices, self.num_latents = indices, num_latents

    @functools.cached_property
    def entries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Entry numbers `(batch * top_k,)`, those of a latent together, and where each latent's begin,
        `(num_latents,)`."""
        latents = self.indices.flatten()
        # torch sorts 16-bit numbers several times faster than 64-bit ones.
        latents, order = latents.to(torch.int16 if self.num_latents < 2**15 else torch.int32).sort(stable=True)
        numbers = torch.arange(self.num_latents, dtype=latents.dtype, device=latents.device)
        return order, torch.searchsorted(latents, numbers)


def sparse_decode(values: torch.Tensor, indices: torch.Tensor | LatentOrder, weight: torch.Tensor) -> torch.Tensor:
    """`sum_j values[b, j] * weight[indices[b, j]]`, `(batch, hidden_size)`, without a `(batch, num_latents)` tensor.

    `values` and `indices` are `(batch, top_k)`, `weight` is `(num_latents, hidden_size)`. The result has `weight`'s
    dtype.
    """
    order = indices if isinstance(indices, LatentOrder) else LatentOrder(indices, len(weight))
    needs_grad = torch.is_grad_enabled() and (values.requires_grad or weight.requires_grad)
    if needs_grad and not torch.compiler.is_compiling():
        return _SparseDecode.apply(values.to(weight.dtype), weight, order)
    return _weighted_sum(values.to(weight.dtype), order.indices, weight)


def linear_at(
    x: torch.Tensor,
    center: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    indices: torch.Tensor | LatentOrder,
    outputs: torch.Tensor,
) -> torch.Tensor:
    """Give `outputs`, the entries `indices` of `(x - center) @ weight.T + bias` computed without a graph, their
    gradient.

    `x` is `(batch, hidden_size)`, `center` `(hidden_size,)`, `weight` `(num_latents, hidden_size)`, `bias`
    `(num_latents,)`; `indices` and `outputs` are `(batch, top_k)`. Returns `outputs` as a differentiable function of
    the other tensors: the gradient of a gather from the full product, at the cost of the gathered entries only.
    """
    order = indices if isinstance(indices, LatentOrder) else LatentOrder(indices, len(weight))
    return _LinearAt.apply(x, center, weight, bias, outputs, order)


def _weighted_sum(values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`S weight` for the sparse `(batch, num_latents)` matrix S of the code: `(batch, hidden_size)`."""
    if weight.dtype in (torch.bfloat16, torch.float16) and weight.device.type == "cpu":
        # The CPU kernels accumulate half precision in half precision; a sum over top_k latents deserves better.
        return _weighted_sum(values.float(), indices, weight.float()).to(weight.dtype)
    if indices.shape[-1] > _DECODE_LIMIT["cpu" if weight.device.type == "cpu" else "gpu"] * len(weight):
        # A latent may come many times, and a GPU would add half precision up in half precision.
        added_up = _dense_code(values.to(torch.promote_types(values.dtype, torch.float32)), indices, len(weight))
        return added_up.to(weight.dtype) @ weight
    if kernels := _kernels_for(weight):
        return kernels.decode(values, indices, weight)
    return F.embedding_bag(indices, weight, per_sample_weights=values, mode="sum")


def _dense_code(values: torch.Tensor, indices: torch.Tensor, num_latents: int) -> torch.Tensor:
    # Added, not set: a row of several codes (VS2++) may name a latent more than once.
    return values.new_zeros(indices.shape[0], num_latents).scatter_add_(1, indices, values)


def sparse_limit(weight: torch.Tensor) -> float:
    """The entry of `SPARSE_LIMIT` that holds for these weights."""
    if weight.device.type == "cpu":
        return SPARSE_LIMIT["cpu"]
    if weight.dtype in (torch.bfloat16, torch.float16):
        return SPARSE_LIMIT["half"]
    return SPARSE_LIMIT["float32" if torch.get_float32_matmul_precision() == "highest" else "tf32"]


def _is_sparse(indices: torch.Tensor, num_latents: int, like: torch.Tensor) -> bool:
    return indices.shape[-1] <= sparse_limit(like) * num_latents


def _latent_sums(values: torch.Tensor, order: LatentOrder, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`S^T rows`, `(num_latents, hidden_size)`, and the sums of the columns of S, `(num_latents,)`."""
    indices, num_latents = order.indices, order.num_latents
    if not _is_sparse(indices, num_latents, rows):
        code = _dense_code(values, indices, num_latents)
        return code.t() @ rows, code.sum(0)
    # Rows of S^T in compressed form, entries sorted by latent: one "bag" of weighted rows of the batch a latent.
    entries, starts = order.entries
    if kernels := _kernels_for(rows):
        return kernels.latent_sums(values, entries, starts, rows)
    weights = values.flatten()[entries]
    sums = F.embedding_bag(entries // indices.shape[1], rows, offsets=starts, per_sample_weights=weights, mode="sum")
    return sums, values.new_zeros(num_latents).index_add_(0, indices.flatten(), values.flatten())


def _latent_dots(rows: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`rows[b] . weight[indices[b, j]]`, `(batch, top_k)`."""
    if not _is_sparse(indices, len(weight), weight):
        return (rows @ weight.t()).gather(1, indices)
    if kernels := _kernels_for(weight):
        return kernels.dots(rows, weight, indices)
    # The kernel behind embedding_bag's own gradient: no (batch, top_k, hidden_size) tensor of gathered directions.
    batch, k = indices.shape
    offsets = torch.arange(0, batch * k, k, device=indices.device)
    row_of = torch.arange(batch, device=indices.device).repeat_interleave(k)
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows.float(), weight.float(), indices.flatten(), offsets, row_of, _SUM_MODE
    )
    return dots.view(batch, k).to(rows.dtype)


@contextmanager
def torch_operations_only() -> Iterator[None]:
    """Within, no kernel of ours is used: what counts torch's operations (FLOPs) would not see it."""
    global _kernels_wanted
    before, _kernels_wanted = _kernels_wanted, False
    try:
        yield
    finally:
        _kernels_wanted = before


_kernels_wanted = True


def _kernels_for(tensor: torch.Tensor) -> ModuleType | None:
    """The Triton kernels, where they run on this tensor."""
    if tensor.device.type != "cuda" or tensor.dtype == torch.float64 or torch.compiler.is_compiling():
        return None
    return _triton_kernels() if _kernels_wanted else None


@functools.cache
def _triton_kernels() -> ModuleType | None:
    try:
        from . import sparse_triton
    except ImportError:  # optional; torch's own operations do the same
        return None
    try:
        one = torch.ones(1, 1, device="cuda")
        sparse_triton.decode(one, one.long() - 1, one)
    except Exception as error:
        # An old GPU, or no C compiler for Triton to use: whatever it is, there is another way.
        warnings.warn(
            f"Triton is installed but its kernels do not run here ({error}); hf_vs2 uses slower torch operations.",
            stacklevel=2,
        )
        return None
    return sparse_triton


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, weight: torch.Tensor, order: LatentOrder) -> torch.Tensor:
        ctx.save_for_backward(values, weight)
        ctx.order = order
        return _weighted_sum(values, order.indices, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        values, weight = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        grad_values = _latent_dots(grad, weight, ctx.order.indices) if ctx.needs_input_grad[0] else None
        grad_weight = _latent_sums(values, ctx.order, grad)[0] if ctx.needs_input_grad[1] else None
        return grad_values, grad_weight, None


class _LinearAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        center: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        outputs: torch.Tensor,
        order: LatentOrder,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, center, weight)
        ctx.order = order
        return outputs.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, center, weight = ctx.saved_tensors
        needs_x, needs_center, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        grad = grad.to(weight.dtype)
        grad_x = grad_center = grad_weight = grad_bias = None
        if needs_x:
            grad_x = _weighted_sum(grad, ctx.order.indices, weight).to(x.dtype)
        if needs_center or needs_weight or needs_bias:
            grad_weight, grad_bias = _latent_sums(grad, ctx.order, (x - center).to(weight.dtype))
        if needs_center:
            # The batch sum first, then one matrix-vector product: no (batch, hidden_size) gradient of x is formed.
            grad_center = -(grad_bias @ weight).to(center.dtype)
        return grad_x, grad_center, grad_weight, grad_bias, None, None
