"""The equations hold for any SAE, trained or not: these are identities of the paper, checked to float error."""

import numpy as np
import numpy_reference as reference
import pytest
import torch
from toy import make_rows, make_sae

from hf_vs2.functional import equations as functional


GAMMA, LAMBDA = 1.5, 2.1


@pytest.fixture(params=["relu", "absolute"])
def sae(request):
    """A random SAE in float64, so that identities can be told from approximations."""
    return make_sae(activation=request.param).double()


@pytest.fixture()
def x():
    return make_rows(9).double()


def test_no_nan_from_rows_of_zero_length():
    """An all-black image must not turn a batch into NaN, in the result or in the gradient of the others."""
    x = torch.stack([torch.zeros(4), torch.ones(4), torch.ones(4)]).requires_grad_()
    direction = torch.stack([torch.ones(4), -torch.ones(4), torch.ones(4)])
    moved = functional.steer(x, direction, 1.0)
    assert torch.equal(moved, torch.stack([torch.zeros(4), torch.zeros(4), torch.ones(4)]))
    moved[2].sum().backward()
    assert x.grad[2].isfinite().all()


def test_top_k_follows_its_sign_rule():
    """The two rules of eq. 1 choose different latents; a checkpoint trained with one is wrong under the other."""
    pre = torch.tensor([[0.5, -3.0, 2.0, -0.1]])
    for activation, expected in (("relu", {2: 2.0, 0: 0.5}), ("absolute", {1: -3.0, 2: 2.0})):
        values, indices = functional.top_k(pre, 2, activation)
        assert dict(zip(indices[0].tolist(), values[0].tolist(), strict=True)) == expected
    values, _ = functional.top_k(-torch.ones(1, 4), 2, "relu")
    assert values.tolist() == [[0.0, 0.0]], "a row with nothing positive has an empty code"
    with pytest.raises(ValueError, match=r"activation must be one of .*'relu'.*not 'gelu'"):
        functional.top_k(pre, 2, "gelu")


def test_fvu_at_its_edges_and_the_gate():
    """A row on the mean divides by zero and a broken image is NaN: neither may pass the gate by accident."""
    mean = torch.tensor([1.0, 2.0])
    x = torch.stack([mean, mean, mean + 2, torch.tensor([float("nan"), 0.0]), torch.tensor([float("inf"), 0.0])])
    reconstruction = torch.stack([mean, mean + 1, mean + 1, mean, mean])
    fvu = functional.fvu_per_sample(x, reconstruction, mean)
    assert fvu[:3].tolist() == [0.0, float("inf"), 0.25]
    assert fvu[3:].isnan().all()
    assert functional.gate(fvu, 0.25).tolist() == [True, False, True, False, False], "tau itself still passes"
    assert functional.gate(fvu, float("inf")).tolist() == [True, True, True, False, False]


def test_fvu_of_half_precision_rows_is_summed_in_float32():
    """bfloat16 sums over 768 features are off by per cents, more than the distance between two quantiles."""
    x = make_rows(20, 768).bfloat16()
    reconstruction = (x + 0.1 * make_rows(20, 768, seed=1)).bfloat16()
    mean = x.float().mean(0)
    exact = functional.fvu_per_sample(x.double(), reconstruction.double(), mean.double())
    torch.testing.assert_close(functional.fvu_per_sample(x, reconstruction, mean), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("gamma", [1.7, "per latent"])
def test_contrastive_direction_is_eq_5(sae, x, gamma):
    """VS2++ must be the paper's difference of dense means, and a query whose neighbours all agree has no negatives: mean 0, not NaN."""
    if gamma == "per latent":
        gamma = 1 + make_rows(1, sae.config.num_latents)[0].double()
    values, indices = (tensor.detach() for tensor in sae.encode(x))
    codes = torch.zeros(len(x), sae.config.num_latents, dtype=x.dtype).scatter_(1, indices, values).numpy()
    neighbors = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, 8, 0], [1, 1, 1, 2, 2], [8, 7, 6, 5, 4]])
    positive = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    found = functional.contrastive_direction(
        values[neighbors], indices[neighbors], positive, sae.W_dec.detach(), gamma
    )
    for row, (chosen, mask) in enumerate(zip(neighbors.numpy(), positive.numpy(), strict=True)):
        expected = reference.contrastive_direction(
            list(codes[chosen[mask]]), list(codes[chosen[~mask]]), sae.W_dec.detach().numpy(), np.asarray(gamma)
        )
        np.testing.assert_allclose(found[row].numpy(), expected, rtol=1e-12, atol=1e-12)


