"""Numbers at their edges: every setting and every finite row has a defined result, and no NaN leaves the library.

docs/numbers.md says what the results are; each line of it is tested here or where it says so.
"""

import functools
import math

import pytest
import torch
from commands import strictly
from conftest import make_tiny_clip
from hypothesis import example, given, settings
from hypothesis import strategies as st
from toy import make_rows, make_sae
from words import NAMES, make_word_tokenizer

from hf_vs2 import SAEModel, VS2CLIPForZeroShot, calibrate
from hf_vs2.evaluation.comparison import evaluate
from hf_vs2.functional import fvu_per_sample, steer
from hf_vs2.functional.neighbors import pseudo_labels
from hf_vs2.steering.corpus import RetrievalCorpus
from hf_vs2.steering.retrieval import linear_probe


HIDDEN = 32
METHODS = ("centroid", "reconstruct", "amplify", "vs2", "vs2++")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CLASSES = torch.randn(3, 24, generator=torch.Generator().manual_seed(5))

OFTEN = pytest.mark.parametrize("tries", [60, pytest.param(3000, marks=pytest.mark.slow)])


def tried(check, tries: int) -> None:
    """A property tried on so many cases, the same ones every time."""
    settings(max_examples=tries, derandomize=True, deadline=None, database=None)(check)()


@functools.cache
def clip_in(dtype: torch.dtype):
    """A CLIP whose `post_layernorm` has a bias, as trained ones have."""
    clip = make_tiny_clip()
    with torch.no_grad():
        clip.vision_model.post_layernorm.bias.normal_(generator=torch.Generator().manual_seed(3))
    return clip.to(dtype)


@functools.cache
def corpus() -> RetrievalCorpus:
    return RetrievalCorpus.from_store(make_rows(40, HIDDEN, seed=9))


@functools.cache
def sae_of(sizes: tuple[int, int], activation: str, scale: float, dtype: torch.dtype) -> SAEModel:
    num_latents, top_k = sizes
    sae = make_sae(HIDDEN, num_latents=num_latents, top_k=top_k, activation=activation)
    with torch.no_grad():
        sae.W_enc.mul_(scale)
    return sae.to(dtype)


def exact_sae() -> SAEModel:
    """Reconstructs every row exactly: each axis and its opposite, around 0."""
    sae = make_sae(HIDDEN, num_latents=2 * HIDDEN, top_k=HIDDEN)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([torch.eye(HIDDEN), -torch.eye(HIDDEN)]))
        sae.W_dec.copy_(sae.W_enc)
        for tensor in (sae.b_enc, sae.b_pre, sae.mean):
            tensor.zero_()
    return sae


def row(kind: str, scale: float, seed: int, sae: SAEModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "zero":
        return torch.zeros(HIDDEN)
    if kind == "on the mean":
        return sae.mean.clone()
    if kind == "on b_pre":
        return sae.b_pre.detach().float()
    if kind == "constant":
        return torch.full((HIDDEN,), scale)
    if kind == "one entry":
        return torch.zeros(HIDDEN).index_fill(0, torch.tensor([seed % HIDDEN]), scale)
    return scale * (2 * torch.rand(HIDDEN, generator=generator) - 1)


kinds = st.sampled_from(["zero", "on the mean", "on b_pre", "constant", "one entry", "random", "random"])
magnitudes = st.sampled_from([1e-40, 1e-25, 1e-8, 1e-3, 1.0, 30.0, 1e3, 6e4, 1e10, 1e18, 1e25, 3e38])
factors = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 1.5, 1e6, -1e20, 1e38, 1e300]), st.floats(-5, 5, allow_subnormal=False)
)
cases = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(DTYPES),
        "sae_dtype": st.sampled_from([None, torch.float32]),
        "method": st.sampled_from(METHODS),
        "gamma": factors,
        "lambda_": factors,
        "tau": st.sampled_from([None, 0.0, 0.5, 1.0, 20.0, math.inf]),
        "sizes": st.sampled_from([(48, 5), (48, 1), (48, 48), (1, 1)]),
        "activation": st.sampled_from(["relu", "absolute"]),
        "weights": st.sampled_from([0.0, 1e-6, 1.0, 1e4, 1e12]),
        "rows": st.lists(st.tuples(kinds, magnitudes, st.integers(0, 99)), max_size=6),
    }
)


