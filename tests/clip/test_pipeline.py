"""The pipelines: transformers' own on a VS2 checkpoint, and ours, as someone who only knows `pipeline(...)` meets them."""

import copy
import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_models import make_sae
from PIL import Image
from steered import noise_images
from tokenizers import normalizers
from transformers import AutoProcessor, BlipConfig, BlipModel, CLIPModel, pipeline
from transformers.pipelines.pt_utils import KeyDataset
from transformers.utils import is_torchvision_available

import hf_vs2
from hf_vs2 import VS2CLIPForZeroShot, VS2ZeroShotImageClassificationPipeline
from hf_vs2.data.images import UnreadableImageError
from hf_vs2.encoders.processing import load_processing
from hf_vs2.files.weight_state import weights_state
from hf_vs2.steering.corpus import RetrievalCorpus


# A real (if tiny) CLIP with its tokenizer and image processor files: 28-pixel images, 96 wide, 3 layers.
CLIP_PATH = str(Path(hf_vs2.__file__).parent / "demo_assets")
STOCK_TASK, OUR_TASK = "zero-shot-image-classification", "vs2-zero-shot-image-classification"
LABELS = ["three", "a zero", "digit {7}", "nine of them"]
NO_GATE = {"gate": None, "fvu_quantiles": None}


@pytest.fixture(scope="module")
def images():
    return noise_images(7)


def load_clip():
    return CLIPModel.from_pretrained(CLIP_PATH, dtype=torch.float32)


@pytest.fixture()
def model(images):
    """Steered enough to show in the scores; its gate of 0.5 lets about half of `images` pass."""
    clip = load_clip()
    vs2 = VS2CLIPForZeroShot(clip, make_sae(clip, **NO_GATE))
    pixels = load_processing(CLIP_PATH)[1](images, return_tensors="pt")["pixel_values"]
    fvu = vs2.image_features(pixels).fvu.sort().values
    vs2.sae.config.fvu_quantiles = {"0.5": fvu[3:5].mean().item(), "0.99": 2 * fvu[-1].item()}  # none on the edge
    return vs2


@pytest.fixture()
def classifier(model):
    return hf_vs2.zero_shot_classifier(model, device="cpu")


def count_calls(module):
    """A list that grows by one entry with every forward pass of `module`."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def scores(result):
    """Scores by label, one row an image, in the order of the labels' names."""
    results = [result] if isinstance(result[0], dict) else result
    return torch.tensor(
        [[one["score"] for one in sorted(image, key=lambda one: one["label"])] for image in results],
        dtype=torch.float64,
    )


# Where torchvision is installed, transformers' Auto classes resize with it; the helper and extraction resize with Pillow.
TOLERANCE = 2e-3 if is_torchvision_available() else 1e-5


def assert_same(found, expected, atol=TOLERANCE):
    torch.testing.assert_close(scores(found), scores(expected), rtol=0, atol=atol)


# The stock pipeline and ours


def test_stock_pipeline_runs_a_vs2_checkpoint(model, images, tmp_path):
    """`pipeline(task, model=id)` must find model, tokenizer and image processor in one folder, and steer."""
    model.set_steering(gate=0.5)
    model.save_pretrained(tmp_path)
    stock = pipeline(STOCK_TASK, model=str(tmp_path), device="cpu", dtype="float32")
    found = stock(images, candidate_labels=LABELS)

    tokenizer, processor = load_processing(CLIP_PATH)
    prompts = [f"This is a photo of {label}." for label in LABELS]
    inputs = {**tokenizer(prompts, return_tensors="pt", padding=True), **processor(images, return_tensors="pt")}
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.softmax(-1)
    order = sorted(range(len(LABELS)), key=LABELS.__getitem__)
    torch.testing.assert_close(scores(found), expected[:, order].double(), rtol=0, atol=TOLERANCE)

    by_instance = pipeline(STOCK_TASK, model=model, tokenizer=tokenizer, image_processor=processor, device="cpu")
    assert_same(by_instance(images, candidate_labels=LABELS), found)
    assert_same(pipeline(OUR_TASK, model=str(tmp_path), device="cpu", dtype="float32")(images, LABELS), found)


