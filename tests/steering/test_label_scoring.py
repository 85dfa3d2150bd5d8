"""Methods that score by a label set: what they need, and what of it is saved. What is kept stands in test_label_sets.py, their
equations and the gate's promise stand in tests/methods/test_every_method.py, damaged files in
tests/survival/test_every_damage.py."""

import re

import pytest
import torch
from hub_models import CLIP_FILES
from steered import classes_of, cls_rows, logits, make_inputs, noise_images, scored_demo, scored_tiny
from torch.nn.functional import normalize
from toy import forget_digests, make_sae
from transformers import pipeline

import hf_vs2
from hf_vs2 import RetrievalCorpus, VS2CLIPForZeroShot, measure_statistics, push_to_hub, zero_shot_classifier
from hf_vs2.data.labels.prompts import class_embeddings
from hf_vs2.files.sharing import hub_push
from hf_vs2.methods import METHODS


LABELS = ["three", "zero", "seven", "nine"]
FITTED = "prototypes+pca+sae"
SCORING = [name for name, method in METHODS.items() if method.fit]
STATISTICS, LABEL_SETS = "statistics.safetensors", "label_sets.safetensors"


@pytest.fixture()
def model(tiny_clip):
    return scored_tiny(tiny_clip)


@pytest.fixture(scope="module")
def images():
    return noise_images(6)


@pytest.fixture()
def named():
    """Its CLIP has a tokenizer, so that labels have names."""
    return scored_demo(method=FITTED)


@pytest.mark.parametrize("method", ["distribution_norm", FITTED, "vs2+distribution_norm", "balanced_prototypes"])
def test_the_pipelines_answer_what_the_model_does(named, images, method):
    """Ours and transformers' stock one, for one call and for good."""
    classifier = hf_vs2.zero_shot_classifier(named, device="cpu")
    found = classifier(images, LABELS, method=method, gate=0.5, return_details=True, batch_size=4)
    pixels = classifier.image_processor(images, return_tensors="pt")["pixel_values"]
    classes = class_embeddings(named.clip, classifier.tokenizer, LABELS, ["This is a photo of {}."], clean=False)
    named.set_steering(method=method, gate=0.5)
    with torch.no_grad():
        made = named.image_features(pixels)
        expected = named.class_logits(made, classes).softmax(-1)
    stock = pipeline(
        "zero-shot-image-classification",
        model=named,
        tokenizer=classifier.tokenizer,
        image_processor=classifier.image_processor,
        device="cpu",
    )
    by_stock = stock(images, candidate_labels=LABELS)
    for i, details in enumerate(found):
        for ours in (details["predictions"], by_stock[i]):
            scores = {one["label"]: one["score"] for one in ours}
            assert [scores[label] for label in LABELS] == pytest.approx(expected[i].tolist(), abs=1e-4)
        assert details["steered"] == made.steered[i].item()
        assert (
            (details["fvu"] is None)
            == ("distance" in details)
            == (method in ("distribution_norm", "balanced_prototypes"))
        )


# The gate


def test_an_fvu_threshold_needs_an_fvu(model):
    """It would be compared with nothing, and every image be treated."""
    with pytest.raises(ValueError, match="'distribution_norm' does not read the SAE.*fvu_threshold=0.5.*Give gate="):
        model.set_steering(method="distribution_norm", fvu_threshold=0.5)
    model.set_steering(method="prototypes+sae", fvu_threshold=0.5)
    with pytest.raises(ValueError, match="'prototypes' does not read the SAE"):
        model.set_steering(method="prototypes")  # the threshold in force is one of FVUs
    model.set_steering(method="prototypes", gate=0.5)
    assert model.steering_settings.fvu_threshold is None


def test_a_gate_that_is_refused_leaves_the_one_in_force(model, tiny_clip):
    """Who tries a level in a notebook and is told off must not go on without any gate."""
    rows = cls_rows(tiny_clip, make_inputs(40, 4, seed=9)["pixel_values"])
    model.set_steering(method="prototypes", gate=0.5)
    before = model.image_features_from_cls(rows).steered
    with pytest.raises(ValueError, match="gate=0.001 lies outside"):
        model.set_steering(gate=0.001)
    assert model.steering_settings.gate == 0.5 and not before.all()
    assert torch.equal(model.image_features_from_cls(rows).steered, before)