@torch.no_grad()
def check_no_nan(case: dict) -> None:
    clip, dtype = clip_in(case["dtype"]), case["dtype"]
    sae = sae_of(case["sizes"], case["activation"], case["weights"], case["sae_dtype"] or dtype)
    settings = {name: case[name] for name in ("method", "gamma", "lambda_")}
    model = VS2CLIPForZeroShot(clip, sae, **settings, fvu_threshold=case["tau"], num_neighbors=4)
    retrieval = {}
    if case["method"] == "vs2++":
        model.set_corpus(corpus())
        retrieval = {"class_embeds": CLASSES}
    rows = torch.stack([torch.zeros(HIDDEN), *(row(*one, sae) for one in case["rows"])])[1:].to(dtype)
    rows = rows[rows.isfinite().all(-1)]

    plain = clip.visual_projection(clip.vision_model.post_layernorm(rows))
    with model.steering(enabled=False):
        assert torch.equal(model.image_features_from_cls(rows).features.nan_to_num(), plain.nan_to_num())
    moved = model.steer_cls(rows, **retrieval)
    found = model.image_features_from_cls(rows, **retrieval)
    assert moved.rows.isfinite().all() and moved.rows.dtype == dtype and moved.rows.shape == rows.shape
    assert torch.equal(moved.rows[~moved.steered], rows[~moved.steered])
    assert not found.fvu.isnan().any() and (found.fvu >= 0).all()
    usable = plain.isfinite().all(-1)  # CLIP itself overflows on some
    assert found.features[usable].isfinite().all()
    held_back = usable & ~found.steered
    assert torch.equal(found.features[held_back], plain[held_back])


FINITE_BUT_TOO_LONG = {
    "dtype": torch.float32,
    "sae_dtype": None,
    "method": "amplify",
    "gamma": -1e20,
    "lambda_": 0.0,
    "tau": None,
    "sizes": (48, 5),
    "activation": "relu",
    "weights": 0.0,
    "rows": [("zero", 1.0, 0)],
}


@OFTEN
def test_no_nan_leaves_for_finite_rows(tries):
    """A black image, one on the mean, a row near the end of its dtype, gamma 1e38: some answer must come, in a batch of thousands
    most of all. Where the arithmetic ends, that is plain CLIP's, and `steered` says so."""
    check = example(case=FINITE_BUT_TOO_LONG)(
        given(case=cases)(check_no_nan)
    )  # for `post_layernorm`, whose squares overflow
    tried(check, tries)


@pytest.mark.parametrize("method", ["vs2", "centroid"])
def test_a_row_that_overflows_once_moved_stays_as_it_was(method):
    """Rescaled from an infinite length to its own it was 0, and the answer that of no image: "steered", 0.500."""
    sae = sae_of((48, 5), "relu", 1.0, torch.float32)
    model = VS2CLIPForZeroShot(clip_in(torch.float32), sae, method=method, gamma=1e30, gate=None)
    rows = 3 * torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(0))
    moved = model.steer_cls(rows)
    assert not moved.steered.any() and torch.equal(moved.rows, rows)


# Off and gated out


batches = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
        "method": st.sampled_from(METHODS),
        "size": st.integers(1, 6),
        "seed": st.integers(0, 10**6),
        "share": st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]),
        "broken": st.booleans(),
        "off": st.sampled_from([{"enabled": False}, {"method": "none"}]),
    }
)


