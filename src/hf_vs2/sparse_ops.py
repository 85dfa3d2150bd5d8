"""The fast path of a top-k SAE: encode and decode with gradients that touch only the active latents.

A dense SAE step costs five products of `batch x num_latents x hidden_size`; only the encoder's forward is needed. The
rest has a sparse form of cost `batch x top_k x hidden_size`, which wins while `top_k / num_latents` is small; above
`SPARSE_LIMIT` the dense form of the same gradient is faster and is taken instead. Both give the same numbers up to
float rounding (`tests/test_sparse_ops.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


SPARSE_LIMIT = 0.09
"""Largest `top_k / num_latents` for which the backward is sparse; `benchmarks/sparse_backward.py` measures it."""

_SUM_MODE = 0  # embedding_bag's number for mode="sum"


def sparse_decode(values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`sum_j values[b, j] * weight[indices[b, j]]`, `(batch, hidden_size)`, without a `(batch, num_latents)` tensor.

    `values` and `indices` are `(batch, top_k)`, `weight` is `(num_latents, hidden_size)`. The result has `weight`'s dtype.
    """
    needs_grad = torch.is_grad_enabled() and (values.requires_grad or weight.requires_grad)
    if needs_grad and not torch.compiler.is_compiling():
        return _SparseDecode.apply(values.to(weight.dtype), indices, weight)
    return _embedding_bag(values.to(weight.dtype), indices, weight)


def linear_at(
    x: torch.Tensor,
    center: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    indices: torch.Tensor,
    outputs: torch.Tensor,
) -> torch.Tensor:
    """Give `outputs`, the entries `indices` of `(x - center) @ weight.T + bias` computed without a graph, their gradient.

    `x` is `(batch, hidden_size)`, `center` `(hidden_size,)`, `weight` `(num_latents, hidden_size)`, `bias`
    `(num_latents,)`; `indices` and `outputs` are `(batch, top_k)`. Returns `outputs` as a differentiable function of the
    other tensors: the gradient of a gather from the full product, at the cost of the gathered entries only.
    """
    return _LinearAt.apply(x, center, weight, bias, indices, outputs)


def _embedding_bag(values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if weight.dtype in (torch.bfloat16, torch.float16) and weight.device.type == "cpu":
        # The CPU kernel accumulates half precision in half precision; a sum over top_k latents deserves better.
        return F.embedding_bag(indices, weight.float(), per_sample_weights=values.float(), mode="sum").to(weight.dtype)
    return F.embedding_bag(indices, weight, per_sample_weights=values, mode="sum")


def _is_sparse(indices: torch.Tensor, num_latents: int) -> bool:
    return indices.shape[-1] <= SPARSE_LIMIT * num_latents


def _latent_sums(values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, num_latents: int) -> torch.Tensor:
    """`S^T rows` for the sparse `(batch, num_latents)` matrix S of the code: `(num_latents, hidden_size)`."""
    batch, k = indices.shape
    if not _is_sparse(indices, num_latents):
        # Added, not set: a row of several codes (VS2++) may name a latent more than once.
        return values.new_zeros(batch, num_latents).scatter_add_(1, indices, values).t() @ rows
    # Rows of S^T in compressed form, entries sorted by latent: one "bag" of weighted rows of the batch a latent.
    latents = indices.flatten()
    # torch sorts 16-bit numbers several times faster than 64-bit ones.
    latents, order = (latents.short() if num_latents < 2**15 else latents).sort(stable=True)
    starts = torch.searchsorted(latents, torch.arange(num_latents, dtype=latents.dtype, device=latents.device))
    return F.embedding_bag(order // k, rows, offsets=starts, per_sample_weights=values.flatten()[order], mode="sum")


def _latent_dots(rows: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`rows[b] . weight[indices[b, j]]`, `(batch, top_k)`."""
    if not _is_sparse(indices, len(weight)):
        return (rows @ weight.t()).gather(1, indices)
    # The kernel behind embedding_bag's own gradient: no (batch, top_k, hidden_size) tensor of gathered directions.
    batch, k = indices.shape
    offsets = torch.arange(0, batch * k, k, device=indices.device)
    row_of = torch.arange(batch, device=indices.device).repeat_interleave(k)
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows.float(), weight.float(), indices.flatten(), offsets, row_of, _SUM_MODE
    )
    return dots.view(batch, k).to(rows.dtype)


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(values, indices, weight)
        return _embedding_bag(values, indices, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor | None]:
        values, indices, weight = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        grad_values = _latent_dots(grad, weight, indices) if ctx.needs_input_grad[0] else None
        grad_weight = _latent_sums(values, indices, grad, len(weight)) if ctx.needs_input_grad[2] else None
        return grad_values, None, grad_weight


class _LinearAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        center: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        indices: torch.Tensor,
        outputs: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, center, weight, indices)
        return outputs.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, center, weight, indices = ctx.saved_tensors
        needs_x, needs_center, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        grad = grad.to(weight.dtype)
        grad_x = grad_center = grad_weight = grad_bias = None
        if needs_x:
            grad_x = _embedding_bag(grad, indices, weight).to(x.dtype)
        if needs_weight:
            grad_weight = _latent_sums(grad, indices, (x - center).to(weight.dtype), len(weight))
        if needs_center or needs_bias:
            grad_bias = grad.new_zeros(len(weight)).index_add_(0, indices.flatten(), grad.flatten())
        if needs_center:
            # The batch sum first, then one matrix-vector product: no (batch, hidden_size) gradient of x is formed.
            grad_center = -(grad_bias @ weight).to(center.dtype)
        return grad_x, grad_center, grad_weight, grad_bias, None, None
