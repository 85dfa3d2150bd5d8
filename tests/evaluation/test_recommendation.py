"""The recommendation: what it says must follow from the images, and plain CLIP must be among its answers."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import normalize
from words import NAMES, compared_model

from hf_vs2.clip.modeling import VS2CLIPForZeroShot
from hf_vs2.encoders.fingerprints import vision_fingerprint
from hf_vs2.encoders.tail import clip_embeds
from hf_vs2.evaluation.evidence import evenness, shift_of
from hf_vs2.evaluation.recommendation import (
    Evidence,
    apply_method,
    decide,
    gather_evidence,
    recommend,
    sign_test,
    weigh,
)
from hf_vs2.methods import METHODS


SURE = Evidence(4096, 40.0, confidence=0.8, explained=0.7, commonest=0.1, evenness=0.97, trust=1.0)
C, D = 8, 32


def clusters(share: float, n: int = 1200, noise: float = 0.6, seed: int = 0):
    """Unit embeddings around class directions that share a large mean, `share` of them of class 0, as CLIP's lie; and the classes."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q[: C + 1]
    wanted = torch.full((C,), (1 - share) / (C - 1)).index_fill(0, torch.tensor([0]), share)
    labels = torch.multinomial(wanted, n, replacement=True, generator=generator)
    embeds = 2 * classes[C] + classes[labels] + noise * torch.randn(n, D, generator=generator) / D**0.5
    return normalize(embeds, dim=-1), normalize(classes[:C] + 0.5 * classes[C], dim=-1), labels


@pytest.fixture(scope="module")
def rows():
    from conftest import make_tiny_clip

    torch.manual_seed(0)
    with torch.no_grad():
        return make_tiny_clip().vision_model(pixel_values=torch.randn(60, 3, 32, 32)).last_hidden_state[:, 0]


@pytest.fixture(scope="module")
def classes():
    return normalize(torch.randn(len(NAMES), 24, generator=torch.Generator().manual_seed(0)), dim=-1)


# The rule


@pytest.mark.parametrize(
    ("changed", "method", "says"),
    [
        ({}, "anchored_prototypes", "70% of what CLIP says"),
        ({"explained": 0.49, "trust": 0}, "none", "Only 49%"),
        ({"commonest": 0.6, "trust": 0}, "none", "60% of the images are of one label"),
        ({"trust": 0, "rows_per_label": 0.4}, "none", "0.4 images a label are too few"),
    ],
)
def test_the_rule_and_its_reasons(changed, method, says):
    """A method is worth nothing with a reason that is not its own."""
    found, reasons = decide(replace(SURE, **changed))
    assert found == method and says in reasons[-1]


@pytest.mark.parametrize(("share", "method"), [(1 / C, "anchored_prototypes"), (0.95, "none")])
def test_images_of_one_label_are_not_fitted_to(share, method):
    """The user whose images are 95 % one class: what is fitted to them takes that class away from them, or gives it
    too often."""
    embeds, classes, labels = clusters(share)
    evidence = gather_evidence(embeds, classes, scale=30.0)
    assert decide(evidence)[0] == method
    assert evidence.commonest == pytest.approx(labels.bincount().max().item() / len(labels), abs=0.1)


def test_labels_that_clip_does_not_know_keep_plain_clip():
    """Where CLIP guesses, every method is fitted to guesses."""
    embeds, _, _ = clusters(1 / C)
    unknown = normalize(torch.randn(C, D, generator=torch.Generator().manual_seed(9)), dim=-1)
    assert decide(gather_evidence(embeds, unknown, 3.0))[0] == "none"