@pytest.mark.parametrize("door", ["pipeline_class", "task", "helper by path", "helper by model"])
def test_plain_clip_scores_as_in_the_stock_pipeline(door, images):
    """Whoever swaps the pipeline must not see other numbers, whatever the door, batch size, template or image mode."""
    stock = pipeline(STOCK_TASK, model=CLIP_PATH, device="cpu", dtype="float32")
    settings = {"device": "cpu", "dtype": "float32"}
    ours = {
        "pipeline_class": lambda: pipeline(
            STOCK_TASK, model=CLIP_PATH, pipeline_class=VS2ZeroShotImageClassificationPipeline, **settings
        ),
        "task": lambda: pipeline(OUR_TASK, model=CLIP_PATH, local_files_only=True, **settings),
        "helper by path": lambda: hf_vs2.zero_shot_classifier(Path(CLIP_PATH), **settings),
        "helper by model": lambda: hf_vs2.zero_shot_classifier(load_clip(), device="cpu"),
    }[door]()
    assert isinstance(ours, VS2ZeroShotImageClassificationPipeline)
    modes = [image.convert(mode) for image, mode in zip(images, ["RGB", "RGBA", "L", "P", "CMYK"], strict=False)]
    for options in ({}, {"hypothesis_template": "art of {}"}):
        expected = stock(modes, candidate_labels=LABELS, **options)
        found = ours(modes, candidate_labels=LABELS, batch_size=2, **options)
        assert_same(found, expected)
        assert found[0] == sorted(found[0], key=lambda one: -one["score"])
        assert_same(ours(modes[0], LABELS, **options), stock(modes[0], candidate_labels=LABELS, **options))
    raw = ["three", "a_zero", "001.nine"]  # read by our rules unless told otherwise
    expected = stock(modes[0], candidate_labels=raw)
    assert_same(ours(modes[0], raw, clean=False), expected)
    assert (scores(ours(modes[0], raw)) - scores(expected)).abs().max() > 2 * TOLERANCE


def test_half_precision_is_nearer_to_float32_than_the_stock_pipeline(images):
    """bfloat16 logits have 8 bits; ours are float32, so only the towers round."""
    exact = pipeline(STOCK_TASK, model=CLIP_PATH, device="cpu", dtype="float32")(images, candidate_labels=LABELS)
    settings = {"model": CLIP_PATH, "device": "cpu", "dtype": torch.bfloat16}
    ours = pipeline(OUR_TASK, **settings)(images, LABELS, batch_size=4)
    stock = pipeline(STOCK_TASK, **settings)(images, candidate_labels=LABELS)
    error = (scores(ours) - scores(exact)).abs().mean()
    assert 0 < error < 0.02
    assert error <= (scores(stock) - scores(exact)).abs().mean()


# Prompts are encoded once


def test_each_label_set_is_encoded_once(classifier, model, images):
    """Encoding 1000 labels costs more than an image: once is enough for any number of images, batches and calls."""
    texts, pictures = count_calls(model.clip.text_model), count_calls(model.clip.vision_model)
    for batch_size in (1, 4):
        classifier(images, LABELS, batch_size=batch_size)
    next(iter(classifier(iter(images), LABELS, gamma=2.0)))
    assert (len(texts), len(pictures)) == (1, 7 + 2 + 1)
    other = classifier(images[0], ["cat", "dog"])
    ensemble = classifier(images[0], LABELS, templates="ensemble")
    assert len(texts) == 3
    assert classifier(images[0], ["cat", "dog"]) == other
    assert classifier(images[0], LABELS, templates="ensemble") == ensemble
    assert len(texts) == 3
    assert_same(
        classifier(images[0], LABELS, templates="single"),
        classifier(images[0], LABELS, hypothesis_template="a photo of a {}."),
    )
    assert scores(ensemble).sub(scores(classifier(images[0], LABELS))).abs().max() > 1e-3


