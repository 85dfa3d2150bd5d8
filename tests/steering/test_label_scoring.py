"""Methods that score by a label set: what they need, what is kept, when it is dropped, and what of it is saved. Their
equations and the gate's promise stand in tests/methods/test_every_method.py, damaged files in
tests/survival/test_every_damage.py."""

import copy
import json
import pickle
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from steered import classes_of, cls_rows, logits, make_inputs, scored_model
from torch.nn.functional import normalize
from toy import forget_digests, make_sae
from transformers import CLIPModel, pipeline

import hf_vs2
from hf_vs2 import RetrievalCorpus, VS2CLIPForZeroShot, measure_statistics, push_to_hub, zero_shot_classifier
from hf_vs2.config.latent_edits import LatentEdits
from hf_vs2.data.labels.prompts import class_embeddings
from hf_vs2.files.checkpoint_folder import CheckpointFolder
from hf_vs2.files.sharing import hub_push
from hf_vs2.methods import METHODS, prototypes
from hf_vs2.steering import label_sets as label_scoring


# A real (if tiny) CLIP with its tokenizer and image processor files: 28-pixel images, 96 wide, 3 layers.
CLIP_PATH = str(Path(hf_vs2.__file__).parent / "demo_assets")
LABELS = ["three", "zero", "seven", "nine"]
SCORING = [name for name, method in METHODS.items() if method.fit]
FITTED = "prototypes+pca+sae"
STATISTICS, LABEL_SETS = "statistics.safetensors", "label_sets.safetensors"


@pytest.fixture()
def model(tiny_clip):
    """Random images, whose statistics are of 80 others."""
    return scored_model(tiny_clip, cls_rows(tiny_clip, make_inputs(100, 4, seed=5)["pixel_values"]))


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 255, (6, 5, 6, 3), dtype=np.uint8)
    return [Image.fromarray(pixels).resize((48, 40)) for pixels in coarse]


