"""What helps without labels, as tensor functions: the published equations, and the promises that choose between them."""

import numpy_label_free as reference
import pytest
import torch
from drawn import close, draw, drawn_classes, images_of
from torch.nn.functional import normalize
from toy import clip_like_rows, make_sae

from hf_vs2.functional.anchored import anchored_scores, fit_anchored_prototypes
from hf_vs2.functional.label_free import (
    RowStatistics,
    balanced_mean,
    centred_classes,
    distribution_norm_scores,
    fit_balanced_prototypes,
    fit_prototypes,
    label_scores,
    norm_fit,
    pca_view,
    row_distance,
    score_scale,
)
from hf_vs2.training.domain import measure_statistics


@pytest.fixture()
def classes():
    return drawn_classes()


@pytest.fixture()
def embeds(classes):
    """90 of them, more of the first classes than of the last."""
    return images_of(classes, torch.tensor([0] * 40 + [1] * 25 + [2] * 15 + [3] * 8 + [4] * 2))


# The equations: whole methods are held against numpy in tests/methods/test_every_method.py


def test_distribution_norm_scores_are_zhou_et_als(classes, embeds):
    """Eq. 6 of arXiv 2302.11084 in its two published forms."""
    mu_x, mu_y = embeds.mean(0).numpy(), classes.mean(0).numpy()
    for form in ("dot", "cosine"):
        found = distribution_norm_scores(embeds, classes, embeds.mean(0), classes.mean(0), 0.25, form)
        pairs = [[(e - 0.25 * mu_x, w - 0.25 * mu_y) for w in classes.numpy()] for e in embeds.numpy()]
        of = (lambda a, b: a @ b) if form == "dot" else (lambda a, b: reference.unit(a) @ reference.unit(b))
        close(found, [[of(*pair) for pair in row] for row in pairs])
    with pytest.raises(ValueError, match="score must be 'dot' or 'cosine', not 'sine'"):
        distribution_norm_scores(embeds, classes, embeds[0], classes[0], score="sine")


def test_balanced_mean_does_not_depend_on_its_blocks(classes, embeds, monkeypatch):
    """Thousands of labels and rows are taken in blocks so that memory stays flat."""
    whole = balanced_mean(embeds, classes)
    monkeypatch.setattr("hf_vs2.functional.label_free._BLOCK", 7 * len(classes))
    torch.testing.assert_close(balanced_mean(embeds, classes), whole)


def test_distance_is_below_one_at_home_and_grows_abroad():
    """What people read off `distance`, and the gate's measure: no finite threshold may let a broken row through."""
    rows = clip_like_rows(2000)
    known = measure_statistics(make_sae(48), rows).of_rows
    at_home = (known.variances / (known.variances + 0.05 * known.variances.mean())).mean().item()
    assert row_distance(rows, known).mean().item() == pytest.approx(at_home, rel=1e-3)
    fresh = clip_like_rows(500, seed=1)
    assert row_distance(fresh, known).mean().item() == pytest.approx(at_home, rel=0.1) and at_home < 1
    assert row_distance(3 * fresh, known).min() > 10
    fresh[0, 0], fresh[1, 1] = float("nan"), float("inf")
    assert not (row_distance(fresh[:2], known) < float("inf")).any()


def test_rows_without_any_spread_stay_finite():
    """One row, or copies of one image, have no variance to divide by."""
    known = RowStatistics(torch.ones(4), torch.eye(4), torch.zeros(4))
    rows = torch.tensor([[1.0, 1, 1, 1], [2.0, 1, 1, 1]])
    view, distances = pca_view(rows, known), row_distance(rows, known)
    assert view.isfinite().all() and torch.equal(view[0], torch.zeros(4))
    assert distances[0] == 0 and distances[1] > 1e3


# Promises


def test_scale_keeps_the_answers_and_the_spread(classes, embeds):
    """Scores go into a softmax at CLIP's temperature: other answers would be wrong, another spread would be over-confident."""
    fit = fit_prototypes(embeds, classes, embeds.mean(0))
    found = label_scores(embeds, fit)
    unscaled = label_scores(embeds, fit._replace(scale=torch.tensor(1.0)))
    assert torch.equal(found.argmax(-1), unscaled.argmax(-1)) and fit.scale > 0
    # Texts as alike as CLIP's: without the scale the spread is several times that of the cosines.
    alike = normalize(classes.mean(0) + 0.15 * classes, dim=-1)
    fit = norm_fit(alike, embeds.mean(0))
    spread = lambda scores: (scores.amax(-1) - scores.amin(-1)).mean().item()  # noqa: E731
    assert 0.5 < spread(label_scores(embeds, fit)) / spread(embeds @ alike.T) < 2
    assert spread(label_scores(embeds, fit._replace(scale=torch.tensor(1.0)))) > 4 * spread(embeds @ alike.T)
    assert score_scale(embeds.mean(0), alike).item() == pytest.approx(
        reference.scale(embeds.mean(0).numpy(), alike.numpy())
    )


