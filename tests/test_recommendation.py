"""The recommendation: what it says must follow from the images, and plain CLIP must be among its answers."""

import json
from dataclasses import replace

import pytest
import torch
from test_evaluation import NAMES, make_model
from torch.nn.functional import normalize

from hf_vs2.encoders.fingerprints import vision_fingerprint
from hf_vs2.encoders.tail import clip_embeds
from hf_vs2.evaluation.recommendation import Evidence, decide, gather_evidence, recommend
from hf_vs2.functional.label_free import balanced_mean, label_scores, norm_fit
from hf_vs2.methods import METHODS


SURE = Evidence(4096, 40.0, confidence=0.8, evenness=0.97, largest_share=0.1, agreement=0.8, stability=0.98)
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
        ({}, "prototypes", "spread over the labels"),
        ({"confidence": 0.49}, "none", "not sure of these labels"),
        ({"stability": 0.84}, "none", "too few images"),
        ({"evenness": 0.93}, "balanced_prototypes", "commonest label about 10%"),
        ({"agreement": 0.69}, "balanced_prototypes", "agree with plain CLIP on 69% only"),
        ({"confidence": 0.2, "evenness": 0.1}, "none", "not sure"),
    ],
)
def test_the_rule_and_its_reasons(changed, method, says):
    """A method is worth nothing with a reason that is not its own."""
    found, reasons = decide(replace(SURE, **changed))
    assert found == method and says in reasons[-1]


@pytest.mark.parametrize(
    ("share", "method"), [(1 / C, "prototypes"), (0.5, "balanced_prototypes"), (0.95, "balanced_prototypes")]
)
def test_images_of_one_label_get_no_balance_assumption(share, method):
    """The user whose images are 95 % one class: distribution norm would take that class away from them."""
    embeds, classes, labels = clusters(share)
    evidence = gather_evidence(embeds, classes, scale=30.0)
    assert decide(evidence)[0] == method
    assert evidence.largest_share == pytest.approx(labels.bincount().max().item() / len(labels), abs=0.1)
    guesses = label_scores(embeds, norm_fit(classes, balanced_mean(embeds, classes))).argmax(-1)
    shares = guesses.bincount(minlength=C) / len(guesses)
    assert evidence.evenness == pytest.approx(
        (-(shares * shares.clamp_min(1e-30).log()).sum()).exp().item() / C, rel=1e-4
    )


def test_labels_that_clip_does_not_know_keep_plain_clip():
    """Where CLIP guesses, every method is fitted to guesses."""
    embeds, classes, _ = clusters(1 / C)
    unknown = normalize(torch.randn(C, D, generator=torch.Generator().manual_seed(9)), dim=-1)
    assert gather_evidence(embeds, classes, 30.0).confidence > 0.5
    assert decide(gather_evidence(embeds, unknown, 3.0))[0] == "none"


# The whole way


def test_it_looks_at_the_rows_that_methods_are_fitted_to(rows, classes):
    """Evidence about other rows than those in the checkpoint would recommend for a model that nobody has."""
    model = make_model(rows, statistics=True)
    known = model.domain_statistics
    found = recommend(model, rows[:20], classes)
    embeds = normalize(clip_embeds(model.clip, known.rows), dim=-1).detach()
    expected = gather_evidence(embeds, classes, model.clip.logit_scale.exp().item())
    assert {name: found.evidence[name] for name in vars(expected)} == pytest.approx(vars(expected))
    assert not found.calibrate_first and found.candidates == []
    assert model.domain_statistics is known and model.steering_settings.method == "vs2"


def test_foreign_images_ask_for_a_calibration_first(rows, classes):
    """Statistics of other images say nothing about these; what is recommended must be about a model that has theirs."""
    model = make_model(rows, statistics=True)
    known = model.domain_statistics
    foreign = 100 * torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
    found = recommend(model, foreign, classes)
    assert found.evidence["inside"] < 0.5 and found.evidence["rows"] == 50
    assert "calibrate" in found.reasons[0] and found.calibrate_first
    assert model.domain_statistics is known
    model.set_domain_statistics(None)
    found = recommend(model, rows, classes)
    assert "keeps no rows" in found.reasons[0] and "inside" not in found.evidence


def test_labels_of_some_images_are_compared_on_these(rows, classes, tmp_path, monkeypatch):
    """Gains must be those of the labelled images alone, whatever the others are."""
    model = make_model(rows, statistics=True)
    with torch.no_grad(), model.steering(method="prototypes"):
        truth = model.class_logits(model.image_features_from_cls(rows), classes).argmax(-1)
    labels = torch.where(torch.arange(60) < 50, truth, -1)
    monkeypatch.setattr("hf_vs2.evaluation.recommendation.LEAST_CONFIDENCE", 1.1)  # without labels: plain CLIP
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