@pytest.mark.parametrize(("labels", "images"), [(120, 96), (10, 30), (100, 4096)])
def test_evenness_is_judged_by_what_so_many_images_can_show(labels, images):
    """96 images of 120 labels can't show more than 96: they used to pass for uneven whatever they were."""
    drawn = torch.randint(labels, (images,), generator=torch.Generator().manual_seed(2))
    assert evenness(drawn.bincount(minlength=labels), images) > 0.9
    assert evenness(torch.arange(images).remainder(labels).bincount(minlength=labels), images) == 1
    few = drawn % (labels // 5)
    assert evenness(few.bincount(minlength=labels), images) < 0.5


# Labels


def right(n, fixed, broken, plain=0.5):
    """Which of n images plain CLIP and another method have right."""
    base = torch.arange(n) < plain * n
    other = base.clone()
    other[: int(broken)] = False
    other[n - int(fixed) :] = True
    return base, other


@pytest.mark.parametrize(
    ("fixed", "broken", "p"), [(5, 0, 0.0625), (6, 0, 0.03125), (0, 0, 1), (8, 2, 0.109375), (9, 12, 0.6636)]
)
def test_the_exact_test(fixed, broken, p):
    """Of five answers that differ, all for the better, chance makes one set in 16."""
    assert sign_test(fixed, broken) == sign_test(broken, fixed) == pytest.approx(p, abs=1e-4)
    assert sign_test(560, 500) == pytest.approx(sign_test(520, 460), abs=0.02)  # exact below 1,000, normal above


@pytest.mark.parametrize(
    ("n", "start", "fixed", "broken", "answer", "says"),
    [
        (9, "anchored_prototypes", 4, 0, "anchored_prototypes", "9 labelled images are too few"),
        (100, "none", 3, 2, "none", "The test finds a difference of"),
        (100, "anchored_prototypes", 3, 6, "anchored_prototypes", "no other method is surely better"),
        (100, "none", 25, 2, "vs2", "vs2 is surely better than plain CLIP: +23.0 points"),
        (100, "anchored_prototypes", 25, 2, "vs2", "surely better than anchored_prototypes"),
        (100, "anchored_prototypes", 0, 12, "none", "plain CLIP is surely better than anchored_prototypes"),
        (100, "anchored_prototypes", 0, 6, "none", "surely loses"),
    ],
)
def test_labels_decide_by_a_paired_test(n, start, fixed, broken, answer, says):
    """What chance would do too must not change the answer, and a reader must learn how much could have been found."""
    base, other = right(n, fixed, broken)
    answers = {"none": base, "vs2": other, "anchored_prototypes": base}
    if answer == "none" and start != "none":
        answers = {"none": base, "anchored_prototypes": other, "vs2": other, "prototypes": other}
    found, told = weigh(start, answers)
    assert found == answer and any(says in one for one in told)


def test_methods_that_labels_can_not_tell_apart_are_both_named():
    """Another seed names the other one: each has its price."""
    base, good = right(200, 40, 4)
    _, close = right(200, 36, 3)
    found, told = weigh(
        "none", {"none": base, "prototypes": good, "balanced_prototypes": close, "anchored_prototypes": base}
    )
    assert found == "prototypes"
    assert "do not tell it from balanced_prototypes (+16.5)" in told[1] and "The price of prototypes" in told[2]


# The whole way


def test_it_looks_at_the_rows_that_methods_are_fitted_to(rows, classes):
    """Evidence about other rows than those in the checkpoint would recommend for a model that nobody has."""
    model = compared_model(rows, statistics=True)
    known = model.domain_statistics
    found = recommend(model, rows[:20], classes)
    embeds = normalize(clip_embeds(model.clip, known.rows), dim=-1).detach()
    expected = gather_evidence(embeds, classes, model.clip.logit_scale.exp().item())
    assert {name: found.evidence[name] for name in vars(expected)} == pytest.approx(vars(expected))
    assert not found.calibrate_first and found.candidates == []
    assert model.domain_statistics is known and model.steering_settings.method == "vs2"


def test_methods_are_compared_with_the_settings_of_the_model(rows, classes):
    """What is recommended is then used with the model's coefficient, not with the default one."""
    model = compared_model(rows, statistics=True)
    model.set_steering(coefficient=0.9)
    with torch.no_grad(), model.steering(method="distribution_norm"):
        truth = model.class_logits(model.image_features_from_cls(rows), classes).argmax(-1)
    found = {one["method"]: one["top1"] for one in recommend(model, rows, classes, truth).candidates}
    assert found["distribution_norm"] == 100


def test_foreign_images_ask_for_a_calibration_first(rows, classes):
    """Statistics of other images say nothing about these; what is recommended must be about a model that has theirs."""
    model = compared_model(rows, statistics=True)
    known = model.domain_statistics
    foreign = 100 * torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
    found = recommend(model, foreign, classes)
    assert found.evidence["inside"] < 0.5 and found.evidence["rows"] == 50
    assert "calibrate" in found.reasons[0] and found.calibrate_first
    assert model.domain_statistics is known
    model.set_domain_statistics(None)
    found = recommend(model, rows, classes)
    assert "keeps no rows" in found.reasons[0] and "inside" not in found.evidence


def test_labels_of_some_images_are_compared_on_these(rows, classes, tmp_path):
    """Gains must be those of the labelled images alone, whatever the others are."""
    model = compared_model(rows, statistics=True)
    with torch.no_grad(), model.steering(method="prototypes"):
        truth = model.class_logits(model.image_features_from_cls(rows), classes).argmax(-1)
    labels = torch.where(torch.arange(60) < 50, truth, -1)
    assert recommend(model, rows, classes).method == "none"
    found = recommend(model, rows, classes, labels)
    by_method = {one["method"]: one for one in found.candidates}
    assert list(by_method) == ["none", *(name for name, method in METHODS.items() if method.candidate)] and {
        one["n"] for one in found.candidates
    } == {50}
    assert (
        by_method["prototypes"]["top1"] == 100 and found.method == "prototypes"
    )  # it is right on all, and surely better
    with torch.no_grad(), model.steering(enabled=False):
        plain = model.class_logits(model.image_features_from_cls(rows[:50]), classes).argmax(-1)
    gain = 100 - 100 * (plain == truth[:50]).double().mean().item()
    assert by_method["prototypes"]["gain"] == pytest.approx(gain) and gain > 20
    low, high = by_method["prototypes"]["gain_ci"]
    assert 0 < low < gain < high
    written = json.loads(found.to_json(tmp_path / "r.json").read_text())
    assert written["method"] == "prototypes" and written["candidates"][0]["method"] == "none"
    assert "| prototypes | 100.00 |" in str(found) and str(found).startswith("Recommended: prototypes")


def shift(monkeypatch, ours, theirs, classes, inside=1.0):
    monkeypatch.setattr("hf_vs2.evaluation.evidence.embeds_of", lambda model, rows, batch_size: rows)
    monkeypatch.setattr("hf_vs2.evaluation.evidence.temperature", lambda clip: 30.0)
    model = SimpleNamespace(clip=None, domain_statistics=SimpleNamespace(rows=theirs))
    return shift_of(model, ours, classes, inside, 100)


@pytest.mark.parametrize(
    ("share", "noise", "inside", "calibrate", "says"),
    [
        (1 / C, 0.6, 1.0, False, ""),
        (0.95, 0.6, 1.0, False, "keep it as it is"),
        (1 / C, 3.0, 1.0, True, "less sure of them"),
        (0.95, 3.0, 1.0, False, "Gather images of all labels"),
        (0.95, 0.6, 0.3, True, "lets 30% through"),
    ],
)
def test_fewer_labels_are_not_other_images(monkeypatch, share, noise, inside, calibrate, says):
    """200 horses were told to calibrate on horses, which cost 49 points; blurred images of all labels should."""
    theirs, classes, _ = clusters(1 / C)
    ours, _, _ = clusters(share, n=400, noise=noise, seed=0)
    found = shift(monkeypatch, ours, theirs, classes, inside)
    assert found.calibrate == calibrate and says in found.why + found.labels_only
    assert bool(found.why) == (noise > 1 or inside < 0.8)


def test_without_labels_the_answer_is_the_rules(rows, classes, monkeypatch, tmp_path):
    """It says how to know, too."""
    model = compared_model(rows, statistics=True)
    assert recommend(model, rows, classes).method == "none", "of random labels nothing can be learnt"
    chosen = ("anchored_prototypes", ["So it is."])
    monkeypatch.setattr("hf_vs2.evaluation.recommendation.decide", lambda evidence: chosen)
    found = recommend(model, rows, classes)
    assert (found.method, found.by_rule, found.candidates) == ("anchored_prototypes", "anchored_prototypes", [])
    assert str(found).startswith("Recommended: anchored_prototypes; label 100 images, know\n")
    written = json.loads(found.to_json(tmp_path / "r.json").read_text())
    assert (written["method"], written["by_rule"]) == ("anchored_prototypes", "anchored_prototypes")
    labels = torch.arange(len(rows)) % len(classes)
    weighed = recommend(model, rows, classes, labels, methods="vs2")  # one may be given as a string
    assert [one["method"] for one in weighed.candidates] == ["none", "vs2", "anchored_prototypes"]


def test_a_method_that_is_applied_keeps_the_gate(rows, tmp_path):
    """`recommend --apply` must not take a gate away without a word, nor hand an FVU to a method that has none."""
    model = compared_model(rows, statistics=True, fvu_threshold=0.5)
    model.save_pretrained(tmp_path, full=True)
    for method, threshold in (("amplify", 0.5), ("distribution_norm", None)):
        apply_method(model, method, tmp_path)
        kept = VS2CLIPForZeroShot.from_pretrained(tmp_path).steering_settings
        assert (kept.method, kept.fvu_threshold) == (method, threshold)


@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [(1, 7, "1 image and 7 labels"), (19, 7, "19 images and 7 labels"), (60, 1, "60 images and 1 label")],
)
def test_too_little_to_tell_is_said(rows, classes, images, labels, says):
    """From one picture "100% of the answers stay when the images are drawn again", and with one label all answers are
    right."""
    model = compared_model(rows, statistics=True)
    for truth in (None, [0] * images):
        found = recommend(model, rows[:images], classes[:labels], truth)
        assert found.method == found.by_rule == "none" and found.candidates == []
        assert found.reasons == [f"{says} are too little to tell: give 20 images or more, and 2 labels."]
    assert says in " ".join(str(found).split())


