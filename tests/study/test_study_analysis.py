"""Analyses of single images against closed forms, plain-Python references and properties that must hold for any outcome."""

import math

import numpy as np
import pytest
import torch

from hf_vs2.evaluation.metrics import mean_per_class
from hf_vs2.study.results.analysis import (
    MAX_POINTS,
    agreement,
    fixed_confusions,
    fvu_deciles,
    per_class,
    risk_coverage,
)
from hf_vs2.study.results.cells import Outputs


NAMES = ["cat", "dog", "fox", "owl"]


def draw(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FVU with many ties and some infinite values, and two outcomes."""
    generator = torch.Generator().manual_seed(seed)
    fvu = (20 * torch.rand(n, generator=generator)).round() / 20
    fvu[torch.rand(n, generator=generator) < 0.03] = math.inf
    steered = torch.rand(n, generator=generator) < 0.9 - 0.4 * fvu.clamp(max=1)
    return fvu, steered, torch.rand(n, generator=generator) < 0.6


def outcome(labels: list[int], predictions: list[int]) -> Outputs:
    return Outputs(torch.tensor(labels), torch.tensor(predictions))


@pytest.mark.parametrize("n", [10, 237])
def test_deciles_partition_the_images(n: int) -> None:
    """Bins that drop or count an image twice would show accuracies that no image set has."""
    fvu, steered, plain = draw(n)
    bins = fvu_deciles(fvu, steered, plain)
    counts = [one["n"] for one in bins]
    assert sum(counts) == n and max(counts) - min(counts) <= 1
    for key, right in (("steered", steered), ("plain", plain)):
        assert sum(one["n"] * one[key] for one in bins) / n == pytest.approx(100 * right.double().mean().item())
    edges = [edge for one in bins for edge in (one["low"], one["high"])]
    assert edges == sorted(edges) and edges[0] == fvu.min()
    assert math.isinf(edges[-1]) == bool(fvu.isinf().any())
    assert all(one["gain_ci"][0] <= one["steered"] - one["plain"] <= one["gain_ci"][1] for one in bins)


def test_deciles_of_a_known_case() -> None:
    """Steering that helps only well reconstructed images must show as a gain in the first bin and a loss in the last."""
    fvu = torch.tensor([0.4, 0.1, 0.3, 0.2])
    first, last = fvu_deciles(fvu, [False, True, False, True], [True, False, True, False], bins=2)
    assert (first["low"], first["high"], first["steered"], first["plain"]) == pytest.approx((0.1, 0.2, 100, 0))
    assert (last["low"], last["high"], last["steered"], last["plain"]) == pytest.approx((0.3, 0.4, 0, 100))
    assert first["gain_ci"] == [100, 100] and last["gain_ci"] == [-100, -100]


def test_risk_coverage_agrees_with_gating_by_hand() -> None:
    """The curve is what tells a user which threshold to choose: each point must be the gate applied at that threshold."""
    fvu, steered, plain = (one.numpy() for one in draw(500))
    curve = risk_coverage(fvu, steered, plain)
    assert len(curve["coverage"]) == len(np.unique(fvu)) + 1
    for coverage, threshold, steered_risk, plain_risk, accuracy in zip(*curve.values(), strict=True):
        admitted = fvu <= threshold
        assert coverage == pytest.approx(admitted.mean())
        assert accuracy == pytest.approx(100 * np.where(admitted, steered, plain).mean())
        if admitted.any():
            assert steered_risk == pytest.approx(100 * (~steered[admitted]).mean())
            assert plain_risk == pytest.approx(100 * (~plain[admitted]).mean())
        else:
            assert math.isnan(steered_risk) and math.isnan(plain_risk)


def test_long_risk_coverage_keeps_its_ends() -> None:
    """A thinned curve must still begin at plain CLIP and end at VS2 without a gate."""
    generator = torch.Generator().manual_seed(1)
    fvu, steered = torch.rand(5000, generator=generator), torch.rand(5000, generator=generator) < 0.7
    plain = torch.rand(5000, generator=generator) < 0.6
    curve = risk_coverage(fvu, steered, plain)
    coverage, accuracy = curve["coverage"], curve["gated_accuracy"]
    assert len(coverage) == MAX_POINTS and coverage == sorted(set(coverage))
    assert (coverage[0], coverage[-1]) == (0, 1)
    assert accuracy[0] == pytest.approx(100 * plain.double().mean().item())
    assert accuracy[-1] == pytest.approx(100 * steered.double().mean().item())
    assert curve["threshold"][-1] == fvu.max()


def test_classes_and_confusions_of_a_known_case() -> None:
    """Crediting a fix to the wrong class, or to what the method says instead of what CLIP said, would mislead an audit."""
    #                 fixed  fixed  broken same  wrong->wrong fixed
    labels = [0, 0, 1, 1, 2, 2]
    plain = outcome(labels, [1, 1, 1, 1, 0, 1])
    method = outcome(labels, [0, 0, 2, 1, 1, 2])
    table = per_class(method, plain, NAMES)
    assert [row["name"] for row in table] == NAMES
    assert [row["support"] for row in table] == [2, 2, 2, 0]
    assert [row["gain"] for row in table] == [100, -50, 50, None]
    assert (table[1]["plain"], table[1]["steered"], table[3]["plain"]) == (100, 50, None)
    assert fixed_confusions(method, plain, NAMES) == {
        "fixed": [
            {"true": "cat", "mistaken_for": "dog", "count": 2},
            {"true": "fox", "mistaken_for": "dog", "count": 1},
        ],
        "broken": [{"true": "dog", "mistaken_for": "fox", "count": 1}],
    }
    assert len(fixed_confusions(method, plain, NAMES, top=1)["fixed"]) == 1
    # (100 + 50 + 50) / 3: the class without images counts neither as 0 nor as 100.
    assert mean_per_class(method.predictions, method.labels, 4) == pytest.approx(200 / 3)


def test_agreement_of_seeds() -> None:
    """Mean and least over pairs, and fixed images by intersection over union, as in sets worked out by hand."""
    labels = [0, 1, 2, 3]
    plain = outcome(labels, [1, 1, 1, 1])  # wrong on images 0, 2, 3
    runs = [outcome(labels, [0, 1, 2, 0]), outcome(labels, [0, 1, 0, 0]), outcome(labels, [1, 1, 0, 3])]
    found = agreement(runs, plain)
    assert found["pairs"] == 3
    assert found["same_prediction_mean"] == pytest.approx((75 + 25 + 50) / 3) and found["same_prediction_min"] == 25
    # Fixed: {0, 2}, {0}, {3}
    assert found["fixed_jaccard_mean"] == pytest.approx((50 + 0 + 0) / 3) and found["fixed_jaccard_min"] == 0
    assert agreement([plain, plain], plain)["fixed_jaccard_mean"] == 100
