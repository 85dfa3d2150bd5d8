"""The SAE of eq. 1: right numbers, right gradients, and a checkpoint that comes back bit for bit."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy_reference import ReferenceSAE
from recorders import Recorder
from toy import make_rows, make_sae
from transformers import AutoModel, Trainer, TrainingArguments

from hf_vs2 import SAEConfig, SAEModel
from hf_vs2.functional import sparse_ops
from hf_vs2.sae import modeling as modeling_sae


PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_pre")


@pytest.fixture(params=[1.0, 0.0], ids=["sparse", "dense"])
def backward(request, monkeypatch):
    """Both sides of the switch between sparse and dense backward."""
    monkeypatch.setattr(sparse_ops, "sparse_limit", lambda weight: request.param)


def gradients(sae, loss):
    sae.zero_grad()
    loss.backward()
    return {name: getattr(sae, name).grad.clone() for name in PARAMETERS}


def naive_loss(sae, x, dead=None):
    """The loss as the papers print it, by dense autograd: no sparse operation, nothing of ours but the weights."""
    config = sae.config
    pre = (x - sae.b_pre) @ sae.W_enc.t() + sae.b_enc

    def dense_code(pre, k):
        pre = pre.relu() if config.activation == "relu" else pre
        return torch.zeros_like(pre).scatter(1, pre.abs().topk(k).indices, 1) * pre

    error = x - dense_code(pre, config.top_k) @ sae.W_dec - sae.b_pre
    scale = config.total_variance or (x - x.mean(0)).square().sum(-1).mean()
    loss = error.square().sum(-1).mean() / scale
    if dead is not None:
        k = min(config.aux_k, int(dead.sum()))
        pre = (x - sae.b_pre.detach()) @ sae.W_enc[dead].t() + sae.b_enc[dead]
        missing = error.detach() - dense_code(pre, k) @ sae.W_dec[dead]
        loss = loss + config.aux_k_coefficient * k / config.aux_k * missing.square().sum(-1).mean() / scale
    return loss


# Values


@pytest.mark.parametrize("activation", ["relu", "absolute"])
def test_numpy_reference_agrees(activation):
    """Eq. 1 and the per-sample FVU, against loops that were written from the paper alone."""
    sae, x = make_sae(activation=activation), make_rows(12)
    out = sae(x)
    plain = ReferenceSAE.of(sae)
    code = torch.zeros(12, sae.config.num_latents).scatter(1, out.latent_indices, out.latent_values).detach().numpy()
    for i, row in enumerate(x.double().numpy()):
        expected = plain.encode(row)
        np.testing.assert_allclose(code[i], expected, atol=1e-5)
        np.testing.assert_allclose(out.reconstruction[i].detach().numpy(), plain.decode(expected), atol=1e-5)
        np.testing.assert_allclose(out.fvu[i].item(), plain.fvu(row), rtol=1e-5)
    assert out.fvu.dtype == torch.float32 and not out.fvu.requires_grad


def test_without_total_variance_the_loss_is_the_fvu_of_the_batch():
    """Someone who trains by hand, without statistics, still minimises the fraction of variance unexplained."""
    sae, x = make_sae(), make_rows(64)
    out = sae(x)
    expected = (x - out.reconstruction).square().sum() / (x - x.mean(0)).square().sum()
    torch.testing.assert_close(out.loss, expected)


def test_a_new_sae_starts_tied_with_unit_directions():
    """Gao et al.'s initialisation; without it many latents are dead from the start."""
    sae = SAEModel(SAEConfig(hidden_size=32, top_k=4))
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(128))
    assert torch.equal(sae.W_enc, sae.W_dec) and sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    assert not sae.b_enc.any() and not sae.b_pre.any() and not sae.mean.any()


def test_return_dict_false_gives_a_tuple():
    """transformers' convention."""
    sae, x = make_sae(), make_rows(3)
    found, expected = sae(x, return_dict=False), sae(x)
    assert isinstance(found, tuple) and len(found) == len(expected) == 5
    assert all(torch.equal(one, other) for one, other in zip(found, expected.to_tuple(), strict=True))


@pytest.mark.parametrize("shape", [(16,), (4, 17), (2, 3, 16)])
def test_rows_of_another_shape_are_refused(shape):
    """Activations of another CLIP, or all its tokens at once, must not be broadcast into nonsense."""
    sae = make_sae(base_model_name_or_path="openai/clip-vit-base-patch32")
    expected = rf"rows of width 16, so x must be \(batch, 16\); it is .*{shape[-1]}.*openai/clip-vit-base-patch32"
    with pytest.raises(ValueError, match=expected):
        sae(torch.zeros(shape))


# Gradients