def test_a_call_compares_weights_once(classifier, model, images, monkeypatch):
    """On a GPU each comparison waits for the device: it must not be asked for once a batch."""
    compared = []

    def compare(weights):
        compared.append(weights)
        return weights_state(weights)

    for module in ("clip.pipeline", "steering.label_sets"):
        monkeypatch.setattr(f"hf_vs2.{module}.weights_state", compare)
    model.set_domain_statistics(hf_vs2.measure_statistics(model.sae, torch.randn(40, model.sae.config.hidden_size)))
    for count in (1, 7):
        compared.clear()
        classifier(images[:count], LABELS, batch_size=1, method="prototypes")
        assert len(compared) == 2, "the prompts', and those that the label set was fitted with"


def test_least_recently_used_label_sets_go_first(model, images, monkeypatch):
    """A service that takes labels from its users must not fill the memory, nor forget the labels everyone asks for."""
    projection = model.config.clip_config.projection_dim
    monkeypatch.setattr(VS2ZeroShotImageClassificationPipeline, "max_cached_floats", 2 * 3 * projection)
    classifier = hf_vs2.zero_shot_classifier(model, device="cpu")
    texts = count_calls(model.clip.text_model)
    sets = [[f"{name} {number}" for number in range(3)] for name in ("cat", "dog", "fox")]
    for labels, encoded in [(0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)]:
        classifier(images[0], sets[labels])
        assert len(texts) == encoded
    large = [f"bird {number}" for number in range(20)]
    classifier(images[:2], large, batch_size=1)
    assert len(texts) == 5, "a set larger than the limit is kept while it is used"


def round_to_half_and_back(clip):
    clip.to(torch.bfloat16).to(torch.float32)


def merge_into_one_weight(clip):
    clip.text_model.encoder.layers[0].self_attn.q_proj.weight.data += 0.05


@torch.no_grad()
def edit_one_entry(clip):
    clip.text_model.final_layer_norm.bias[5] += 3.0


def replace_projection(clip):
    clip.text_projection = torch.nn.Linear(64, 64, bias=False)


@pytest.mark.parametrize("change", [round_to_half_and_back, merge_into_one_weight, edit_one_entry, replace_projection])
def test_changed_text_weights_are_noticed(change, classifier, model, images):
    """Class embeddings of old weights would score new images wrongly, and nothing would tell."""
    before = classifier(images, LABELS)
    change(model.clip)
    found = classifier(images, LABELS)
    expected = hf_vs2.zero_shot_classifier(model, device="cpu")(images, LABELS)
    assert found == expected
    assert found != before


def test_another_tokenizer_is_noticed(classifier, images):
    """A tokenizer given later reads the same labels as other tokens."""
    before = classifier(images[0], LABELS)
    classifier.tokenizer = copy.deepcopy(classifier.tokenizer)
    assert classifier(images[0], LABELS) == before
    classifier.tokenizer = copy.deepcopy(classifier.tokenizer)
    classifier.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("three", "seven")
    assert classifier(images[0], LABELS) != before


# What people give as images


def test_every_collection_gives_what_the_stock_pipeline_gives(classifier, images):
    """Lists give lists, data sets and generators iterators, in order; a short last batch must not shift or drop images."""
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    expected = classifier(images, LABELS)
    assert isinstance(expected, list) and len(expected) == len(images)
    dataset = Dataset.from_dict({"image": images}, features=Features({"image": ImageFeature()}))
    undecoded = dataset.cast_column("image", ImageFeature(decode=False))
    for collection in (tuple(images), dataset["image"], undecoded["image"]):
        found = classifier(collection, LABELS, batch_size=3)
        assert isinstance(found, list)
        assert_same(found, expected)
    for collection in (KeyDataset(dataset, "image"), (image for image in images), dict(enumerate(images)).values()):
        found = classifier(collection, LABELS, batch_size=3)
        assert not isinstance(found, list)
        assert_same(list(found), expected)
    for num_workers in (0, 1):
        found = classifier(KeyDataset(dataset, "image"), LABELS, batch_size=3, num_workers=num_workers)
        assert_same(list(found), expected)
    assert classifier([], LABELS) == []