@torch.no_grad()
def check_gated_out(case: dict) -> None:
    clip = clip_in(case["dtype"])
    sae = sae_of((48, 5), "relu", 1.0, case["dtype"])
    model = VS2CLIPForZeroShot(clip, sae, method=case["method"], num_neighbors=4)
    model.set_corpus(corpus())
    generator = torch.Generator().manual_seed(case["seed"])
    pixel_values = torch.randn(case["size"], 3, 32, 32, generator=generator).to(case["dtype"])
    if case["broken"]:
        pixel_values[0] = torch.nan
    input_ids = torch.tensor([[0, 7, 98], [0, 8, 98], [0, 9, 98]])
    plain = clip(input_ids=input_ids, pixel_values=pixel_values)
    with model.steering(**case["off"]):
        off = model(input_ids=input_ids, pixel_values=pixel_values)
    assert same_bits(off.logits_per_image, plain.logits_per_image)
    assert same_bits(off.image_embeds, plain.image_embeds) and not off.steered.any()

    fvu = model(input_ids=input_ids, pixel_values=pixel_values).fvu
    assert fvu.isnan().tolist() == [case["broken"] and place == 0 for place in range(case["size"])]
    tau = 0.0 if case["share"] == 0 else fvu.nan_to_num(fvu.nanmedian().nan_to_num()).quantile(case["share"]).item()
    model.set_steering(fvu_threshold=tau)
    found = model(input_ids=input_ids, pixel_values=pixel_values)
    assert torch.equal(found.steered, fvu <= tau)
    kept = ~found.steered
    for name in ("image_embeds", "logits_per_image"):
        assert same_bits(found[name][kept], plain[name][kept]), name
        assert found[name][found.steered].isfinite().all()
    features = model.image_features(pixel_values, class_embeds=CLASSES, with_plain=True)
    assert same_bits(features.features[~features.steered], features.plain_features[~features.steered])


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.nan_to_num(), expected.nan_to_num())


@OFTEN
def test_off_and_gated_out_are_clip_bit_for_bit(tries):
    """The promise that makes steering safe to switch on: an image that is not steered has CLIP's own answer, whatever lies beside it."""
    tried(given(case=batches)(check_gated_out), tries // 3 + 5)


# Neutral settings


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["centroid", "vs2", "vs2++"])
@pytest.mark.parametrize("neutral", [{"gamma": 1.0, "lambda_": -7.0}, {"gamma": 9.0, "lambda_": 0.0}])
@torch.no_grad()
def test_gamma_1_and_lambda_0_leave_every_bit(dtype, method, neutral):
    """The neutral corner of a sweep must be the baseline itself, or a rounding difference counts as a gain."""
    model = VS2CLIPForZeroShot(clip_in(dtype), sae_of((48, 5), "relu", 1.0, dtype), method=method, num_neighbors=4)
    model.set_corpus(corpus())
    model.set_steering(**neutral)
    rows = make_rows(50, HIDDEN).to(dtype)
    found = model.steer_cls(rows, class_embeds=CLASSES)
    assert torch.equal(found.rows, rows) and found.steered.all()


@torch.no_grad()
def test_a_negative_lambda_goes_the_other_way():
    """Zero-out (gamma 0) and negation (gamma -1) are steps backwards; lambda's sign must mean the same thing."""
    rows, model = make_rows(20, HIDDEN), VS2CLIPForZeroShot(clip_in(torch.float32), make_sae(HIDDEN))
    for method in ("vs2", "centroid"):
        for gamma in (0.0, -1.0, 1.5):
            model.set_steering(method=method, gamma=gamma, lambda_=-2.0)
            backwards = model.steer_cls(rows).rows
            model.set_steering(gamma=2 - gamma, lambda_=2.0)
            torch.testing.assert_close(model.steer_cls(rows).rows, backwards)


# Where a row ends


