"""The GPU kernels compute what the dense formulas say. Without a GPU, Triton's interpreter runs the same code on the CPU."""

import pytest
import torch

from hf_vs2 import SAEConfig, SAEModel
from hf_vs2.functional import sparse_ops


sparse_triton = pytest.importorskip("hf_vs2.sparse_triton", reason="Triton is not installed", exc_type=ImportError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Rows of several tiles and of less than one; latents nobody names and one that every row names; k 1; many entries a latent.
SHAPES = [(7, 5, 40, 12), (3, 33, 50, 600), (1, 1, 1, 1), (70, 3, 4, 65)]


def code(batch, top_k, num_latents, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, top_k, generator=generator).to(DEVICE, dtype)
    popularity = torch.arange(num_latents).flip(0)  # latent 0 is in every row
    chances = torch.rand(batch, num_latents, generator=generator) + (popularity == num_latents - 1) * 9
    return values, chances.topk(top_k).indices.to(DEVICE)


@pytest.fixture
def kernels_on_this_device(monkeypatch):
    monkeypatch.setattr(sparse_ops, "_kernels_for", lambda tensor: sparse_triton)
    monkeypatch.setattr(sparse_ops, "sparse_limit", lambda weight: 1.0)


@pytest.mark.parametrize(("batch", "top_k", "num_latents", "width"), SHAPES)
# bfloat16 has 8 bits, and the interpreter cuts off the others instead of rounding: 2 ** -7.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_kernel_equals_the_dense_product_in_float64(batch, top_k, num_latents, width, dtype, tolerance, seed):
    torch.manual_seed(seed)
    values, indices = code(batch, top_k, num_latents, dtype, seed)
    weight, rows = (torch.randn(n, width, device=DEVICE).to(dtype) for n in (num_latents, batch))
    dense = torch.zeros(batch, num_latents, dtype=torch.float64, device=DEVICE).scatter_(1, indices, values.double())
    sums, totals = sparse_triton.latent_sums(values, *sparse_ops.LatentOrder(indices, num_latents).entries, rows)

    for found, expected in [
        (sparse_triton.decode(values, indices, weight), dense @ weight.double()),
        (sparse_triton.dots(rows, weight, indices), (rows.double() @ weight.double().t()).gather(1, indices)),
        (sums, dense.t() @ rows.double()),
        (totals, dense.sum(0)),
    ]:
        assert found.dtype == dtype
        assert (found.double() - expected).norm() <= tolerance * expected.norm()


def test_training_with_the_kernels_has_the_gradients_of_training_without(kernels_on_this_device, monkeypatch):
    """The whole loss, AuxK included: the sort that encoder and decoder share, and the bias that comes out of the same pass."""
    torch.manual_seed(0)
    config = SAEConfig(hidden_size=24, num_latents=60, top_k=5, aux_k=9, total_variance=24.0)
    sae, x = SAEModel(config).to(DEVICE), torch.randn(17, 24, device=DEVICE, requires_grad=True)
    dead = torch.arange(60, device=DEVICE) % 3 == 0
    inputs = [x, *sae.parameters()]
    with monkeypatch.context() as gpu:
        gpu.setattr("hf_vs2.sae.modeling._counting_is_free", lambda device: False)
        found = torch.autograd.grad(sae(x, dead_latents=dead).loss, inputs)
    monkeypatch.setattr(sparse_ops, "_kernels_for", lambda tensor: None)
    expected = torch.autograd.grad(sae(x, dead_latents=dead).loss, inputs)
    for one, other in zip(found, expected, strict=True):
        assert other.any()
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_an_empty_batch_is_no_error():
    """The last batch of a process may be empty."""
    none = torch.zeros(0, 4, dtype=torch.int64, device=DEVICE)
    weight = torch.ones(8, 6, device=DEVICE)
    assert sparse_triton.decode(none.float(), none, weight).shape == (0, 6)
    assert sparse_triton.dots(weight[:0], weight, none).shape == (0, 4)
    sums, totals = sparse_triton.latent_sums(none.float(), *sparse_ops.LatentOrder(none, 8).entries, weight[:0])
    assert sums.shape == (8, 6) and not sums.any() and not totals.any()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_gpu_takes_the_kernels_and_repeats_them_bit_for_bit():
    values, indices = code(512, 64, 3072)
    weight = torch.randn(3072, 768, device=DEVICE)
    assert sparse_ops._kernels_for(weight) is sparse_triton and sparse_ops._kernels_for(weight.double()) is None

    def gradients():
        torch.manual_seed(0)
        sae = SAEModel(SAEConfig(hidden_size=768, num_latents=3072, top_k=64, total_variance=768.0)).to(DEVICE)
        return torch.autograd.grad(sae(weight[:512]).loss, list(sae.parameters()))

    for one, other in zip(gradients(), gradients(), strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(
        sparse_ops.sparse_decode(values, indices, weight),
        torch.nn.functional.embedding_bag(indices, weight, per_sample_weights=values, mode="sum"),
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_gpu_than_the_current_one():
    """`model.to("cuda:1")` is how people use a second GPU; nothing makes it the current one."""
    values, indices = (tensor.to("cuda:1") for tensor in code(7, 5, 40))
    weight = torch.randn(40, 12, device="cuda:1", requires_grad=True)
    found = sparse_ops.sparse_decode(values, indices, weight)
    expected = torch.zeros(7, 40, device="cuda:1").scatter_(1, indices, values) @ weight
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), weight)[0] for out in (found, expected)))