def test_a_generator_is_read_as_results_are_taken(classifier, images):
    """A long stream must give results at once, also with transformers 5.6, which by itself would read it to its end first."""
    read = []
    stream = (read.append(number) or images[number % 7] for number in range(60))
    results = classifier(stream, LABELS, batch_size=4)
    assert read == []
    found = list(itertools.islice(results, 6))
    assert len(read) == 8
    assert_same(found, classifier(images[:6], LABELS))


def test_many_images_are_taken_in_batches_unless_told_otherwise(model, images):
    """Called without `batch_size`, a list must not run at the speed of one image at a time; who names one must get it; and of
    a camera or a queue, no answer may wait for the images after it."""
    many = images * 5
    classifier = hf_vs2.zero_shot_classifier(model, device="cpu")
    expected = classifier(many, LABELS, batch_size=1)
    passes = count_calls(model.clip.vision_model)
    for collection in (many, tuple(many), KeyDataset([{"image": image} for image in many], "image")):
        passes.clear()
        assert_same(list(classifier(collection, LABELS)), expected)
        assert len(passes) == 3, "16, 16, and the 3 that are left"
    passes.clear()
    classifier(many, LABELS, batch_size=7)
    fixed = hf_vs2.zero_shot_classifier(model, device="cpu", batch_size=7)
    assert_same(fixed(many, LABELS), expected)
    assert len(passes) == 5 + 5
    fixed(many, LABELS, batch_size=1)
    assert len(passes) == 5 + 5 + 35
    read = []
    results = classifier((read.append(number) or image for number, image in enumerate(many)), LABELS)
    for number, found in zip(range(1, 4), results, strict=False):
        assert_same(found, expected[number - 1])
        assert len(read) == number


def test_a_file_opened_once_and_given_often_is_read_whole(classifier, images, tmp_path, monkeypatch):
    """Pillow loads an opened file at its first use; two threads at it would damage each other's pixels. Whoever stops half-way
    must not leave threads behind."""
    monkeypatch.setattr("hf_vs2.clip.pipeline.num_processors", lambda: 4)
    large = images[0].resize((700, 500))
    expected = classifier([large] * 2, LABELS)
    large.save(tmp_path / "image.png")
    before = threading.active_count()
    for _ in range(5):
        opened = Image.open(tmp_path / "image.png")
        assert_same(classifier([opened, large, opened, opened, large], LABELS), [*expected, *expected, expected[0]])
    results = iter(classifier(KeyDataset([{"image": large}] * 20, "image"), LABELS, batch_size=4))
    next(results)
    del results
    assert threading.active_count() == before


# Steering


def test_steering_options_hold_for_one_call(classifier, model, images):
    """Options of a call must act as the model's own settings would, and leave no trace on the model."""
    settings, config = model.steering_settings, model.config.to_dict()
    default = classifier(images, LABELS)
    seen = []
    for options in (
        *({"method": method} for method in ("none", "centroid", "reconstruct", "amplify", "vs2")),
        *({"gamma": 3.0}, {"gamma": [1.0, 2.0] * 192}, {"lambda_": 0.7}, {"gate": 0.5}),
        *({"fvu_threshold": 0.5}, {"edits": {"set": {3: 40.0}}}, {"steer": False}),
    ):
        found = classifier(images, LABELS, batch_size=4, **options)
        with model.steering(**({"enabled": False} if "steer" in options else options)):
            assert_same(classifier(images, LABELS), found)
        seen.append(found)
    assert (model.steering_settings, model.config.to_dict()) == (settings, config)
    assert_same(seen[0], seen[-1])
    assert_same(seen[4], default)
    assert all(found != default for number, found in enumerate(seen) if number != 4)

    results = iter(classifier(iter(images), LABELS, gamma=9.0))
    assert next(results) != default[0]
    assert model.steering_settings == settings, "a generator left half-way holds no setting"
    with pytest.raises(UnreadableImageError):
        classifier([images[0], b"broken"], LABELS, gamma=9.0)
    assert classifier(images, LABELS) == default


