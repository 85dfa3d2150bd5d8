"""The sparse gradients are those of the dense formulas: a wrong one would train a wrong SAE without any error."""

import pytest
import torch

from hf_vs2.functional import sparse_ops


BATCH, HIDDEN, LATENTS, TOP_K = 7, 12, 40, 5


@pytest.fixture(params=[1.0, 0.0], ids=["sparse", "dense"])
def backward(request, monkeypatch):
    """Both sides of the switch."""
    monkeypatch.setattr(sparse_ops, "sparse_limit", lambda weight: request.param)


def code(batch=BATCH):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(batch, TOP_K, generator=generator)
    indices = torch.stack([torch.randperm(LATENTS, generator=generator)[:TOP_K] for _ in range(batch)])
    return values, indices


def parameters(*shapes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def test_decode_and_its_gradients_equal_the_dense_product(backward):
    values, indices = code()
    values.requires_grad_()
    (weight,) = parameters((LATENTS, HIDDEN))
    target = torch.randn(BATCH, HIDDEN)

    dense_code = torch.zeros(BATCH, LATENTS).scatter(1, indices, values)
    expected = dense_code @ weight
    expected_grads = torch.autograd.grad((expected * target).sum(), (values, weight))
    found = sparse_ops.sparse_decode(values, indices, weight)
    found_grads = torch.autograd.grad((found * target).sum(), (values, weight))

    torch.testing.assert_close(found, expected)
    for one, other in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other)


def test_gathered_linear_has_the_gradients_of_the_full_product(backward):
    _, indices = code()
    x, center, weight, bias = parameters((BATCH, HIDDEN), (HIDDEN,), (LATENTS, HIDDEN), (LATENTS,))
    target = torch.randn(BATCH, TOP_K)

    expected = ((x - center) @ weight.t() + bias).gather(1, indices)
    expected_grads = torch.autograd.grad((expected * target).sum(), (x, center, weight, bias))
    found = sparse_ops.linear_at(x, center, weight, bias, indices, expected.detach())
    found_grads = torch.autograd.grad((found * target).sum(), (x, center, weight, bias))

    assert torch.equal(found, expected)
    for one, other in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other)


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
