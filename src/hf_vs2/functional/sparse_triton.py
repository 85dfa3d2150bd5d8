"""GPU kernels of `sparse_ops`: the three sums over active latents, written in Triton (optional; torch for CUDA brings
it).

Each is one pass that gathers, weighs and adds: nothing of shape `(batch, top_k, hidden_size)` exists. Every number is
added in an order that depends on the input alone, never on which thread comes first, so a run can be repeated bit for
bit. Sums are float32 whatever the dtype. Triton runs a kernel on the current GPU, not on that of its tensors: hence
`device_of`. `TRITON_INTERPRET=1` runs the same code on a CPU, slowly: that is how it is tested where there is no GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


# Rows gathered at a time by one program, columns of them, and its warps: the fastest of those tried on an H100.
_DECODE = (16, 512, 2)
_DOTS = (32, 128, 4)
_SUMS = (64, 64, 2)
_SUMS_OF_FEW = (8, 512, 4)
_FEW = 12
"""Entries a latent, on average, below which most programs have little to add."""


@triton.jit
def _decode_kernel(values, indices, weight, out, top_k, width, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, top_k, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        there = entry < top_k
        latent = tl.load(indices + row * top_k + entry, mask=there, other=0)
        value = tl.load(values + row * top_k + entry, mask=there, other=0).to(tl.float32)
        mask = there[:, None] & (columns < width)[None, :]
        directions = tl.load(weight + latent[:, None] * width + columns[None, :], mask=mask, other=0)
        total += tl.sum(directions.to(tl.float32) * value[:, None], axis=0)
    tl.store(out + row * width + columns, total.to(out.dtype.element_ty), mask=columns < width)


@triton.jit
def _dots_kernel(rows, weight, indices, out, top_k, width, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    there = entry < top_k
    latent = tl.load(indices + row * top_k + entry, mask=there, other=0)
    total = tl.zeros([ENTRIES], tl.float32)
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < width
        x = tl.load(rows + row * width + columns, mask=inside, other=0).to(tl.float32)
        mask = there[:, None] & inside[None, :]
        directions = tl.load(weight + latent[:, None] * width + columns[None, :], mask=mask, other=0)
        total += tl.sum(directions.to(tl.float32) * x[None, :], axis=1)
    tl.store(out + row * top_k + entry, total.to(out.dtype.element_ty), mask=there)


@triton.jit
def _sums_kernel(
    values,
    entries,
    starts,
    rows,
    sums,
    totals,
    num_entries,
    top_k,
    width,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.load(starts + latent)
    end = tl.load(starts + latent + 1, mask=latent + 1 < tl.num_programs(0), other=num_entries)
    total = tl.zeros([COLUMNS], tl.float32)
    weight = tl.zeros([ENTRIES], tl.float32)
    for start in range(first, end, ENTRIES):
        place = start + tl.arange(0, ENTRIES)
        there = place < end
        entry = tl.load(entries + place, mask=there, other=0)
        value = tl.load(values + entry, mask=there, other=0).to(tl.float32)
        mask = there[:, None] & (columns < width)[None, :]
        x = tl.load(rows + (entry // top_k)[:, None] * width + columns[None, :], mask=mask, other=0)
        total += tl.sum(x.to(tl.float32) * value[:, None], axis=0)
        weight += value
    tl.store(sums + latent * width + columns, total.to(sums.dtype.element_ty), mask=columns < width)
    if block == 0:
        tl.store(totals + latent, tl.sum(weight, axis=0).to(totals.dtype.element_ty))


def decode(values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`sum_j values[b, j] * weight[indices[b, j]]`, `(batch, width)`, of `weight`'s dtype."""
    values, indices, weight = values.contiguous(), indices.contiguous(), weight.contiguous()
    (batch, top_k), width = indices.shape, weight.shape[1]
    out = weight.new_empty(batch, width)
    if out.numel():
        entries, columns, warps = _DECODE
        grid = (batch, triton.cdiv(width, columns))
        with torch.cuda.device_of(weight):
            _decode_kernel[grid](values, indices, weight, out, top_k, width, entries, columns, num_warps=warps)
    return out


def dots(rows: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`rows[b] . weight[indices[b, j]]`, `(batch, top_k)`, of `rows`' dtype."""
    rows, weight, indices = rows.contiguous(), weight.contiguous(), indices.contiguous()
    (batch, top_k), width = indices.shape, weight.shape[1]
    out = rows.new_empty(batch, top_k)
    if out.numel():
        entries, columns, warps = _DOTS
        grid = (batch, triton.cdiv(top_k, entries))
        with torch.cuda.device_of(weight):
            _dots_kernel[grid](rows, weight, indices, out, top_k, width, entries, columns, num_warps=warps)
    return out


def latent_sums(
    values: torch.Tensor, entries: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For the sparse `(batch, num_latents)` matrix S of a code: `S^T rows`, `(num_latents, width)`, and the sums of
    its columns.

    `values` is `(batch, top_k)`; `entries` lists its entries by latent, those of latent l from `starts[l]` on.
    """
    values, rows = values.contiguous(), rows.contiguous()
    num_entries, top_k, width, num_latents = values.numel(), values.shape[1], rows.shape[1], len(starts)
    sums, totals = rows.new_empty(num_latents, width), values.new_empty(num_latents)
    tile, columns, warps = _SUMS if num_entries >= _FEW * num_latents else _SUMS_OF_FEW
    grid = (num_latents, triton.cdiv(width, columns))
    with torch.cuda.device_of(rows):
        _sums_kernel[grid](
            values, entries, starts, rows, sums, totals, num_entries, top_k, width, tile, columns, num_warps=warps
        )
    return sums, totals