def test_vs2pp_takes_the_labels_of_the_call(model, images, tmp_path):
    """A checkpoint with a corpus needs no more than `method="vs2++"`; other labels give other pseudo-labels. The stock pipeline
    must agree, whose prompts are those of the call too."""
    image_processor = load_processing(CLIP_PATH)[1]
    pixels = image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        rows = model.clip.vision_model(pixel_values=pixels).last_hidden_state[:, 0]
    classifier = hf_vs2.zero_shot_classifier(model, device="cpu")
    with pytest.raises(ValueError, match="needs a corpus"):
        classifier(images, LABELS, method="vs2++")
    model.set_corpus(RetrievalCorpus.from_store(rows, clip=model.clip))
    model.save_pretrained(tmp_path)
    classifier = hf_vs2.zero_shot_classifier(tmp_path, device="cpu")
    options = {"method": "vs2++", "num_neighbors": 4, "positives": "query", "lambda_": 9.0}
    found = classifier(images, LABELS, batch_size=3, **options)
    assert found != classifier(images, LABELS)
    assert found != classifier(images, LABELS, **{**options, "positives": "majority"})
    classifier.model.set_steering(**options)
    parts = {"tokenizer": classifier.tokenizer, "image_processor": image_processor}
    stock = pipeline(STOCK_TASK, model=classifier.model, device="cpu", **parts)
    assert_same(stock(images, candidate_labels=LABELS), found)
    details = classifier(images, LABELS, return_details=True)
    assert_same([one["predictions"] for one in details], found)
    assert_same([one["plain"] for one in details], classifier(images, LABELS, steer=False))


def test_options_given_at_construction_are_defaults(model, images):
    """`zero_shot_classifier(id, candidate_labels=..., gate=...)` spares repeating; a call overrides, one option at a time."""
    fixed = hf_vs2.zero_shot_classifier(
        model, device="cpu", candidate_labels=LABELS, gate=0.5, gamma=3.0, top_k=2, templates="single", batch_size=4
    )
    plain = hf_vs2.zero_shot_classifier(model, device="cpu")
    options = {"gate": 0.5, "gamma": 3.0, "templates": "single"}
    expected = plain(images, LABELS, **options)
    assert_same(fixed(images), [found[:2] for found in expected])
    assert_same(fixed(images, top_k=None), expected)
    options = {"fvu_threshold": 0.0, "gamma": 3.0, "hypothesis_template": "{}"}
    assert_same(
        fixed(images, ["cat", "dog"], fvu_threshold=0.0, hypothesis_template="{}"),
        plain(images, ["cat", "dog"], **options),
    )
    assert_same(fixed(images, steer=False, top_k=9), plain(images, LABELS, steer=False, templates="single"))


def test_threads_do_not_meet_each_others_options(classifier, images):
    """A web service answers several requests at once on one model."""
    gammas = [1.0, 1.5, 2.0, 4.0] * 8
    expected = {gamma: classifier(images[:3], LABELS, gamma=gamma) for gamma in set(gammas)}
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda gamma: classifier(images[:3], LABELS, gamma=gamma), gammas))
    for gamma, result in zip(gammas, found, strict=True):
        assert_same(result, expected[gamma])


def test_details_tell_what_steering_did(classifier, model, images):
    """FVU, gate decision and plain CLIP's scores come with the steered ones, from the same pass through the vision tower."""
    passes = count_calls(model.clip.vision_model)
    found = classifier(images, LABELS, gate=0.5, return_details=True, batch_size=4)
    assert len(passes) == 2
    assert [set(one) for one in found] == [{"predictions", "plain", "fvu", "steered", "similarity"}] * len(images)
    assert [one["steered"] for one in found] == [one["fvu"] <= model.sae.fvu_threshold(0.5) for one in found]
    assert {one["steered"] for one in found} == {True, False}
    assert_same([one["predictions"] for one in found], classifier(images, LABELS, gate=0.5))
    assert_same([one["plain"] for one in found], classifier(images, LABELS, steer=False))
    assert all((one["predictions"] == one["plain"]) != one["steered"] for one in found)
    json.dumps(found)

    alone = classifier(images[0], LABELS, gate=0.5, return_details=True, top_k=1)
    assert len(alone["predictions"]) == len(alone["plain"]) == 1
    off = classifier(images[0], LABELS, steer=False, return_details=True)
    untouched = {"predictions": off["plain"], "plain": off["plain"], "fvu": None, "steered": False}
    assert off == untouched | {"similarity": alone["similarity"]}
    plain_clip = hf_vs2.zero_shot_classifier(model.clip, device="cpu", return_details=True)
    assert plain_clip(images[0], LABELS) == off