@pytest.fixture()
def named():
    """A model whose CLIP has a tokenizer, so that labels have names."""
    clip = CLIPModel.from_pretrained(CLIP_PATH, dtype=torch.float32).eval()
    pixels = torch.randn(60, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    return scored_model(clip, cls_rows(clip, pixels), method=FITTED)


class Count:
    """A function, and how often it was called."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


@pytest.fixture()
def fits(monkeypatch):
    """Counts prototypes that are fitted."""
    count = Count(prototypes.fit_prototypes)
    monkeypatch.setattr(prototypes, "fit_prototypes", count)
    return count


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


# What is kept


def test_a_label_set_is_fitted_once(model, tiny_clip, fits):
    """A fit takes seconds; it must not be made for every batch."""
    model.set_steering(method=FITTED)
    rows, classes, others = (
        cls_rows(tiny_clip, make_inputs(6, 4)["pixel_values"]),
        classes_of(tiny_clip),
        classes_of(tiny_clip, 1),
    )
    first = logits(model, rows, classes)
    for batch in rows.split(2):
        logits(model, batch, classes)
    assert fits.calls == 1
    with model.steering(method="vs2"):
        logits(model, rows, classes)
    second = logits(model, rows, others)
    assert fits.calls == 2 and not torch.allclose(first, second)
    assert torch.equal(logits(model, rows, classes), first) and fits.calls == 2, "both are kept"
    logits(model, rows, classes[[1, 0, 2, 3]])
    logits(model, rows, classes[:3])
    assert fits.calls == 4, "another order, another number: another set"
    assert model.fit_classes(5 * classes) is model.fit_classes(classes), "lengths mean nothing"


def changed_weights(model, how):
    """Ways in which weights change while a model is in use."""
    norm, sae = model.clip.vision_model.post_layernorm, model.sae
    if how == "data of the norm":  # no version counter sees it
        norm.weight.data.mul_(1 + 0.5 * torch.arange(32) / 32)
    elif how == "optimizer on the norm":
        norm.bias.grad = torch.randn(32, generator=torch.Generator().manual_seed(0))
        torch.optim.SGD([norm.bias], lr=0.5).step()
    elif how == "projection loaded":
        other = torch.randn(model.clip.visual_projection.weight.shape, generator=torch.Generator().manual_seed(0))
        model.clip.visual_projection.load_state_dict({"weight": other})
    elif how == "data of the SAE":
        sae.W_enc.data.add_(0.3 * torch.randn(sae.W_enc.shape, generator=torch.Generator().manual_seed(0)))
    elif how == "top_k":
        sae.config.top_k = 3
    elif how == "statistics":
        rows = model.domain_statistics.rows.float()
        model.set_domain_statistics(measure_statistics(sae, rows, torch.arange(30)))
    elif how == "statistics of the SAE":
        sae.set_domain_statistics(measure_statistics(sae, model.domain_statistics.rows.float(), torch.arange(30)))


HOWS = [
    *("data of the norm", "optimizer on the norm", "projection loaded", "data of the SAE", "top_k"),
    *("statistics", "statistics of the SAE"),
]


@pytest.mark.parametrize("how", HOWS)
def test_what_is_kept_follows_what_it_was_made_of(model, tiny_clip, how):
    """After a training step or with other statistics, old prototypes would be wrong without a word."""
    model.set_steering(method=FITTED)
    rows, classes = cls_rows(tiny_clip, make_inputs(6, 4)["pixel_values"]), classes_of(tiny_clip)
    before = model.fit_classes(classes)
    logits(model, rows, classes)
    changed_weights(model, how)
    fresh = VS2CLIPForZeroShot(
        copy.deepcopy(tiny_clip), copy.deepcopy(model.sae), method=FITTED, gamma=1.5, lambda_=0.7
    )
    assert torch.equal(logits(model, rows, classes), logits(fresh, rows, classes))
    assert not torch.equal(model.fit_classes(classes).fit.prototypes, before.fit.prototypes)


@pytest.mark.parametrize("how", HOWS)
def test_what_was_fitted_by_name_follows_too(named, how, tmp_path):
    """It is saved with the model: prototypes of other weights must not get into a checkpoint, whether or not they were used since."""
    if "norm" in how:
        how = "data of the SAE"  # 32 wide there
    named.fit_label_set(LABELS)
    changed_weights(named, how)
    named.save_pretrained(tmp_path, full=True)
    assert named.fitted_label_sets == () and not (tmp_path / LABEL_SETS).exists()
    assert not named.config.holds_label_sets


def test_gamma_counts_where_the_step_depends_on_it(model, tiny_clip):
    """Two settings tried in turn: one must not score by the other's mean image, nor should a gate or gamma that means nothing cost a fit."""
    classes = classes_of(tiny_clip)
    model.set_steering(method="vs2+distribution_norm")
    mean, first = model.image_mean(), model.fit_classes(classes)
    with model.steering(gamma=4.0):
        assert not torch.allclose(model.image_mean(), mean)
    with model.steering(lambda_=2.0):
        assert model.fit_classes(classes) is not first
    with model.steering(gamma=tuple(1 + 0.01 * i for i in range(128))):
        assert model.fit_classes(classes) is not first
    with model.steering(gate=0.5, edits=LatentEdits(suppress=(1,))):
        assert model.fit_classes(classes) is first, "it is fitted on all rows of the sketch, gated or not"
    with model.steering(method="prototypes"):
        prototypes = model.fit_classes(classes)
    with model.steering(method="prototypes", gamma=4.0, lambda_=9.0):
        assert model.fit_classes(classes) is prototypes
    assert model.fit_classes(classes) is first


def test_least_recently_used_sets_go_first(model, tiny_clip, fits, monkeypatch):
    """A service that is asked for ever new labels must not fill the memory."""
    model.set_steering(method="prototypes")
    sets = [classes_of(tiny_clip, seed) for seed in range(3)]
    one = model.fit_classes(sets[0]).fit.num_floats
    monkeypatch.setattr(model._steerer.label_sets._recent, "capacity", 2 * one)
    for classes in (sets[1], sets[0], sets[2]):  # the second is the oldest now
        model.fit_classes(classes)
    assert fits.calls == 3
    for number in (0, 2, 0, 0, 0, 2):
        model.fit_classes(sets[number])
    assert fits.calls == 3, "however often one is used, it counts once"
    model.fit_classes(sets[1])
    assert fits.calls == 4
    monkeypatch.setattr(model._steerer.label_sets._recent, "capacity", 0)
    assert model.fit_classes(sets[2]) is model.fit_classes(sets[2]), "one is always kept"


def test_methods_tried_in_turn(model, tiny_clip):
    """A comparison on one model: a method must not score by what another one looked at, nor by rows that a gate or an edit changed."""
    rows, classes = cls_rows(tiny_clip, make_inputs(6, 4)["pixel_values"]), classes_of(tiny_clip)
    expected = {}
    for method in SCORING:
        with copy.deepcopy(model).steering(method=method) as fresh:
            expected[method] = logits(fresh, rows, classes)
    for method in (*SCORING, *reversed(SCORING)):
        with model.steering(method=method):
            torch.testing.assert_close(logits(model, rows, classes), expected[method])
    with copy.deepcopy(model).steering(method="vs2+distribution_norm") as fresh:
        mean = fresh.image_mean()
    for settings in ({"gate": 0.5}, {"edits": LatentEdits(set={3: 9.0})}):
        with copy.deepcopy(model).steering(method="vs2+distribution_norm", **settings) as fresh:
            torch.testing.assert_close(fresh.image_mean(), mean)


def test_settings_of_one_call_are_not_the_models(model, tiny_clip):
    """Fitting steers the sketch: meanwhile and afterwards the model's own gate and method are what they were."""
    model.set_steering(method="vs2+distribution_norm", gate=0.5)
    settings, config = model.steering_settings, model.config.to_dict()
    model.fit_classes(classes_of(tiny_clip))
    assert model.steering_settings is settings and model.config.to_dict() == config


def test_several_threads(model, tiny_clip, fits):
    """A server's threads ask the same model for different label sets at once: right answers, each set fitted once."""
    model.set_steering(method=FITTED)
    rows, sets = (
        cls_rows(tiny_clip, make_inputs(6, 4)["pixel_values"]),
        [classes_of(tiny_clip, seed) for seed in range(4)],
    )
    expected = [logits(copy.deepcopy(model), rows, classes) for classes in sets]
    fits.calls, fit = 0, fits.function
    fits.function = lambda *args: (time.sleep(0.02), fit(*args))[1]  # long enough for the others to come by

    def ask(number):
        with copy.copy(model).steering(gate=None) as own:  # as the pipeline does
            return logits(own, rows, sets[number // 4])

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(16)))
    assert fits.calls == 4
    for number, result in enumerate(found):
        torch.testing.assert_close(result, expected[number // 4])


@pytest.mark.parametrize("method", ["distribution_norm", FITTED])
@pytest.mark.parametrize("num_classes", [1, 4])
def test_what_inference_mode_kept_can_be_trained_with(model, tiny_clip, num_classes, method):
    """An evaluation inside `torch.inference_mode()` fills the cache; the training step after it saves those tensors for backward."""
    model.set_steering(method=method)
    inputs, classes = make_inputs(6, num_classes), classes_of(tiny_clip, num_classes=num_classes)
    with torch.inference_mode():
        classes_there = classes.clone()
        model.class_logits(model.image_features(inputs["pixel_values"]), classes_there)
    for _ in range(2):  # the second would go back through a graph that was kept
        model.class_logits(model.image_features(inputs["pixel_values"]), classes).sum().backward()
    assert not any(tensor.requires_grad for tensor in model.fit_classes(classes).fit[:5])
    assert tiny_clip.visual_projection.weight.grad.abs().sum() > 0


# Sets with a name


def rounded(classes):
    """What another batch size, device or thread count makes of the same prompts."""
    noise = torch.randn(classes.shape, generator=torch.Generator().manual_seed(0))
    return normalize(classes + 2e-6 * noise, dim=-1)


@pytest.mark.parametrize("full", [False, True])
def test_a_set_fitted_by_name_goes_with_the_checkpoint(named, images, fits, tmp_path, full):
    """Prototypes are made once, where the time and the images are, and served elsewhere without a fit."""
    fitted = named.fit_label_set(LABELS)
    assert fitted.labels == tuple(LABELS) and named.fitted_label_sets == (fitted,)
    # Shares of the 48 rows of the sketch.
    assert fitted.rows_per_label.shape == (4,) and fitted.rows_per_label.sum().item() == pytest.approx(48, abs=1e-3)
    named.fit_label_set(["dog", "cat"], templates=["{}", "one {}"])
    assert named.fit_label_set(LABELS) is fitted
    expected = hf_vs2.zero_shot_classifier(named, device="cpu")(images, LABELS)
    assert fits.calls == 2
    named.save_pretrained(tmp_path, full=full)
    assert json.loads((tmp_path / "config.json").read_text())["holds_label_sets"] is True
    files = CheckpointFolder.open(tmp_path).files
    assert files.keys() >= {STATISTICS, LABEL_SETS} and (tmp_path / LABEL_SETS).stat().st_size > 0

    found = VS2CLIPForZeroShot.from_pretrained(tmp_path)
    assert [one.labels for one in found.fitted_label_sets] == [tuple(LABELS), ("dog", "cat")]
    loaded, settings = found.fitted_label_sets[0], found.steering_settings
    assert settings == named.steering_settings and (loaded.method, loaded.settings) == (fitted.method, fitted.settings)
    for ours, theirs in zip((*loaded.fit[:5], *loaded.fit.views), (*fitted.fit[:5], *fitted.fit.views), strict=True):
        assert torch.equal(ours, theirs)
    again = hf_vs2.zero_shot_classifier(found, device="cpu")(images, LABELS)
    for ours, theirs in zip(again, expected, strict=True):
        assert [one["label"] for one in ours] == [one["label"] for one in theirs]
        assert [one["score"] for one in ours] == pytest.approx([one["score"] for one in theirs], abs=1e-5)
    assert found.fit_classes(rounded(loaded.class_embeds)) is loaded, (
        "recognised though the embeddings were made elsewhere"
    )
    assert fits.calls == 2, "nothing was fitted again"
    # The same folder once more, now with one set less in force, and with none.
    found.sae.W_enc.data.add_(0.1)
    found.save_pretrained(tmp_path, full=full)
    assert LABEL_SETS not in CheckpointFolder.open(tmp_path).files
    assert VS2CLIPForZeroShot.from_pretrained(tmp_path).fitted_label_sets == ()


def as_saved_before(folder):
    """What a version that subtracted the means in full under the name of distribution norm wrote."""
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("coefficient") == 0.4, "which tells the two apart must always be written"
    (folder / "config.json").write_text(json.dumps(config | {"method": "distribution_norm"}))
    tensors = load_file(folder / LABEL_SETS)
    with safe_open(folder / LABEL_SETS, "pt") as opened:
        about = opened.metadata()
    (name,) = about
    described = json.loads(about[name])
    for one in described["label_sets"]:
        del one["facts"]
        one["method"] = "distribution_norm"
    save_file(tensors, folder / LABEL_SETS, metadata={name: json.dumps(described)})
    forget_digests(folder)


def test_distribution_norm_of_a_checkpoint_saved_before_goes_on_as_it_was(named, images, tmp_path, caplog):
    """The name has another meaning now: other scores without a word would be the worst way to learn that."""
    named.set_steering(method="full_distribution_norm", gate=0.9, coefficient=0.4)
    fitted = named.fit_label_set(LABELS)
    expected = zero_shot_classifier(named)(images, LABELS)
    named.save_pretrained(tmp_path)
    as_saved_before(tmp_path)
    again = VS2CLIPForZeroShot.from_pretrained(tmp_path)
    said = [record for record in caplog.records if "full_distribution_norm" in record.getMessage()]
    assert len(said) == 1 and "\n" not in said[0].getMessage() and "docs/migration.md" in said[0].getMessage()
    assert again.steering_settings.method == "full_distribution_norm"
    assert again.fitted_label_sets[0].method == "full_distribution_norm"
    found = zero_shot_classifier(again)(images, LABELS)
    for ours, theirs in zip(found, expected, strict=True):
        assert [one["score"] for one in ours] == pytest.approx([one["score"] for one in theirs], abs=1e-6)
    assert again.fit_label_set(LABELS).fit.received.equal(fitted.fit.received) and len(again.fitted_label_sets) == 1
    again.set_steering(method="distribution_norm", coefficient=0.25)
    again.save_pretrained(tmp_path / "new")
    assert VS2CLIPForZeroShot.from_pretrained(tmp_path / "new").steering_settings.method == "distribution_norm"


def test_a_move_to_another_device_keeps_what_has_a_name(named, monkeypatch):
    """Fitted on a GPU, saved after `.cpu()`; loaded on the CPU, served from a GPU; used under autocast. Other weights there do not
    keep it."""
    fitted, state, place = named.fit_label_set(LABELS), label_scoring.weights_state, {"device": "cuda:0", "moved": 1}

    def elsewhere(parameters):
        autocast, parts, values = state(parameters)
        return (
            (*autocast, torch.bfloat16),
            tuple((place["moved"], *one[1:3], torch.device(place["device"])) for one in parts),
            values,
        )

    monkeypatch.setattr(label_scoring, "weights_state", elsewhere)
    assert named.fitted_label_sets == (fitted,)
    place["device"] = "cpu"
    assert named.fitted_label_sets == (fitted,)
    place["device"] = "cuda:0"
    named.sae.b_pre.data.add_(0.1)
    assert named.fitted_label_sets == ()


def test_other_weights_after_loading(named, tmp_path):
    """`load_state_dict` right after `from_pretrained`: the sets that came along are those of the weights that came along."""
    named.fit_label_set(LABELS)
    named.save_pretrained(tmp_path)
    found = VS2CLIPForZeroShot.from_pretrained(tmp_path)
    found.sae.load_state_dict({name: 1.1 * tensor for name, tensor in named.sae.state_dict().items()})
    assert found.fitted_label_sets == ()


def test_steps_are_recognised_by_gamma_and_lambda(named, tmp_path):
    """A set that was fitted under one gamma must not be found under another after loading."""
    named.set_steering(method="vs2+distribution_norm")
    fitted = named.fit_label_set(LABELS)
    named.save_pretrained(tmp_path)
    found = VS2CLIPForZeroShot.from_pretrained(tmp_path)
    (loaded,) = found.fitted_label_sets
    assert found.fit_classes(fitted.class_embeds) is loaded
    for other in ({"gamma": 3.0}, {"lambda_": 0.1}, {"method": "corrected+distribution_norm"}):
        with found.steering(**other):
            assert found.fit_classes(fitted.class_embeds) is not loaded


def test_what_was_used_before_it_was_named(named, fits):
    """A set that a pipeline has fitted gets its name without a second fit, and is kept from then on."""
    tokenizer = hf_vs2.zero_shot_classifier(named, device="cpu").tokenizer
    classes = class_embeddings(named.clip, tokenizer, LABELS, ["This is a photo of {}."], clean=False)
    first = named.fit_classes(classes)
    by_name = named.fit_label_set(LABELS)
    assert fits.calls == 1 and by_name.fit is first.fit and by_name.labels == tuple(LABELS)
    assert named.fit_classes(classes) is by_name


def test_naming_what_is_not_fitted_is_refused(named):
    """VS2 fits nothing to labels: a set that is never used would be saved. Labels are checked as the pipeline does."""
    with named.steering(method="vs2"), pytest.raises(ValueError, match="'vs2' fits nothing to labels; these do"):
        named.fit_label_set(LABELS)
    assert named.fitted_label_sets == ()


def test_copies(named, images):
    """`copy.deepcopy(model)`, multiprocessing: what was fitted by name comes along, and what a copy does is its own."""
    fitted = named.fit_label_set(LABELS)
    for other in (copy.deepcopy(named), pickle.loads(pickle.dumps(named))):
        (came,) = other.fitted_label_sets
        assert came.labels == fitted.labels and torch.equal(came.fit.prototypes, fitted.fit.prototypes)
        other.fit_label_set(["dog", "cat"])
        assert len(named.fitted_label_sets) == 1
        other.set_domain_statistics(measure_statistics(other.sae, other.domain_statistics.rows.float()))
        assert other.fitted_label_sets == () and len(named.fitted_label_sets) == 1
    assert copy.copy(named).fit_label_set(LABELS) is fitted, "shallow copies share it"


# Checkpoints


def test_an_sae_checkpoint_is_enough(named, images, tmp_path):
    """What training and calibration leave is an SAE: `zero_shot_classifier(folder)` with a method beyond VS2 works on it."""
    named.sae.config.base_model_name_or_path = CLIP_PATH
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
