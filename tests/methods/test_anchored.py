"""Anchored prototypes: the equations once more in numpy, and the promise that chose them: where rows can't be trusted,
plain CLIP."""

import numpy as np
import numpy_label_free as reference
import pytest
import torch
from drawn import close, draw, drawn_classes, images_of
from steered import classes_of, cls_rows, make_inputs, scored_model
from torch.nn.functional import normalize

from hf_vs2.functional.anchored import anchored_scores, fit_anchored_prototypes


T = 30.0


@pytest.fixture()
def classes():
    return drawn_classes()


def uneven(classes, seed=0, noise=0.5):
    return images_of(classes, torch.tensor([0] * 12 + [1] * 9 + [2] * 6 + [3] * 4 + [4]), seed, noise)


def mistaken(classes, amount=0.1):
    """What a text tower says that knows the labels badly."""
    return normalize(classes + amount * draw(*classes.shape, seed=4) / classes.shape[1] ** 0.5, dim=-1)


@pytest.mark.parametrize(("noise", "temperature", "trusted"), [(0.3, 30.0, 1), (1.5, 30.0, 0.5), (3.0, 30.0, 0)])
def test_agrees_with_numpy(classes, noise, temperature, trusted):
    """Whole trust, some and none: an error of one constant would be invisible but for the accuracy."""
    rows, fresh = uneven(classes, noise=noise), images_of(classes, torch.arange(5), seed=7, noise=noise)
    fit = fit_anchored_prototypes(rows, classes, temperature)
    expected = reference.anchored(rows.numpy(), classes.numpy(), temperature)
    assert (expected["h"] == trusted) if trusted in (0, 1) else (0.05 < expected["h"] < 0.95)
    parts = zip((fit.mean, fit.prototypes, fit.weights, fit.received), ("m", "P", "w", "n"), strict=True)
    for found, name in parts:
        close(found, expected[name], 1e-6)
    assert fit.facts["explained"] == pytest.approx(expected["R"], abs=1e-9)
    assert fit.facts["commonest"] == pytest.approx(expected["share"])
    scores = [reference.anchored_scores(e, classes.numpy(), expected) for e in fresh.numpy()]
    close(anchored_scores(fresh, classes, fit), scores, 1e-6)


def test_rows_mend_what_the_text_gets_wrong():
    """What it is for: text that mixes labels up, and rows that fall into clear groups."""
    truth = drawn_classes(6, seed=7)
    text, labels = mistaken(truth), torch.arange(6).repeat(60)
    rows, fresh = (images_of(truth, labels, seed, noise=1.5) for seed in (1, 2))
    right = lambda scores: (scores.argmax(-1) == labels).double().mean().item()  # noqa: E731
    plain, found = right(fresh @ text.T), right(anchored_scores(fresh, text, fit_anchored_prototypes(rows, text, T)))
    assert plain < 0.7 and found > plain + 0.05


def nothing_to_learn(kind, classes):
    rows = uneven(classes)
    if kind == "no rows":
        return rows[:0], classes
    if kind == "one label":
        return rows, classes[:1]
    if kind == "a row a label":
        return images_of(classes, torch.arange(5)), classes
    if kind == "mostly one label":
        return images_of(classes, torch.tensor([0] * 95 + [1, 2, 3, 4, 1]), noise=0.3), classes
    if kind == "labels of several kinds of images":
        parts = drawn_classes(40, seed=8)
        return images_of(parts, torch.arange(40).repeat(20)), normalize(parts.view(5, 8, -1).mean(1), dim=-1)
    return uneven(classes, noise=3.0), classes


@pytest.mark.parametrize(
    "kind",
    [
        *("no rows", "one label", "a row a label", "mostly one label"),
        *("labels of several kinds of images", "images that look like no label"),
    ],
)
def test_falls_back_to_plain_clip_bit_for_bit(classes, kind):
    """Harm on a true CLIP came from rows like these; a fit that "hardly" changes scores would still flip answers."""
    rows, texts = nothing_to_learn(kind, classes)
    fit = fit_anchored_prototypes(rows.float(), texts.float(), T)
    assert fit.scale == 0
    images = images_of(classes, torch.arange(5), seed=9).float()
    assert torch.equal(anchored_scores(images, texts.float(), fit), images @ texts.float().T)
    assert all(part.isfinite().all() and part.dtype == torch.float32 for part in fit[:5])


def test_a_label_without_rows_is_neither_favoured_nor_punished(classes):
    """A longer list of labels must not cost the images of those that do have images."""
    rows = images_of(classes, torch.arange(4).repeat(30), noise=0.3)  # none of the last
    fit, images = fit_anchored_prototypes(rows, classes, T), images_of(classes, torch.arange(5), seed=7, noise=0.3)
    added = anchored_scores(images, classes, fit) - images @ classes.T
    assert fit.scale > 0 and fit.received[4] < 1
    assert added[:, 4].abs().max() < 0.1 * added.abs().max()


def test_what_is_added_is_nothing_on_average(classes):
    """Scores go into a softmax at CLIP's temperature, or a threshold: a shift of all of them would be read as
    confidence."""
    rows = uneven(classes, noise=0.3)
    fit = fit_anchored_prototypes(rows, classes, T)
    plain = rows @ classes.T
    looked = (T * plain).softmax(-1)
    added = anchored_scores(rows, classes, fit) - plain
    torch.testing.assert_close((looked * added).sum(-1), torch.zeros(len(rows), dtype=torch.double), rtol=0, atol=1e-9)
    assert added.abs().max() > 0.05


def test_copies_of_an_image_count_once(classes):
    """Leaving a row out is no check where its copy stays in: a folder with every image twice would look twice as sure."""
    rows = uneven(classes)
    copied = fit_anchored_prototypes(torch.cat([rows, rows[:30]]), classes, T)
    once = fit_anchored_prototypes(rows, classes, T)
    assert copied.facts == once.facts
    for one, other in zip(copied[:5], once[:5], strict=True):
        assert torch.equal(one, other)


def test_one_row_is_no_evidence_for_itself(classes):
    """A label whose only row is this one has nothing to say of it: the rest of its prototype is numerical dust."""
    rows = images_of(classes, torch.tensor([0] * 30 + [1] * 30 + [2] * 30 + [3] * 30 + [4]), noise=0.3)
    fit = fit_anchored_prototypes(rows, classes, 60.0)
    assert fit.scale > 0 and all(part.isfinite().all() for part in fit[:5])
    assert fit.received[4].item() == pytest.approx(1, abs=0.2) and fit.weights[4] < 0.06
    np.testing.assert_allclose(fit.received.sum(), 121)


def test_scores_of_a_sigmoid_are_refused(tiny_clip, monkeypatch):
    """SigLIP's are no probabilities that add up to 1: what is fitted to their softmax would be fitted to nothing that
    the model says."""
    rows = cls_rows(tiny_clip, make_inputs(20)["pixel_values"])
    model = scored_model(tiny_clip, rows, method="anchored_prototypes")
    monkeypatch.setattr(model.clip, "logit_bias", torch.nn.Parameter(torch.zeros(())), raising=False)
    with pytest.raises(ValueError, match="scores labels by a sigmoid.*method='vs2'"):
        model.fit_classes(classes_of(tiny_clip))