def test_details_of_several_saes(images):
    """With an inner layer steered the plain scores need a pass of their own; FVU and decisions come one a layer."""
    clip = load_clip()
    model = VS2CLIPForZeroShot(
        clip, {layer: make_sae(clip, layer=layer, **NO_GATE) for layer in (1, 2)}, fvu_threshold=0.9
    )
    classifier = hf_vs2.zero_shot_classifier(model, device="cpu")
    found = classifier(images, LABELS, return_details=True, batch_size=4)
    assert [(len(one["fvu"]), len(one["steered"])) for one in found] == [(2, 2)] * len(images)
    assert_same([one["plain"] for one in found], classifier(images, LABELS, steer=False))
    assert_same([one["predictions"] for one in found], classifier(images, LABELS))


def test_explanations_come_with_the_same_scores_and_one_pass(classifier, model, images):
    """`explain=True` adds why to each answer: the answers, the gate and the cost of the tower must be those without it."""
    pictures = count_calls(model.clip.vision_model)
    plain = classifier(images, LABELS, return_details=True, gate=0.5)
    encoded = len(pictures)
    explained = classifier(images, LABELS, return_details=True, gate=0.5, explain=True, top_latents=3)
    assert len(pictures) == 2 * encoded, "the images were encoded again"
    reference = model.explain(images, LABELS, processor=(classifier.tokenizer, classifier.image_processor))
    for number, (found, expected) in enumerate(zip(explained, plain, strict=True)):
        explanations = {one["label"]: one.pop("explanation") for one in found["predictions"]}
        assert found == expected
        for label, parts in explanations.items():
            assert len(parts["latents"]) == (3 if found["steered"] else 0) and json.dumps(parts)
            listed = sum(one["contribution"] for one in parts["latents"])
            assert parts["plain"] + parts["normalisation"] + parts["others"] + listed == pytest.approx(
                parts["steered"]
            )
            if found["steered"]:
                expected_top = reference.top(label, 3, number)
                assert [one["latent"] for one in parts["latents"]] == [one["latent"] for one in expected_top]
    assert 0 < sum(found["steered"] for found in explained) < len(images)

    single = classifier(images[0], LABELS, explain=True, latent_names={n: f"latent {n}" for n in range(400)}, top_k=1)
    assert len(single) == 1 and all(
        one["name"] == f"latent {one['latent']}" for one in single[0]["explanation"]["latents"]
    )
    stream = list(classifier(iter(images), LABELS, explain=True, batch_size=3))
    one_by_one = [classifier(image, LABELS, explain=True) for image in images]
    for many, one in zip(stream, one_by_one, strict=True):
        assert_same(many, one)
        assert [len(each["explanation"]["latents"]) for each in many] == [5] * len(LABELS)


# Checkpoints


def test_missing_tokenizer_files_are_noticed(classifier, model, images, tmp_path):
    """transformers makes up an empty tokenizer for a CLIP then, with which all labels score nearly the same."""
    for folder in ("clip", "vs2"):
        (model.clip if folder == "clip" else model).save_pretrained(tmp_path / folder)
        classifier.image_processor.save_pretrained(tmp_path / folder)
        for file in (tmp_path / folder).glob("tokenizer*"):
            file.unlink()
    with pytest.raises(ValueError, match="knows no words"):
        pipeline(OUR_TASK, model=str(tmp_path / "clip"), device="cpu")
    with pytest.raises(OSError, match="holds no tokenizer files"):
        hf_vs2.zero_shot_classifier(tmp_path / "clip", device="cpu")
    found = hf_vs2.zero_shot_classifier(tmp_path / "vs2", device="cpu", dtype=torch.float32)(images, LABELS)
    assert_same(found, classifier(images, LABELS))  # with the tokenizer of the CLIP that the checkpoint names


