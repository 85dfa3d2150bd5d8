"""The gate keeps its promise: of fresh in-domain images, the stated share is steered. Figures from SAEs really trained."""

import math

import pytest
import torch
from toy import clip_like_rows, make_rows, make_sae
from trainings import make_store, make_trainer

from hf_vs2 import SAEConfig, VS2CLIPForZeroShot, calibrate, measure_statistics
from hf_vs2.data.stores.rows import rows_of
from hf_vs2.functional import equations as functional
from hf_vs2.training import calibration
from hf_vs2.training.calibration import activation_statistics, conformal_quantiles, split_rows


HIDDEN = 48


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """num_rows -> list of (trainer after training, its rows), one for each seed."""

    def train(num_rows, seed):
        rows = clip_like_rows(num_rows, HIDDEN, seed=seed)
        settings = {"max_steps": 200, "per_device_train_batch_size": 128, "seed": seed}
        config = SAEConfig(hidden_size=HIDDEN, top_k=8)
        trainer = make_trainer(tmp_path_factory.mktemp("sae"), rows, model=config, **settings)
        trainer.train()
        return trainer, rows

    return {num_rows: [train(num_rows, seed) for seed in range(seeds)] for num_rows, seeds in ((500, 5), (20_000, 2))}


@torch.no_grad()
def share_passing(sae, threshold):
    """Of 10,000 rows nobody has seen, the share under the threshold."""
    return functional.gate(sae(clip_like_rows(10_000, HIDDEN, seed=999)).fvu, threshold).float().mean().item()


@pytest.mark.parametrize("num_rows", [500, 20_000])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
def test_the_stated_share_of_fresh_rows_passes_the_gate(trained, num_rows, level):
    """`gate=0.95` means that 95 % of images like the training ones are steered, with many rows and with few."""
    runs = trained[num_rows]
    shares = [share_passing(trainer.model, trainer.model.fvu_threshold(level)) for trainer, _ in runs]
    # Over draws of n held-out rows the share is Beta((n + 1) q, (n + 1) (1 - q)): mean q, or more by rounding up to 1/n.
    n = runs[0][0].model.config.num_calibration_rows
    deviation = math.sqrt(level * (1 - level) / n / len(shares))
    assert level - 3 * deviation < sum(shares) / len(shares) < level + 1 / n + 3 * deviation, shares