def test_a_sure_loss_keeps_plain_clip(rows, classes):
    """Labels outrank the rule: what harms on them is not recommended."""
    model = compared_model(rows, statistics=True)
    with torch.no_grad(), model.steering(enabled=False):
        plain = model.class_logits(model.image_features_from_cls(rows), classes).argmax(-1)
    assert recommend(model, rows, classes, plain).method == "none"


def test_a_store_is_read_where_it_is_looked_at(rows, classes, tmp_path, monkeypatch):
    """A million rows in memory, to look at 4,096 of them, is a crash on the machines that people have."""
    from trainings import make_store

    store = make_store(tmp_path / "store", rows, layer=2)
    model = compared_model(rows, statistics=True)
    store.metadata["base_model_fingerprint"] = vision_fingerprint(model.clip)
    expected = recommend(model, rows, classes)
    assert recommend(model, store, classes).evidence == pytest.approx(expected.evidence, rel=1e-5)
    monkeypatch.setattr("hf_vs2.evaluation.recommendation.SKETCH_ROWS", 10)
    asked = []
    take = type(store).take
    monkeypatch.setattr(
        type(store), "take", lambda self, indices, layer=None: asked.append(len(indices)) or take(self, indices, layer)
    )
    labels = torch.full((60,), -1).index_fill(0, torch.arange(12), 0)
    found = recommend(model, store, classes, labels)
    assert asked == [10, 12] and found.candidates[0]["n"] == 12
