"""Label sets that were fitted: what is kept, when it is dropped, and what of it is saved with the model."""

import copy
import json
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from steered import classes_of, cls_rows, logits, make_inputs, noise_images, scored_demo, scored_tiny
from torch.nn.functional import normalize
from toy import forget_digests

import hf_vs2
from hf_vs2 import VS2CLIPForZeroShot, measure_statistics, zero_shot_classifier
from hf_vs2.config.latent_edits import LatentEdits
from hf_vs2.data.labels.prompts import class_embeddings
from hf_vs2.files.checkpoint_folder import CheckpointFolder
from hf_vs2.methods import METHODS, prototypes
from hf_vs2.steering import label_sets as label_scoring


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


@pytest.mark.parametrize("how", ["data of the SAE", "top_k", "statistics"])
def test_what_was_fitted_by_name_follows_too(named, how, tmp_path):
    """It is saved with the model: prototypes of other weights must not get into a checkpoint, used since or not."""
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


def test_sets_that_nobody_asks_for_are_dropped(model, tiny_clip, fits, monkeypatch):
    """A service that is asked for ever new labels must not fill the memory. In which order: tests/clip/test_pipeline.py."""
    model.set_steering(method="prototypes")
    sets = [classes_of(tiny_clip, seed) for seed in range(3)]
    one = model.fit_classes(sets[0]).fit.num_floats
    monkeypatch.setattr(model._steerer.label_sets._recent, "capacity", 2 * one)
    for number in (1, 2, 1, 2, 0):
        model.fit_classes(sets[number])
    assert fits.calls == 4, "two are kept"
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