# What it needs


def test_without_statistics_the_message_says_what_to_do(model, tiny_clip, images):
    """Old checkpoints have none. A KeyError in the middle of a run would tell nobody."""
    bare = VS2CLIPForZeroShot(tiny_clip, make_sae(32))
    with pytest.raises(ValueError, match="'prototypes' needs statistics of unlabelled images.*hf-vs2 calibrate"):
        bare.set_steering(method="prototypes")
    with pytest.raises(ValueError, match="'corrected' needs statistics"):
        VS2CLIPForZeroShot(tiny_clip, make_sae(32), method="corrected")
    assert bare.steering_settings.method == "vs2", "what was refused is not in force"
    with pytest.raises(ValueError, match="no statistics to take a mean image from"):
        bare.image_mean()
    bare.set_domain_statistics(measure_statistics(bare.sae, model.domain_statistics.rows.float()))
    bare.set_steering(method="prototypes")
    with pytest.raises(ValueError, match="'prototypes' is in force and needs them. Set another method first"):
        bare.set_domain_statistics(None)
    with pytest.raises(ValueError, match="gate=0.9 goes by the distance.*no rows were held out"):
        bare.set_steering(gate=0.9)


def test_statistics_that_do_not_serve_the_gate_in_force_change_nothing(model):
    """A refusal half-way would leave the thresholds of other statistics in force."""
    model.set_steering(method="prototypes", gate=0.5)
    before, rows = model.domain_statistics, model.domain_statistics.rows.float()
    with pytest.raises(ValueError, match="no rows were held out"):
        model.set_domain_statistics(measure_statistics(model.sae, rows))
    assert model.domain_statistics is before


def test_a_mean_image_of_another_clip_is_refused(model):
    """Statistics of another CLIP with rows of this width: the sum would fail somewhere in a batch, or broadcast."""
    other = model.domain_statistics.without_rows(image_mean=torch.zeros(7))
    with pytest.raises(ValueError, match=r"mean image.*\(7,\).*24"):
        model.set_steering(method="distribution_norm")
        model.set_domain_statistics(other)


@pytest.mark.parametrize("method", SCORING)
def test_without_rows_what_is_fitted_to_rows_is_refused(model, tiny_clip, method):
    """Who gives no activations away has distribution norm, and is told so: under another name it would pass for what
    it is not."""
    rows, classes = cls_rows(tiny_clip, make_inputs(6, 4)["pixel_values"]), classes_of(tiny_clip)
    model.set_steering(method="distribution_norm")
    expected = logits(model, rows, classes)
    model.set_domain_statistics(model.domain_statistics.without_rows(model.image_mean()))
    assert torch.equal(logits(model, rows, classes), expected)
    if not METHODS[method].needs_rows:
        return
    with pytest.raises(
        ValueError, match=f"method='{re.escape(method)}' is fitted to rows.*Use method='distribution_norm'"
    ):
        model.set_steering(method=method)
    assert model.steering_settings.method == "distribution_norm"
    model.set_steering(method=method, enabled=False)  # plain CLIP needs nothing


def test_a_checkpoint_of_before_that_keeps_no_rows_loads_and_refuses_to_score(named, images, tmp_path, caplog):
    """It ran distribution norm as prototypes. Its owner keeps the files, and learns what to do."""
    named.set_steering(method="prototypes", gate=0.5)
    named.fit_label_set(LABELS)
    named.save_pretrained(tmp_path)
    named.domain_statistics.without_rows(torch.ones(64) / 8).save(tmp_path)
    forget_digests(tmp_path)
    again = VS2CLIPForZeroShot.from_pretrained(tmp_path)
    assert "is fitted to rows" in caplog.text and again.steering_settings.method == "prototypes"
    with pytest.raises(ValueError, match="is fitted to rows"):
        again.fit_label_set(LABELS)
    with pytest.raises(ValueError, match="is fitted to rows"):
        zero_shot_classifier(again)(images, LABELS)
    plain = zero_shot_classifier(again)(images, LABELS, steer=False)
    assert plain == zero_shot_classifier(named)(images, LABELS, steer=False)
    again.save_pretrained(tmp_path / "again")
    chosen = VS2CLIPForZeroShot.from_pretrained(tmp_path / "again", method="distribution_norm")
    assert zero_shot_classifier(chosen)(images, LABELS) != plain