def test_contrastive_direction_is_differentiable_where_neighbors_share_latents(sae, x):
    """Neighbours are alike, so the same latent is active in several of them: its direction's gradient is the sum, not the last."""
    values, indices = (tensor.detach() for tensor in sae.encode(x[:6]))
    values, indices = values.view(2, 3, -1).repeat(1, 2, 1), indices.view(2, 3, -1).repeat(1, 2, 1)
    positive = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 0, 1, 1, 1, 1]]).bool()
    gamma = torch.full((sae.config.num_latents,), GAMMA, dtype=x.dtype, requires_grad=True)

    def direction(values, decoder, gamma):
        return functional.contrastive_direction(values, indices, positive, decoder, gamma)

    inputs = (values.requires_grad_(), sae.W_dec.detach().clone().requires_grad_(), gamma)
    assert torch.autograd.gradcheck(direction, inputs, check_batched_grad=False)
    with torch.no_grad():
        alone = direction(*inputs)
    torch.testing.assert_close(direction(*inputs), alone, rtol=1e-12, atol=1e-12)


def test_steering_is_differentiable_in_everything_it_uses(sae, x):
    """Learning gamma, or training a CLIP through the steering, needs the exact gradient and not just some gradient."""
    values, indices = (tensor.detach() for tensor in sae.encode(x[:3]))
    gamma = torch.full((sae.config.num_latents,), GAMMA, dtype=x.dtype, requires_grad=True)
    decoder = sae.W_dec.detach().clone().requires_grad_()

    def steered(row, values, decoder, gamma):
        return functional.steer(row, functional.steering_vector(values, indices, decoder, gamma), LAMBDA)

    row = x[:3].clone().requires_grad_()
    assert torch.autograd.gradcheck(steered, (row, values.requires_grad_(), decoder, gamma), check_batched_grad=False)


def dense_alignment(values, indices, labels, num_latents):
    """Mean squared distance of each row's dense latents to the mean of its class, row by row."""
    dense = torch.zeros(len(values), num_latents, dtype=values.dtype).scatter(1, indices, values)
    distances = [
        (row - dense[labels == label].mean(0)).square().sum()
        for row, label in zip(dense, labels, strict=True)
        if label >= 0
    ]
    return torch.stack(distances).mean()


@pytest.mark.parametrize("labels", [[0, 0, 0, 0, 0, 0, 0], [3, 900, 3, 5, 900, 3, 900], [2, -1, 2, 0, -1, 0, 2]])
def test_prototype_alignment_is_the_distance_to_the_class_means(labels):
    """The expanded form, for one class, for classes far apart in number, and with rows of unknown class; and its gradient."""
    labels = torch.tensor(labels)
    draw = torch.Generator().manual_seed(0)
    indices = torch.rand(7, 11, generator=draw).topk(4).indices
    values = torch.randn(7, 4, generator=draw, dtype=torch.float64).requires_grad_()
    ours = functional.prototype_alignment(values, indices, labels)
    dense = dense_alignment(values, indices, labels, 11)
    torch.testing.assert_close(ours, dense, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, values)[0] for loss in (ours, dense)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(lambda v: functional.prototype_alignment(v, indices, labels), values)
    assert (gradients[0][labels < 0] == 0).all(), "a row of unknown class is left out"


def test_prototype_alignment_has_nothing_to_align_in_some_batches():
    """A batch without labels, or with every class once, must add nothing; half precision must not lose the difference."""
    values, indices = torch.rand(5, 3, requires_grad=True), torch.rand(5, 8).topk(3).indices
    for labels in (torch.full((5,), -1), torch.arange(5)):
        loss = functional.prototype_alignment(values, indices, labels)
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-6) and values.grad.abs().max() < 1e-6
    near = (30 + torch.randn(64, 3)).to(torch.bfloat16)
    labels, indices = torch.zeros(64, dtype=torch.int64), torch.arange(3).expand(64, 3)
    expected = near.double().var(0, correction=0).sum().item()
    assert functional.prototype_alignment(near, indices, labels).item() == pytest.approx(expected, rel=1e-3)