@torch.no_grad()
def test_a_row_moved_to_exactly_zero_stays_zero():
    """gamma 0 and lambda 1 take everything out of a row that the SAE reconstructs: there is no direction left to rescale."""
    clip, rows = clip_in(torch.float32), make_rows(4, HIDDEN)
    model = VS2CLIPForZeroShot(clip, exact_sae(), gamma=0.0, lambda_=1.0)
    for method in ("vs2", "centroid"):
        model.set_steering(method=method)
        moved = model.steer_cls(rows)
        assert torch.equal(moved.rows, torch.zeros_like(rows)) and moved.steered.all()
    bias = clip.visual_projection(clip.vision_model.post_layernorm.bias)
    torch.testing.assert_close(model.image_features_from_cls(rows).features, bias.expand(4, -1))


@torch.no_grad()
def test_an_embedding_of_length_zero_scores_zero():
    """CLIP divides it by its length. A NaN score would be the highest or the lowest of all, depending on who sorts."""
    clip = make_tiny_clip()  # its post_layernorm has no bias yet
    model = VS2CLIPForZeroShot(clip, exact_sae(), gamma=0.0, lambda_=1.0)
    out = model(input_ids=torch.tensor([[0, 7, 98], [0, 8, 98]]), pixel_values=torch.randn(2, 3, 32, 32))
    assert out.steered.all() and out.logits_per_image.tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("dtype", "large"), [(torch.float16, 65_000.0), (torch.bfloat16, 3e38), (torch.float32, 3e38)]
)
@torch.no_grad()
def test_a_row_that_would_overflow_is_left_to_clip(dtype, large):
    """One image whose activation is near the end of its dtype must not be lost, nor cost its neighbours their steering."""
    # The rows are steered in float32: what float16 can't hold may still have an FVU.
    model = VS2CLIPForZeroShot(clip_in(dtype), make_sae(HIDDEN), method="amplify", gamma=1e3)
    rows = make_rows(3, HIDDEN).to(dtype)
    alone = model.steer_cls(rows)
    assert alone.steered.all()
    rows[1] = large
    found = model.steer_cls(rows)
    assert found.steered.tolist() == [True, False, True]
    assert torch.equal(found.rows[1], rows[1]) and torch.equal(found.rows[[0, 2]], alone.rows[[0, 2]])
    assert found.fvu[1].isfinite() if dtype == torch.float16 else found.fvu[1] == torch.inf


def test_fvu_has_no_nan_for_finite_rows():
    """Infinity means: no gate but an infinite one. NaN would be stored as a threshold and refused when the SAE is loaded."""
    mean = torch.zeros(4)
    rows = torch.tensor([[0.0] * 4, [1e25] * 4, [3e38] * 4, [1e-40] * 4])
    assert fvu_per_sample(rows, rows.neg(), mean).tolist() == [0.0, math.inf, math.inf, 0.0]
    assert fvu_per_sample(rows, mean.expand(4, -1) + 1, mean).tolist() == [math.inf] * 4


def test_thresholds_hold_no_nan():
    """float32 squares overflow beyond 1e19. A NaN threshold would steer nothing and say nothing."""
    sae = make_sae(HIDDEN)
    metrics = calibrate(sae, 1e25 * make_rows(300, HIDDEN))
    assert not any(map(math.isnan, sae.config.fvu_quantiles.values())) and math.isfinite(metrics["fvu"])


# Sizes


@pytest.mark.parametrize("sizes", [(1, 1), (48, 1), (48, 48)])
@pytest.mark.parametrize("activation", ["relu", "absolute"])
@torch.no_grad()
def test_one_latent_and_all_latents_are_the_formula(sizes, activation):
    """top_k at both ends, where top-k kernels and the sparse decoder have their corners."""
    sae = sae_of(sizes, activation, 1.0, torch.float32)
    rows = make_rows(7, HIDDEN)
    out = sae(rows)
    dense = (rows - sae.b_pre) @ sae.W_enc.T + sae.b_enc
    if activation == "relu":
        dense = dense.relu()
    kept = dense.abs().topk(sizes[1], dim=-1).indices
    code = torch.zeros_like(dense).scatter(1, kept, dense.gather(1, kept))
    torch.testing.assert_close(out.reconstruction, code @ sae.W_dec + sae.b_pre)