def test_without_rows_prototypes_are_distribution_norm(classes, embeds):
    """Statistics without a sketch promise exactly that, bit for bit."""
    views = [draw(0, 6)]
    fit, norm = fit_prototypes(embeds[:0], classes, embeds.mean(0), views), norm_fit(classes, embeds.mean(0))
    assert torch.equal(label_scores(embeds, fit, [draw(90, 6)]), label_scores(embeds, norm))
    assert fit.received.tolist() == [0] * 5


def test_balanced_mean_does_not_follow_the_share_of_labels():
    """95 % of the images are of one label: the plain mean takes that label's own direction away, and answers flip."""
    classes = drawn_classes(4, seed=5)
    uneven = torch.tensor([0] * 570 + [1] * 10 + [2] * 10 + [3] * 10)
    embeds, even = images_of(classes, uneven, seed=1), images_of(classes, torch.arange(4).repeat(150), seed=2)
    plain, balanced = embeds.mean(0), balanced_mean(embeds, classes)
    fair = even.mean(0)
    assert (balanced - fair).norm() < 0.3 * (plain - fair).norm()
    right = lambda mean: (label_scores(embeds, norm_fit(classes, mean)).argmax(-1) == uneven).double().mean()  # noqa: E731
    assert right(balanced) > 0.99 > 0.8 > right(plain)


def test_a_label_that_no_image_shows_counts_little(classes):
    """Labels in the list that never occur are common; their least unlikely images are of other labels."""
    embeds = images_of(classes, torch.arange(4).repeat(30), noise=0.2)  # none of the last
    without = balanced_mean(embeds, classes[:4])
    assert (balanced_mean(embeds, classes) - without).norm() < 0.05 * without.norm()


def scores_of(fit, rows, classes, images):
    """What a rule that is fitted to unlabelled rows says of images."""
    view = lambda e: normalize(e[:, :7] + 0.3, dim=-1)  # noqa: E731
    if fit == "prototypes":
        return label_scores(images, fit_prototypes(rows, classes, rows.mean(0), [view(rows)]), [view(images)])
    if fit == "balanced prototypes":
        return label_scores(images, fit_balanced_prototypes(rows, classes))
    if fit == "anchored prototypes":
        return anchored_scores(images, classes, fit_anchored_prototypes(rows, classes, 100.0))
    return label_scores(images, norm_fit(classes, rows.mean(0) if fit == "norm" else balanced_mean(rows, classes)))


FITS = ("norm", "balanced norm", "prototypes", "balanced prototypes", "anchored prototypes")


@pytest.mark.parametrize("fit", FITS)
def test_rows_in_another_order_give_the_same_scores(fit):
    """Of more than 40 rows of a label CLIP is so sure that a float says 1: their order, or the device, used to choose
    the 20 surest."""
    classes = drawn_classes(4, seed=5).float()
    rows = images_of(classes.double(), torch.arange(4).repeat(80), noise=0.5).float()
    assert ((100 * rows @ classes.T).softmax(-1) == 1).sum(0).amax() > 40
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3))
    found = scores_of(fit, rows[order], classes, rows)
    torch.testing.assert_close(found, scores_of(fit, rows, classes, rows), rtol=0, atol=2e-5)


def test_one_label(classes, embeds):
    """A single label is no mean of labels to subtract: it keeps its direction instead of becoming 0 or NaN."""
    one, mean = classes[:1], embeds.mean(0)
    assert torch.equal(centred_classes(one), one)
    for fit in (
        norm_fit(one, balanced_mean(embeds, one)),
        fit_prototypes(embeds, one, mean),
        fit_balanced_prototypes(embeds, one),
    ):
        found = label_scores(embeds, fit)
        assert found.shape == (90, 1) and found.isfinite().all() and found.std() > 0.01
    assert fit_prototypes(embeds, one, mean).received.item() == pytest.approx(90)


def test_fewer_rows_than_the_surest(classes, embeds):
    """Seven images are fewer than the 20 a label that the mean would like."""
    found = balanced_mean(embeds[:7], classes)
    close(found, reference.balanced_mean(embeds[:7].numpy(), classes.numpy()))


def test_nothing_given_is_changed(classes, embeds):
    """Cached embeddings and class matrices are used again after a fit."""
    views = [normalize(draw(90, 7), dim=-1)]
    given = [tensor.clone() for tensor in (classes, embeds, *views)]
    mean = balanced_mean(embeds, classes)
    fit = fit_prototypes(embeds, classes, mean, views)
    label_scores(embeds, fit, views)
    with pytest.raises(ValueError):
        label_scores(embeds, fit, [*views, embeds])  # a view that the fit has not seen must not be dropped
    assert fit.received.sum().item() == pytest.approx(90), "every row is dealt out once"
    assert fit_balanced_prototypes(embeds, classes).received.sum() < 85, "the commonest label's rows count less"
    assert all(torch.equal(a, b) for a, b in zip(given, (classes, embeds, *views), strict=True))