@pytest.mark.parametrize("activation", ["relu", "absolute"])
@pytest.mark.parametrize("top_k", [5, 60], ids=["few", "more than are positive"])
def test_gradients_are_those_of_the_formula(backward, activation, top_k):
    """With k above the number of positive pre-activations, `sparsify` trains latents through zeros that ReLU cut off."""
    sae, x = make_sae(activation=activation, top_k=top_k, num_latents=64, total_variance=2.0), make_rows(20)
    if top_k == 60 and activation == "relu":
        assert (sae.encode(x)[0] == 0).any(), "the case needs cut-off latents among the chosen"
    check_gradients(gradients(sae, sae(x).loss), gradients(sae, naive_loss(sae, x)))


def check_gradients(found, expected):
    """Within 1e-5 of the length of the whole gradient of each parameter."""
    for name in PARAMETERS:
        assert (found[name] - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.fixture(params=[True, False], ids=["counted", "masked"])
def dead_latents_counted(request, monkeypatch):
    """Both ways to the dead latents: a CPU's, and the one for devices that should not be waited for."""
    monkeypatch.setattr(modeling_sae, "_counting_is_free", lambda device: request.param)


@pytest.mark.parametrize("number_dead", [30, 3], ids=["more than aux_k", "fewer than aux_k"])
@pytest.mark.parametrize("activation", ["relu", "absolute"])
def test_aux_k_gradient_is_that_of_the_formula(backward, dead_latents_counted, activation, number_dead):
    """AuxK whose gradient never reaches the encoder (a bug of `sparsify` since 2025) looks fine and revives nothing."""
    sae, x = make_sae(activation=activation, num_latents=64, aux_k=6, total_variance=2.0), make_rows(20)
    dead = torch.zeros(64, dtype=torch.bool)
    dead[10 : 10 + number_dead] = True
    loss, expected_loss = sae(x, dead_latents=dead).loss, naive_loss(sae, x, dead)
    torch.testing.assert_close(loss, expected_loss)
    check_gradients(gradients(sae, loss), gradients(sae, expected_loss))


@pytest.mark.parametrize("dead", ["none", "all", "fewer than aux_k"])
def test_aux_k_at_its_edges(dead_latents_counted, dead):
    """The first steps (nobody dead), a collapse (all dead) and the last survivors must not crash or divide by zero."""
    sae, x = make_sae(num_latents=64, aux_k=6), make_rows(8)
    number = {"none": 0, "all": 64, "fewer than aux_k": 2}[dead]
    out = sae(x, dead_latents=torch.arange(64) < number)
    out.loss.backward()
    assert out.loss.isfinite() and sae.W_enc.grad.isfinite().all()
    if not number:
        assert out.loss.item() == sae(x).loss.item()


@pytest.mark.parametrize("rows_at_once", [256, 7], ids=["one block", "several blocks"])
def test_decoder_norm_and_parallel_gradient(monkeypatch, rows_at_once):
    """For a training loop of one's own: unit directions, and no Adam momentum spent on lengths that are undone."""
    monkeypatch.setattr(modeling_sae, "_CACHED_ROWS", rows_at_once)
    sae, x = make_sae(), make_rows(30)
    with pytest.raises(RuntimeError, match="after backward"):
        sae.remove_parallel_decoder_gradient()
    with torch.no_grad():
        sae.W_dec[3] = 0
    sae(x).loss.backward()
    before = sae.W_dec.grad.clone()
    sae.remove_parallel_decoder_gradient()
    torch.testing.assert_close((sae.W_dec.grad * sae.W_dec).sum(-1), torch.zeros(64), rtol=0, atol=2e-5)
    along = (before * F.normalize(sae.W_dec, dim=-1)).sum(-1, keepdim=True) * F.normalize(sae.W_dec, dim=-1)
    torch.testing.assert_close(sae.W_dec.grad, before - along, msg="only the parallel part may go")

    directions = F.normalize(sae.W_dec.detach(), dim=-1)
    sae.normalize_decoder()
    expected = torch.ones(64)
    expected[3] = 0
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), expected)
    torch.testing.assert_close(sae.W_dec.detach(), directions)


def test_decode_never_makes_a_batch_by_latents_tensor():
    """At 49,152 latents such a tensor is 800 MB for a batch of 4,096; nor one of (batch, top_k, hidden)."""
    batch, hidden, latents, k = 64, 32, 800, 20
    sae = make_sae(hidden, num_latents=latents, top_k=k)
    values, indices = (tensor.detach() for tensor in sae.encode(make_rows(batch, hidden)))
    values.requires_grad_()
    assert batch * hidden < latents * hidden < batch * k * hidden < batch * latents
    with Recorder() as forward:
        reconstruction = sae.decode(values, indices)
    with Recorder() as backward:
        reconstruction.square().sum().backward()
    with Recorder() as inference, torch.no_grad():
        sae.decode(values, indices)
    assert values.grad is not None and sae.W_dec.grad.any()
    assert "aten._embedding_bag_per_sample_weights_backward.default" in backward.operations, (
        "the backward was not seen"
    )
    # The gradient of W_dec itself is the largest thing there has to be.
    assert max(forward.largest, inference.largest, backward.largest) <= latents * hidden