@pytest.mark.parametrize("total_variance", [None, 4.0])
def test_the_loss_of_no_rows_is_zero(total_variance):
    """A process whose part of the last batch is empty: a mean over nothing would turn its gradients, and everybody's, into NaN."""
    sae = make_sae(HIDDEN, total_variance=total_variance)
    out = sae(torch.empty(0, HIDDEN), dead_latents=torch.ones(4 * HIDDEN, dtype=torch.bool))
    assert out.loss.item() == 0.0 and out.fvu.shape == (0,) and out.reconstruction.shape == (0, HIDDEN)
    out.loss.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in sae.parameters())


def test_rows_on_the_mean_calibrate_nothing():
    """An FVU of 0 would say that the SAE is perfect; what was measured is nothing."""
    sae = make_sae(HIDDEN)
    quantiles = sae.config.fvu_quantiles
    with pytest.raises(ValueError, match="lie on the mean of the training rows: they have no variance"):
        calibrate(sae, sae.mean.repeat(300, 1))
    assert sae.config.fvu_quantiles == quantiles


def test_nothing_to_label_with_and_broken_embeddings_are_refused():
    """An IndexError from deep inside, or a probe made of NaN, tells nobody what to do."""
    with pytest.raises(ValueError, match="no classes to label images with: class_embeds is empty"):
        pseudo_labels(torch.ones(2, 3), torch.empty(0, 3))
    embeds = torch.ones(5, 3)
    embeds[3, 1] = torch.nan
    with pytest.raises(ValueError, match="Row 3 of embeds holds NaN or infinity"):
        linear_probe(embeds, torch.zeros(5, dtype=torch.int64), 2)
    weight, bias = linear_probe(torch.ones(5, 3), torch.zeros(5, dtype=torch.int64), 1)
    assert weight.isfinite().all() and bias.isfinite().all(), "one class only"


HALVES = [0, 1, 0, 1, 0, 1]
EVALUATED = {
    "one image": (make_rows(1, HIDDEN), [1], NAMES[:2]),
    "one class": (make_rows(6, HIDDEN), [0] * 6, NAMES[:1]),
    "all images the same": (make_rows(1, HIDDEN).expand(6, -1), HALVES, NAMES[:2]),
    "all images on the mean": (make_sae(HIDDEN).mean.expand(6, -1), HALVES, NAMES[:2]),
    "black images": (torch.zeros(6, HIDDEN), HALVES, NAMES[:2]),
}


@pytest.mark.parametrize("kind", EVALUATED)
def test_tables_of_degenerate_sets_hold_numbers(kind, tmp_path):
    """A result file with NaN in it can't be read by other JSON parsers, and a NaN gain can't be compared."""
    rows, labels, names = EVALUATED[kind]
    model = VS2CLIPForZeroShot(clip_in(torch.float32), make_sae(HIDDEN), fvu_threshold=20.0)
    tokenizer = make_word_tokenizer()
    result = evaluate(model, rows, labels, names, tokenizer, templates="single", num_resamples=50)
    text = result.to_json(tmp_path / "results.json").read_text(encoding="utf-8")
    strictly(text)
    for line in result.rows:
        assert 0 <= line["top1"] <= 100 and 0 <= line["coverage"] <= 1
        assert all(map(math.isfinite, [line["gain"], *line["gain_ci"]]))
    if kind == "one class":
        assert {line["top1"] for line in result.rows} == {100.0}


def test_steer_is_finite_over_the_range_it_promises():
    """The bare function has no fallback: from 1e-18 to 1e15 it needs none."""
    generator = torch.Generator().manual_seed(0)
    for exponent in range(-18, 16):
        x = 10.0**exponent * torch.randn(50, 64, generator=generator)
        moved = steer(x, 3 * torch.randn(50, 64, generator=generator) * x.abs().max(), 2.1)
        torch.testing.assert_close(moved.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0)