def test_a_drop_of_confidence_asks_for_a_calibration(rows, classes):
    """Blurred and noisy images pass the gates; what was fitted to sharp ones may harm them."""
    model = make_model(rows, statistics=True)
    model.clip.logit_scale.data.fill_(3.5)
    with torch.no_grad(), model.steering(enabled=False):
        sure = model.class_logits(model.image_features_from_cls(rows), classes).softmax(-1).amax(-1)
    unsure = rows[sure[:40].argmin()].repeat(60, 1)  # within the gate, and all of them alike
    assert "drift" in recommend(model, rows, classes).evidence
    found = recommend(model, unsure, classes)
    drift = found.evidence["drift"]
    known = model.domain_statistics.rows.float()
    with torch.no_grad(), model.steering(enabled=False):
        sure = [
            model.class_logits(model.image_features_from_cls(one), classes).softmax(-1).amax(-1).mean().item()
            for one in (known, unsure)
        ]
    assert drift == pytest.approx(sure[0] - sure[1], abs=1e-4) and abs(drift) > 0.05
    assert found.evidence["inside"] == 1 and found.calibrate_first
    assert "plain CLIP's answer gets" in found.reasons[0] and "calibrate" in found.reasons[0]


def test_a_handful_of_labels_decides_nothing(rows, classes):
    """One label that a method happens to get right is a gain of 100 points with an interval of [100, 100]."""
    model = make_model(rows, statistics=True)
    with torch.no_grad(), model.steering(method="prototypes"):
        truth = model.class_logits(model.image_features_from_cls(rows), classes).argmax(-1)
    labels = torch.where(torch.arange(60) < 9, truth, -1)
    found = recommend(model, rows, classes, labels)
    assert "9 labelled images are too few" in found.reasons[-1] and found.method == "none"


def test_without_labels_the_answer_is_plain_clip(rows, classes, monkeypatch, tmp_path):
    """On OpenAI's ViT-B/32 the rule named methods that lose: it may say what it would name, but not recommend it."""
    model = make_model(rows, statistics=True)
    monkeypatch.setattr("hf_vs2.evaluation.recommendation.decide", lambda evidence: ("prototypes", ["So it is."]))
    found = recommend(model, rows, classes)
    assert (found.method, found.by_rule, found.candidates) == ("none", "prototypes", [])
    assert str(found).startswith("Recommended: plain CLIP; label 100 images to know\n")
    assert "The label-free rule names prototypes" in found.reasons[0] and "one stand-in encoder" in found.reasons[0]
    written = json.loads(found.to_json(tmp_path / "r.json").read_text())
    assert (written["method"], written["by_rule"]) == ("none", "prototypes")


def test_labels_that_do_not_tell_keep_plain_clip(rows, classes, monkeypatch):
    """Half of the rule's changes right, half wrong: no gain is shown, so none is promised."""
    model = make_model(rows, statistics=True)
    monkeypatch.setattr("hf_vs2.evaluation.recommendation.decide", lambda evidence: ("prototypes", ["So it is."]))
    answers = {}
    for method in ("none", "prototypes"):
        with torch.no_grad(), model.steering(method=method):
            answers[method] = model.class_logits(model.image_features_from_cls(rows), classes).argmax(-1)
    changed = (answers["none"] != answers["prototypes"]).nonzero().squeeze(-1)
    assert len(changed) > 10
    labels = answers["none"].index_copy(0, changed[::2], answers["prototypes"][changed[::2]])
    found = recommend(model, rows, classes, labels)
    gains = {one["method"]: one for one in found.candidates}
    assert gains["prototypes"]["gain_ci"][0] < 0 < gains["prototypes"]["gain_ci"][1]
    assert found.method == "none" and found.by_rule == "prototypes"


@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [(1, 7, "1 image and 7 labels"), (19, 7, "19 images and 7 labels"), (60, 1, "60 images and 1 label")],
)
def test_too_little_to_tell_is_said(rows, classes, images, labels, says):
    """From one picture "100% of the answers stay when the images are drawn again", and with one label all answers are
    right."""
    model = make_model(rows, statistics=True)
    for truth in (None, [0] * images):
        found = recommend(model, rows[:images], classes[:labels], truth)
        assert found.method == found.by_rule == "none" and found.candidates == []
        assert found.reasons == [f"{says} are too little to tell: give 20 images or more, and 2 labels."]
    assert says in str(found)


def test_a_sure_loss_keeps_plain_clip(rows, classes):
    """Labels outrank the rule: what harms on them is not recommended."""
    model = make_model(rows, statistics=True)
    with torch.no_grad(), model.steering(enabled=False):
        plain = model.class_logits(model.image_features_from_cls(rows), classes).argmax(-1)
    assert recommend(model, rows, classes, plain).method == "none"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0] * 59, "labels must be 60 whole numbers"),
        ([0.5] * 60, "whole numbers"),
        ([7] * 60, "the largest is 7"),
        ([-2] * 60, "labels must be -1"),
    ],
)
def test_impossible_labels_are_refused(rows, classes, labels, message):
    """A shifted label column would recommend the wrong method with confidence."""
    with pytest.raises(ValueError, match=message):
        recommend(make_model(rows, statistics=True), rows, classes[:7], labels)


def test_a_store_is_read_where_it_is_looked_at(rows, classes, tmp_path, monkeypatch):
    """A million rows in memory, to look at 4,096 of them, is a crash on the machines that people have."""
    from test_trainer import make_store

    store = make_store(tmp_path / "store", rows, layer=2)
    model = make_model(rows, statistics=True)
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