def test_the_gate_turns_away_another_domain(trained):
    """What the gate is for: rows without the structure that the SAE has learnt."""
    sae = trained[20_000][0][0].model
    world = clip_like_rows(2_000, HIDDEN, seed=3)
    foreign = world.mean(0) + world.std(0) * torch.randn(2_000, HIDDEN, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert functional.gate(sae(foreign).fvu, sae.fvu_threshold(0.99)).float().mean() < 0.05


def test_conformal_rank_in_closed_form():
    """The ceil((n + 1) q)-th smallest of n: the 10th of 10 for 0.9, the 180th of 199 for 0.9, and none for 0.99 from 50."""
    values = torch.arange(1.0, 11.0).flip(0)
    assert conformal_quantiles(values, (0.5, 0.9, 0.95)) == {"0.5": 6.0, "0.9": 10.0}
    assert conformal_quantiles(torch.arange(1.0, 200.0), (0.9, 0.99)) == {"0.9": 180.0, "0.99": 198.0}
    # 0.99 * 100 is 99.00000000000001 in no rounding mode anyone wants: the 99th of 99 vouches for 0.99.
    assert conformal_quantiles(torch.arange(1.0, 100.0), (0.99,)) == {"0.99": 99.0}
    assert conformal_quantiles(torch.arange(50.0), (0.99,)) == {}
    assert conformal_quantiles(torch.ones(3)) == dict.fromkeys([str(p / 100) for p in range(1, 76)], 1.0)


def test_rows_that_the_sae_does_not_read_are_refused(tmp_path):
    """Thresholds of another layer, or of a mask read as the rows 0 and 1, would gate without a word."""
    sae, rows = make_sae(32, layer=1, total_variance=1.0, base_model_fingerprint=[0.5, 0.25]), torch.randn(60, 32)
    for changed, message in (({"layer": 2}, "layer 2, the SAE reads layer 1|no layer 1|not 1"), ({}, "another CLIP")):
        about = {"layer": 1} | changed
        fingerprint = [0.5, 0.25] if changed else [9.0, 9.0]
        store = make_store(tmp_path / f"store{len(changed)}", rows, base_model_fingerprint=fingerprint, **about)
        for measure in (calibrate, measure_statistics):
            with pytest.raises(ValueError, match=message):
                measure(sae, store)
    with pytest.raises(ValueError, match="indices must be a vector of row numbers, not torch.bool"):
        calibrate(sae, rows, rows[:, 0] > 0)
    calibrate(sae, rows, list(range(20)))
    assert sae.config.num_calibration_rows == 20


def test_few_rows_lower_the_default_gate_and_say_so(tiny_clip, caplog):
    """Forty images can't vouch for the 0.99 quantile. A gate that pretended to would be wrong, an error would stop a demo."""
    sae = make_sae(32)
    assert sae.config.gate == 0.99
    calibrate(sae, make_rows(40, 32))
    assert sae.config.gate == 0.97 and sae.config.num_calibration_rows == 40
    assert "40 held-out rows can't vouch for the 0.99 quantile; the default gate is set to 0.97" in caplog.text
    VS2CLIPForZeroShot(tiny_clip, sae, gate=sae.config.gate)

    calibrate(sae, make_rows(1, 32))
    assert sae.config.gate == 0.5
    caplog.clear()
    calibrate(make_sae(32), make_rows(1000, 32))
    assert not caplog.text, "enough rows: nothing to say"


def test_metrics_are_those_of_the_whole_set():
    """FVU of a data set is a ratio of sums; the mean of batch FVUs, or of per-sample ones, is another number."""
    sae, rows = make_sae(activation="relu", top_k=40), make_rows(9000)
    metrics = calibrate(sae, rows)
    with torch.no_grad():
        out = sae(rows)
    error, spread = (rows - out.reconstruction).double(), (rows - sae.mean).double()
    assert metrics["fvu"] == pytest.approx((error.square().sum() / spread.square().sum()).item(), rel=1e-6)
    assert metrics["l0"] == pytest.approx((out.latent_values > 0).sum().item() / 9000, rel=1e-6)
    assert metrics["l0"] < 40, "latents that ReLU cut off are not active"
    assert sae.config.fvu_quantiles == conformal_quantiles(out.fvu)
    some = torch.arange(100, 400)
    calibrate(sae, rows, some)
    assert sae.config.fvu_quantiles == conformal_quantiles(out.fvu[some])


def test_statistics_keep_their_digits():
    """CLIP's mean is large beside the deviations: sums of squares in float32 would lose them altogether."""
    rows = 1000 + 0.01 * torch.randn(10_000, 8, generator=torch.Generator().manual_seed(0))
    chosen = torch.arange(0, 10_000, 3)
    mean, total_variance = activation_statistics(rows_of(rows), chosen)
    exact = rows[chosen].double()
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean.double(), exact.mean(0), rtol=1e-7, atol=0)
    assert total_variance == pytest.approx(exact.var(0, correction=0).sum().item(), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_that_differ_by_rounding_are_all_the_same(dtype):
    """One image copied: its rows differ in the last digits with their place in a batch, and an SAE would learn that
    noise."""
    dice = torch.Generator().manual_seed(0)
    one = torch.randn(32, generator=dice) + 3
    one[0] = 1 + torch.finfo(dtype).eps / 2  # between two numbers of that type
    copies = (one * (1 + 1e-6 * torch.randn(300, 32, generator=dice))).to(dtype)
    assert (copies != copies[0]).any(), "the test would show nothing"
    assert activation_statistics(rows_of(copies), torch.arange(300))[1] == 0
    sae = make_sae(32)
    sae.mean.copy_(copies.float().mean(0))
    with pytest.raises(ValueError, match="lie on the mean of the training rows"):
        calibrate(sae, copies)
    alike = (one + 0.1 * torch.randn(300, 32, generator=dice)).to(dtype)  # frames of a film, say
    assert activation_statistics(rows_of(alike), torch.arange(300))[1] == pytest.approx(32 * 0.1**2, rel=0.1)


@pytest.mark.parametrize(
    ("num_rows", "expected"), [(4, 0), (20, 4), (500, 100), (1500, 200), (4000, 200), (20_000, 1000)]
)
def test_held_out_rows_are_few_random_and_disjoint(num_rows, expected):
    """A row in both halves would spoil the calibration; the first rows of a data set are all of one class."""
    train, held_out = split_rows(num_rows, 0.05, seed=0)
    assert len(held_out) == expected
    assert torch.equal(torch.cat([train, held_out]).sort().values, torch.arange(num_rows))
    assert torch.equal(train, train.sort().values)
    if expected > 50:
        assert held_out.float().mean().item() == pytest.approx(num_rows / 2, rel=0.2)
        assert not torch.equal(split_rows(num_rows, 0.05, seed=1)[1], held_out)
    assert torch.equal(split_rows(num_rows, 0.05, seed=0)[1], held_out)
    assert len(split_rows(num_rows, 0.0, seed=0)[1]) == 0


def test_a_held_out_row_on_the_mean_leaves_a_checkpoint_that_loads(tmp_path):
    """Its FVU is infinite: as a threshold it would be a gate that is none, in a config.json that is refused."""
    sae, rows = make_sae(), make_rows(300)
    rows[7] = sae.mean
    calibrate(sae, rows)
    assert sae.config.fvu_quantiles and all(map(math.isfinite, sae.config.fvu_quantiles.values()))
    assert "0.995" not in sae.config.fvu_quantiles and "0.99" in sae.config.fvu_quantiles
    sae.save_pretrained(tmp_path)
    assert type(sae).from_pretrained(tmp_path).fvu_threshold(0.99) == sae.fvu_threshold(0.99)


def test_a_very_wide_sae_is_calibrated_a_few_rows_at_a_time(monkeypatch):
    """All latents of a block are in memory before the top-k: with millions of them, a thousand rows would be too many."""
    sae, rows, sizes = make_sae(), make_rows(300), []
    expected = calibrate(sae, rows)
    encode = sae.encode
    monkeypatch.setattr(calibration, "_PRE_ACTIVATIONS", 7 * sae.config.num_latents)
    monkeypatch.setattr(sae, "encode", lambda block: sizes.append(len(block)) or encode(block))
    assert calibrate(sae, rows) == pytest.approx(expected)
    assert max(sizes) == 7 and sum(sizes) == 300
