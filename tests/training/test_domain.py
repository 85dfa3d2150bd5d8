"""Measuring unlabelled rows: the numbers are those of the whole matrix, and nothing of it is given away that is not asked for."""

import math

import numpy as np
import numpy_label_free as reference
import pytest
import torch
from conftest import make_tiny_clip
from numpy_reference import ReferenceSAE
from torch.nn.functional import normalize
from toy import clip_like_rows, make_rows, make_sae

from hf_vs2 import measure_statistics
from hf_vs2.data.stores.rows import Rows
from hf_vs2.encoders.tail import clip_embeds
from hf_vs2.functional.label_free import row_distance


class Counting(Rows):
    """Rows as a store gives them, and how many were asked for at a time."""

    def __init__(self, rows):
        self.rows, self.width, self.asked = rows, rows.shape[1], []

    def __len__(self):
        return len(self.rows)

    def take(self, indices):
        self.asked.append(len(indices))
        return self.rows[indices].float()


def subset_of(sketch, rows):
    """Whether each row of the sketch is one of `rows`, none twice."""
    same = (sketch[:, None] == rows.to(torch.bfloat16)[None]).all(-1)
    return bool((same.sum(0) <= 1).all() and (same.sum(1) == 1).all())


def check(found, rows, sae):
    """Everything against two passes of numpy over all rows at once; directions up to their sign."""
    plain = ReferenceSAE.of(sae)
    expected = reference.measured(
        rows.double().numpy(), np.array([plain.encode(row) for row in rows.double().numpy()])
    )
    for name in ("mean", "variances", "latent_mean", "latent_frequency"):
        np.testing.assert_allclose(getattr(found, name).numpy(), expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
    along = np.abs(np.sum(found.components.double().numpy() * expected["components"], axis=1))
    np.testing.assert_allclose(along, 1, atol=1e-4)
    for name in ("mean", "components", "variances", "latent_mean", "latent_frequency"):
        assert getattr(found, name).dtype == torch.float32 and getattr(found, name).is_contiguous(), name
    assert (found.variances.diff() <= 0).all(), "falling"


@pytest.mark.parametrize("activation", ["relu", "absolute"])
def test_statistics_are_those_of_the_whole_matrix(activation):
    """They come from sums of blocks; a slip there shifts every later answer a little, and no shape shows it."""
    sae, rows = make_sae(16, activation=activation), clip_like_rows(1500, 16, rank=5)  # two blocks
    found = measure_statistics(sae, rows)
    check(found, rows, sae)
    assert found.num_rows == 1500 and found.image_mean is None and not found.distance_quantiles
    assert (found.latent_frequency > 0).all() and (found.latent_frequency == 1 / 1501).any(), "some latent never fires"


def test_only_the_chosen_rows_count():
    """Training rows, not those held out: a leak would make thresholds too small."""
    sae, rows = make_sae(16), make_rows(300)
    chosen = torch.arange(0, 300, 3)
    found = measure_statistics(sae, rows, chosen)
    check(found, rows[chosen], sae)
    assert found.num_rows == 100 and subset_of(found.rows, rows[chosen])


def test_a_large_mean_costs_no_digits():
    """CLIP's rows have single features a hundred times as large as the spread; squares of those swallow it in float32."""
    rows = clip_like_rows(1200, 16, rank=4)
    rows[:, 3] += 1000
    found = measure_statistics(make_sae(16), rows)
    exact = np.linalg.eigvalsh(np.cov(rows.double().numpy().T, bias=True))[::-1]
    np.testing.assert_allclose(found.variances.numpy(), exact, rtol=1e-5)
    np.testing.assert_allclose(found.mean.double().numpy(), rows.double().mean(0).numpy(), rtol=1e-7)


def test_many_rows_are_a_random_choice(monkeypatch):
    """Of a million rows not all are read, and not the first ones: data sets are often sorted."""
    monkeypatch.setattr("hf_vs2.training.domain._MOST_ROWS", 400)
    rows = make_rows(4000) + torch.arange(4000)[:, None] / 4000
    store = Counting(rows)
    found = measure_statistics(make_sae(16), store, sketch_rows=50)
    assert found.num_rows == 400 and sum(store.asked) <= 400 + 50 + 1
    assert found.mean.mean().item() == pytest.approx(2.0, abs=0.06)
    assert found.rows.float().mean().item() == pytest.approx(2.0, abs=0.15)


def test_the_sketch_is_a_random_sample_of_the_rows():
    """Prototypes are fitted on it: never a row twice, the same with the same seed, and whole where there are few."""
    sae, rows = make_sae(16), make_rows(200)
    found = measure_statistics(sae, rows, sketch_rows=30)
    assert found.rows.shape == (30, 16) and found.rows.dtype == torch.bfloat16 and subset_of(found.rows, rows)
    again, other = (measure_statistics(sae, rows, sketch_rows=30, seed=seed).rows for seed in (0, 1))
    assert torch.equal(again, found.rows) and not torch.equal(other, found.rows)
    whole = measure_statistics(sae, rows).rows
    assert torch.equal(whole, rows.to(torch.bfloat16)), "fewer than 4,096: all of them, in their order"


def test_no_rows_are_kept_where_none_are_wanted():
    """Activations of single images may be private; then the mean image has to be measured now, on all rows."""
    sae, clip = make_sae(32), make_tiny_clip()
    rows = make_rows(150, 32)
    with pytest.raises(ValueError, match="sketch_rows=0 leaves nothing to take the mean image from: give clip= too"):
        measure_statistics(sae, rows, sketch_rows=0)
    with pytest.raises(ValueError, match="keep some rows"):
        measure_statistics(sae, rows, sketch_rows=-1)
    found = measure_statistics(sae, rows, torch.arange(100), clip=clip, sketch_rows=0)
    with torch.no_grad():
        expected = normalize(clip_embeds(clip, rows[:100]), dim=-1).double().mean(0)
    assert found.rows is None and found.image_mean.dtype == torch.float32
    torch.testing.assert_close(found.image_mean.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_held_out_quantiles_cover_fresh_rows(level):
    """`gate=0.9` promises that nine of ten fresh images of the same kind are treated; from few training rows the in-sample quantile
    passes far fewer."""
    sae = make_sae(48)
    covered, in_sample = [], []
    for seed in range(8):
        rows = clip_like_rows(160, seed=seed)
        known = measure_statistics(sae, rows, torch.arange(100), torch.arange(100, 160))
        fresh = row_distance(clip_like_rows(1000, seed=100 + seed), known.of_rows)
        covered.append((fresh <= known.distance_threshold(level)).double().mean().item())
        seen = row_distance(rows[:100], known.of_rows).quantile(level)
        in_sample.append((fresh <= seen).double().mean().item())
    assert np.mean(covered) >= level - 0.02 and np.mean(covered) <= level + 0.05
    assert np.mean(in_sample) < level - 0.1, "the rows are too easy to tell the two apart"


def test_thresholds_are_of_the_held_out_rows():
    """Split conformal: the ceil((n + 1) q)-th smallest distance, levels that n rows can't vouch for left out."""
    sae, rows = make_sae(16), make_rows(60)
    held_out = torch.arange(41, 60)
    known = measure_statistics(sae, rows, torch.arange(41), held_out)
    ordered = row_distance(rows[held_out], known.of_rows).sort().values.tolist()
    assert known.distance_quantiles["0.9"] == ordered[math.ceil(20 * 0.9) - 1]
    assert max(map(float, known.distance_quantiles)) == 0.95
    assert not measure_statistics(sae, rows, torch.arange(41), held_out[:0]).distance_quantiles


def test_held_out_rows_are_not_measured_by_default():
    """Who names rows to hold out and no others means the others."""
    sae, rows = make_sae(16), make_rows(60)
    held_out = torch.tensor([3, 50, 7])
    others = torch.tensor([i for i in range(60) if i not in (3, 50, 7)])
    found, expected = measure_statistics(sae, rows, held_out=held_out), measure_statistics(sae, rows, others, held_out)
    assert found.num_rows == 57 and torch.equal(found.mean, expected.mean)
    assert found.distance_quantiles == expected.distance_quantiles and subset_of(found.rows, rows[others])


def test_measuring_changes_nothing():
    """The SAE is somebody's: its numbers and settings stay, and it keeps no statistics that were not given to it."""
    sae, rows = make_sae(16), make_rows(80)
    before, config, given = {k: v.clone() for k, v in sae.state_dict().items()}, sae.config.to_dict(), rows.clone()
    measure_statistics(sae, rows)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())
    assert sae.config.to_dict() == config and sae.domain_statistics is None and torch.equal(rows, given)