# Precision


def test_autocast_trains_in_bfloat16_with_float32_statistics():
    """Mixed precision must give the same loss up to bfloat16, and gradients in the parameters' own precision."""
    sae, x = make_sae(32, top_k=8, total_variance=30.0), make_rows(128, 32)
    dead = torch.arange(128) < 40
    exact_loss = sae(x, dead_latents=dead).loss
    exact = gradients(sae, exact_loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sae(x, dead_latents=dead)
        assert sae.encode(x)[0].dtype == torch.bfloat16, "autocast has no effect: the test shows nothing"
    assert out.loss.dtype == out.fvu.dtype == torch.float32
    torch.testing.assert_close(out.loss, exact_loss, rtol=0.02, atol=0)
    for name, gradient in gradients(sae, out.loss).items():
        assert gradient.dtype == torch.float32
        assert F.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0) > 0.99, name


@pytest.mark.parametrize(
    "cast", [lambda sae: sae.to(torch.bfloat16), lambda sae: sae.half(), lambda sae: sae.to("cpu", torch.bfloat16)]
)
def test_the_mean_stays_float32_whatever_the_weights_become(cast):
    """A mean rounded to bfloat16 shifts every FVU, and with it which images the gate lets through."""
    sae = make_sae()
    mean = sae.mean.clone()
    cast(sae)
    assert sae.W_enc.dtype == sae.dtype != torch.float32
    assert sae.mean.dtype == torch.float32 and torch.equal(sae.mean, mean)
    assert sae(make_rows(3)).fvu.isfinite().all()
    sae.float()
    assert sae.mean.dtype == torch.float32 and torch.equal(sae.mean, mean)


# Checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("auto", [SAEModel, AutoModel])
def test_round_trip_is_bit_exact(tmp_path, dtype, auto):
    """A checkpoint that comes back rounded, or in another dtype, gives other thresholds than it was calibrated with."""
    sae = make_sae(fvu_quantiles={"0.9": 0.1}, gate=0.9, total_variance=0.3).to(dtype)
    sae.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is SAEModel and not loaded.training
    assert loaded.config.fvu_quantiles == {"0.9": 0.1} and loaded.config.total_variance == 0.3
    for name, tensor in sae.state_dict().items():
        other = loaded.state_dict()[name]
        assert other.dtype == tensor.dtype and torch.equal(other, tensor), name
    x = make_rows(5)
    assert torch.equal(loaded(x).reconstruction, sae(x).reconstruction)


@pytest.mark.parametrize("missing", ["mean", "b_enc", "W_enc"])
def test_a_missing_tensor_leaves_no_garbage(missing):
    """from_pretrained builds on the meta device: what `state_dict=` lacks must be initialised, and nothing else touched."""
    sae = make_sae()
    state = dict(sae.state_dict())
    del state[missing]
    loaded = SAEModel.from_pretrained(None, config=sae.config, state_dict=state)
    for name, tensor in sae.state_dict().items():
        if name != missing:
            assert torch.equal(loaded.state_dict()[name], tensor), name
    found = loaded.state_dict()[missing]
    assert torch.equal(found, sae.W_dec) if missing == "W_enc" else not found.any()


def test_transformers_trainer_tells_the_eval_loss(tmp_path):
    """Early stopping and the choice of the best model go by `eval_loss`; a model without labels must still have one."""
    sae, x = make_sae(total_variance=2.0), make_rows(8)
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True
    )
    found = Trainer(sae, arguments, eval_dataset=[{"x": row} for row in x]).evaluate()
    assert found["eval_loss"] == pytest.approx(sae(x).loss.item(), rel=1e-5)
    assert sae(x, return_loss=False).loss is None


# torch.compile


def compiled_equals_eager(backend):
    torch.compiler.reset()
    sae, x = make_sae(total_variance=2.0), make_rows(6)
    compiled = torch.compile(lambda x: sae.decode(*sae.encode(x)), backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), sae.decode(*sae.encode(x)))
    expected = gradients(sae, (sae.decode(*sae.encode(x)) - x).square().sum())
    found = gradients(sae, (compiled(x) - x).square().sum())
    for name in PARAMETERS:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    forward = torch.compile(sae, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(forward(x).fvu, sae(x).fvu)


@pytest.mark.slow
def test_compiles_whole_with_the_same_gradients():
    """A graph break in encode or decode would show only as lost speed; a wrong gradient not at all."""
    compiled_equals_eager("aot_eager")


@pytest.mark.slow
def test_inductor_compiles_it():
    """The backend that people use; it needs a C++ compiler."""
    compiled_equals_eager("inductor")