def test_auto_processor_reads_text_and_images(model, images, tmp_path):
    """`AutoProcessor.from_pretrained(id)` is how people call a CLIP without a pipeline; a tokenizer alone would ignore the images."""
    model.save_pretrained(tmp_path)
    inputs = AutoProcessor.from_pretrained(tmp_path)(text=LABELS, images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**inputs).logits_per_image
    assert logits.shape == (len(images), len(LABELS)) and logits.isfinite().all()


def test_saved_pipeline_needs_no_remote_code(classifier, images, tmp_path):
    """transformers writes the code of registered pipelines into checkpoints, which from then on load only when trusted."""
    classifier.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.py")] == ["hf_vs2_shim.py"]
    assert "custom_pipelines" not in json.loads((tmp_path / "config.json").read_text())
    again = pipeline(OUR_TASK, model=str(tmp_path), device="cpu", dtype="float32")
    assert_same(again(images, LABELS), classifier(images, LABELS))


def test_other_models_are_refused():
    """They would give numbers that mean nothing."""
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    other = BlipModel(BlipConfig(text_config={**tower, "vocab_size": 9}, vision_config={**tower, "image_size": 16}))
    tokenizer, processor = load_processing(CLIP_PATH)
    with pytest.raises(TypeError, match="not BlipModel.*transformers' own"):
        pipeline(OUR_TASK, model=other, tokenizer=tokenizer, image_processor=processor)
    nameless = CLIPModel(CLIPModel.config_class.from_pretrained(CLIP_PATH))
    nameless.config._name_or_path = ""
    with pytest.raises(ValueError, match="give tokenizer= and image_processor="):
        hf_vs2.zero_shot_classifier(nameless)


# Mistakes


@pytest.mark.parametrize(
    ("labels", "options", "error", "message"),
    [
        (None, {}, ValueError, "candidate_labels is missing"),
        (LABELS, {"top_k": 0}, ValueError, "top_k must be"),
        (LABELS, {"gama": 2.0}, TypeError, "Unknown option 'gama'.*gamma"),
        (LABELS, {"hypothesis_template": "{}", "templates": "single"}, ValueError, "exclude each other"),
        (LABELS, {"method": "vs3"}, ValueError, "method='vs3' is not known"),
        (LABELS, {"gate": 0.3}, ValueError, "0.3"),
        (LABELS, {"gate": 0.5, "fvu_threshold": 0.5}, ValueError, "exclude each"),
        (LABELS, {"steer": False, "gamma": 2.0}, ValueError, "steer=False and gamma= exclude each other"),
    ],
)
def test_mistakes_are_named_before_the_first_image(labels, options, error, message, classifier):
    """Hours into a stream is too late to read that an option was misspelt. Labels and templates: tests/test_every_door.py."""
    with pytest.raises(error, match=message):
        classifier(iter([b"never read"]), labels, **options)


def test_plain_clip_refuses_steering_options(images):
    """gamma= on a model without SAE would change nothing, silently."""
    with pytest.raises(ValueError, match=r"\(gamma\), but this is a plain CLIP without SAE"):
        hf_vs2.zero_shot_classifier(load_clip(), device="cpu")(images[0], LABELS, gamma=2.0)


def test_what_is_no_image_is_named(classifier, images):
    """A list in a list, a row of a data set, a batch: what was given, and what is expected. Files: tests/test_every_door.py."""
    from datasets import Dataset

    rows = Dataset.from_dict({"image": [{"bytes": b"no", "path": None}] * 2, "label": [0, 1]})
    for given, error, message in [
        ([images[0], None], TypeError, "image 1 is None: expected a path"),
        ([[images[0]]], TypeError, "image 0 is a list"),
        (3, TypeError, "a int is neither"),
        (rows, TypeError, "image 0 is a dict with .*KeyDataset"),
        (np.zeros((2, 9, 9, 3), dtype=np.uint8), UnreadableImageError, "the image cannot be read"),
    ]:
        with pytest.raises(error, match=message):
            list(classifier(given, LABELS))
