"""The sparse gradients are those of the dense formulas: a wrong one would train a wrong SAE without any error."""

import pytest
import torch

from hf_vs2.functional import sparse_ops


BATCH, HIDDEN, LATENTS, TOP_K = 7, 12, 40, 5


@pytest.mark.parametrize("num_latents", [400, 4000], ids=["dense", "sparse"])
@pytest.mark.parametrize("latents", [torch.arange(300), torch.zeros(300, dtype=torch.int64)], ids=["different", "one"])
def test_decode_sums_half_precision_in_float32(num_latents, latents):
    """A sum of many bfloat16 terms would otherwise lose the small ones. In VS2++ a latent comes many times."""
    values = torch.full((1, 300), 1 / 256, dtype=torch.bfloat16)
    values[0, 0] = 256.0
    found = sparse_ops.sparse_decode(values, latents[None], torch.ones(num_latents, HIDDEN, dtype=torch.bfloat16))
    assert found[0, 0].item() == torch.tensor(256 + 299 / 256, dtype=torch.bfloat16).item() != 256
    assert found.dtype == torch.bfloat16


def test_the_limit_follows_the_arithmetic():
    """Where dense products are fast (TF32, half precision on a GPU) the sparse gradient would be the slower one."""
    away, before = {"device": "meta"}, torch.get_float32_matmul_precision()
    try:
        precise = sparse_ops.sparse_limit(torch.empty(1, **away))
        torch.set_float32_matmul_precision("high")
        fast = sparse_ops.sparse_limit(torch.empty(1, **away))
        assert sparse_ops.sparse_limit(torch.empty(1)) == sparse_ops.SPARSE_LIMIT["cpu"], "TF32 is of GPUs"
    finally:
        torch.set_float32_matmul_precision(before)
    half = sparse_ops.sparse_limit(torch.empty(1, dtype=torch.bfloat16, **away))
    assert half == 0 < fast < precise


@pytest.mark.parametrize("num_latents", [3, 300, 2**15 - 1, 2**15, 2**15 + 9, 70_000])
def test_entries_are_ordered_by_latent_however_many_there_are(num_latents):
    """They are sorted as 16-bit numbers where that holds them: one that wraps round would give a latent another's gradient."""
    indices = torch.randint(num_latents, (50, 8), generator=torch.Generator().manual_seed(0))
    indices[0, 0], indices[-1, -1] = num_latents - 1, 0
    entries, starts = sparse_ops.LatentOrder(indices, num_latents).entries
    latents = indices.flatten()[entries]
    assert torch.equal(latents, indices.flatten().sort().values)
    assert torch.equal(starts, torch.searchsorted(latents, torch.arange(num_latents)))