def test_the_mean_that_was_measured_on_all_rows_is_used(model, tiny_clip):
    """The sketch is a few thousand of perhaps a million rows."""
    model.set_steering(method="distribution_norm")
    of_sketch = model.image_mean()
    with torch.no_grad():
        embeds = model.image_features_from_cls(model.domain_statistics.rows.float()).features
    torch.testing.assert_close(of_sketch, normalize(embeds, dim=-1).mean(0))
    rows = cls_rows(tiny_clip, make_inputs(100, 4, seed=5)["pixel_values"])
    model.set_domain_statistics(measure_statistics(model.sae, rows, clip=tiny_clip, sketch_rows=10))
    assert torch.equal(model.image_mean(), model.domain_statistics.image_mean)
    torch.testing.assert_close(model.image_mean(), model.domain_statistics.image_mean)
    model.set_steering(method="vs2+distribution_norm")
    assert not torch.allclose(model.image_mean(), model.domain_statistics.image_mean), "of steered rows"


# Checkpoints


def test_an_sae_checkpoint_is_enough(named, images, tmp_path):
    """What training and calibration leave is an SAE: `zero_shot_classifier(folder)` with a method beyond VS2 works on it."""
    named.sae.config.base_model_name_or_path = str(CLIP_FILES)
    named.sae.save_pretrained(tmp_path)
    found = hf_vs2.zero_shot_classifier(str(tmp_path), device="cpu", dtype="float32")(
        images, LABELS, method=FITTED, gate=None
    )
    named.set_steering(gate=None)
    expected = hf_vs2.zero_shot_classifier(named, device="cpu")(images, LABELS)
    for ours, theirs in zip(found, expected, strict=True):
        scores = {one["label"]: one["score"] for one in ours}
        assert scores == pytest.approx({one["label"]: one["score"] for one in theirs}, abs=1e-5)
    model = VS2CLIPForZeroShot.from_pretrained(tmp_path, method="prototypes", gate=None)
    assert model.steering_settings.method == "prototypes"


def test_what_lies_beside_the_weights_goes_to_the_hub_and_leaves_it(hub, named, tmp_path, monkeypatch, caplog):
    """`pipeline(model=id)` must find it there, whoever gives activations of images away must be told, and after it is
    taken away the next push must not leave it lying."""
    said, beside = [], {STATISTICS, LABEL_SETS, "corpus/corpus.safetensors"}
    monkeypatch.setattr(hub_push.logger, "warning", said.append)
    named.fit_label_set(LABELS)
    rows, other = torch.randn(20, 96), torch.randn(20, 3)
    named.set_corpus(RetrievalCorpus.from_store(rows, clip=named.clip, embeddings=other, encoder=str(tmp_path)))
    for what, repository in ((named, "ada/vs2"), (named.sae, "ada/sae")):
        push_to_hub(what, repository)
        kept = {name for name in beside if name == STATISTICS or what is named}
        assert hub[repository].head.files.keys() & beside == kept
        assert sum(f"activations of {len(named.domain_statistics.rows)} of" in one for one in said) == 1
        said.clear()
    found = VS2CLIPForZeroShot.from_pretrained("ada/vs2")
    assert [one.labels for one in found.fitted_label_sets] == [tuple(LABELS)]
    assert found.domain_statistics.distance_quantiles == named.domain_statistics.distance_quantiles
    for corpus in (found.corpus, RetrievalCorpus.from_pretrained("ada/vs2", subfolder="corpus")):
        assert torch.equal(corpus.rows, rows) and corpus.encoder == str(tmp_path)
    named.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "corpus" / "corpus.safetensors").unlink()
    with pytest.raises(ValueError, match="should hold corpus/corpus.safetensors"):
        push_to_hub(tmp_path / "saved", "ada/vs2")
    named.set_steering(method="vs2")
    named.set_domain_statistics(None)
    named.set_corpus(None)
    for what, repository in ((named, "ada/vs2"), (named.sae, "ada/sae")):
        push_to_hub(what, repository)
        assert not hub[repository].head.files.keys() & beside and "activations" not in str(said)
    with pytest.raises(OSError):
        RetrievalCorpus.from_pretrained("ada/vs2", subfolder="corpus")
