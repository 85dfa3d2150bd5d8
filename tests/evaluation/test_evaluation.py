"""The comparison: its figures must be those of the full model, its intervals honest, its controls the real ones."""

import json

import datasets
import numpy as np
import pytest
import torch
from conftest import make_tiny_clip
from PIL import Image
from safetensors import safe_open
from torch.nn.functional import normalize
from transformers import CLIPImageProcessorPil
from words import NAMES, compared_model, make_word_tokenizer

from hf_vs2.clip.modeling import VS2CLIPForZeroShot
from hf_vs2.config.sae import SAEConfig
from hf_vs2.data.labels.prompts import class_embeddings
from hf_vs2.data.stores.activations import extract_activations
from hf_vs2.evaluation import EvaluationResult, evaluate, paired_bootstrap
from hf_vs2.evaluation.controls import control_model
from hf_vs2.evaluation.methods import evaluation_methods
from hf_vs2.evaluation.metrics import few_of_each
from hf_vs2.functional.label_free import distribution_norm_scores
from hf_vs2.sae.modeling import SAEModel


N = 50


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(0)
    return torch.randn(N, 3, 32, 32)


@pytest.fixture(scope="module")
def rows(images):
    with torch.no_grad():
        return make_tiny_clip().vision_model(pixel_values=images).last_hidden_state[:, 0]


@pytest.fixture(scope="module")
def labels():
    return torch.randint(0, len(NAMES), (N,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokenizer():
    return make_word_tokenizer()


@pytest.fixture(scope="module")
def result(rows, labels, tokenizer):
    return evaluate(compared_model(rows, statistics=True), rows, labels, NAMES, tokenizer, batch_size=16)


# The figures


@torch.no_grad()
def test_replay_equals_the_full_model_on_the_images(images, rows, labels, tokenizer, result):
    """A table from cached rows is worth nothing unless it is the table of the model that a user deploys."""
    model = compared_model(rows, statistics=True)
    inputs = tokenizer([f"a photo of a {name}." for name in NAMES], padding=True, return_tensors="pt")
    inputs = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "pixel_values": images}
    settings = {
        "clip": {"enabled": False},
        "centroid": {"method": "centroid"},
        "reconstruct": {"method": "reconstruct"},
        "amplify": {"method": "amplify"},
        "vs2": {"method": "vs2"},
        "vs2+gate": {"method": "vs2", "gate": 0.99},
        **{
            name: {"method": name}
            for name in ("corrected+distribution_norm", "balanced_norm", "balanced_prototypes", "prototypes")
        },
        **{name: {"method": name} for name in ("prototypes+pca", "prototypes+sae")},
        "prototypes+gate": {"method": "prototypes", "gate": 0.9},  # what 10 held-out rows can vouch for
    }
    controls = {"vs2_random": "random", "vs2_pca": "pca", "prototypes+random": "random"}
    settings |= {name: {"method": "prototypes+sae" if "+" in name else "vs2"} for name in controls}
    changed = set()
    for method, setting in settings.items():
        tried = control_model(model, controls[method]) if method in controls else model
        with tried.steering(**setting):
            output = tried(**inputs)
        row, samples = result.row(method), result.samples[result.index(method)]
        predictions = output.logits_per_image.argmax(-1)
        assert torch.equal(samples.predictions, predictions), method
        assert torch.equal(samples.steered, output.steered), method
        assert row["coverage"] == pytest.approx(output.steered.float().mean().item()), method
        assert row["top1"] == pytest.approx(100 * (predictions == labels).float().mean().item()), method
        top5 = (output.logits_per_image.topk(5).indices == labels[:, None]).any(-1)
        assert row["top5"] == pytest.approx(100 * top5.float().mean().item()), method
        if method != "clip" and output.fvu is not None:
            assert row["mean_fvu"] == pytest.approx(output.fvu.mean().item(), rel=1e-4), method
        changed.add(tuple(predictions.tolist()))
    assert len(changed) > 3  # the methods differ here, or this test would prove little


def test_gains_are_paired_with_plain_clip(labels, result):
    """Gain, fixed, broken and per-class accuracy must add up, image by image."""
    right = [samples.predictions == labels for samples in result.samples]
    for index, row in enumerate(result.rows):
        plain = right[result.index("clip", row["prompts"])]
        assert row["fixed"] == (right[index] & ~plain).sum()
        assert row["broken"] == (plain & ~right[index]).sum()
        assert row["gain"] == pytest.approx(100 * (row["fixed"] - row["broken"]) / N, abs=1e-3)
        low, high = row["gain_ci"]
        assert low <= row["gain"] <= high
        by_class = [100 * right[index][labels == c].float().mean().item() for c in range(len(NAMES))]
        assert result.per_class["accuracy"][index] == pytest.approx(by_class, abs=1e-3)
    assert sum(result.per_class["support"]) == N


def test_schema(result, tmp_path):
    """The result file's fields are a contract: tables, cards and other people's scripts read them."""
    content = json.loads(result.to_json(tmp_path / "results.json").read_text())
    fields = {"method", "prompts", "top1", "top5", "gain", "gain_ci", "coverage", "mean_fvu", "n", "tau"}
    fields |= {"gamma", "lambda"}
    assert all(fields | {"seconds"} <= set(row) for row in content["rows"])
    names = [(row["method"], row["prompts"], row.get("coefficient")) for row in content["rows"]]
    one_set = [(m, 0.25 if m == "distribution_norm" else None) for m in evaluation_methods()]
    assert names == [(method, prompts, c) for prompts in ("single", "ensemble") for method, c in one_set]
    clip, gated = content["rows"][0], result.row("vs2+gate")
    assert (clip["gain"], clip["gain_ci"], clip["coverage"]) == (0, [0, 0], 0)
    assert (clip["gamma"], clip["lambda"], clip["tau"], clip["mean_fvu"]) == (None, None, None, None)
    assert (gated["gamma"], gated["lambda"], gated["gate"], gated["n"]) == (1.5, 2.1, 0.99, N)
    assert content["meta"]["templates"]["single"] == ["a photo of a {}."]
    assert {"hf_vs2_version", "versions", "base_model", "seed", "num_classes"} <= set(content["meta"])
    assert EvaluationResult.from_json(tmp_path / "results.json").rows == result.rows


def test_batches_do_not_change_the_result(rows, labels, tokenizer, result):
    """Rows stream in batches; their size is a matter of memory, not of accuracy."""
    other = evaluate(
        compared_model(rows, statistics=True),
        rows,
        labels.tolist(),
        NAMES,
        tokenizer,
        batch_size=7,
        meta={"split": "test"},
    )
    for one, two in zip(result.samples, other.samples, strict=True):
        assert torch.equal(one.predictions, two.predictions)
    for one, two in zip(result.rows, other.rows, strict=True):
        exact = [key for key in one if key not in ("seconds", "mean_fvu")]
        assert [one[key] for key in exact] == [two[key] for key in exact]
        assert one["mean_fvu"] == (two["mean_fvu"] and pytest.approx(two["mean_fvu"], rel=1e-5))
    assert other.meta["split"] == "test"


def test_a_closed_gate_is_plain_clip_exactly(rows, labels, tokenizer):
    """With tau below every FVU nothing may change: the gate's promise is plain CLIP, not something close to it."""
    model = compared_model(rows, fvu_threshold=0.0)
    settings = model.steering_settings
    result = evaluate(model, rows, labels, NAMES, tokenizer, methods=("vs2", "vs2+gate"))
    for prompts in ("single", "ensemble"):
        row, clip = result.row("vs2+gate", prompts), result.row("clip", prompts)
        assert (row["gain"], row["coverage"], row["tau"], row["gate"]) == (0, 0, 0, None)
        assert (row["top1"], row["top5"]) == (clip["top1"], clip["top5"])
        samples = [result.samples[result.index(method, prompts)] for method in ("vs2+gate", "clip")]
        assert torch.equal(samples[0].predictions, samples[1].predictions)
        assert result.row("vs2", prompts)["coverage"] == 1  # the model's own gate must not leak into the ungated row
    assert model.steering_settings == settings


def test_where_the_gate_comes_from(rows, labels, tokenizer, caplog):
    """The model's own gate first, then the SAE's default; without calibration no row, and the log says why."""

    def taus(model, name="vs2+gate"):
        found = evaluate(model, rows, labels, NAMES, tokenizer, templates="single", methods=(name,)).rows
        return [(row["tau"], row["gate"]) for row in found if row["method"] == name]

    model = compared_model(rows)
    assert taus(model) == [(model.sae.fvu_threshold(0.99), 0.99)]
    model.set_steering(gate=0.9)
    assert taus(model) == [(model.sae.fvu_threshold(0.9), 0.9)]
    by_distance = compared_model(rows, statistics=True)
    by_distance.set_steering(method="prototypes", gate=0.9)
    assert taus(by_distance) == [(by_distance.sae.fvu_threshold(0.9), 0.9)]
    edited = compared_model(rows, statistics=True, gate=0.9)
    edited.set_steering(edits={"suppress": [3]})  # which asks the SAE, so that the gate goes by its FVU
    assert taus(edited, "distribution_norm+gate") == [(edited.sae.fvu_threshold(0.9), 0.9)]
    assert taus(compared_model(rows, calibrated=False)) == []
    assert "No 'vs2+gate' row" in caplog.text and "no calibrated FVU quantiles" in caplog.text


def test_one_gamma_a_latent_has_no_centroid_control(rows, labels, tokenizer):
    """A vector gamma must not crash the table: the control that cannot exist for it is left out."""
    model = compared_model(rows, gamma=torch.linspace(1, 2, 64))
    result = evaluate(model, rows, labels, NAMES, tokenizer, templates="single")
    assert "centroid" not in {row["method"] for row in result.rows}
    assert result.row("vs2")["gamma"] is None and len(result.meta["gamma_per_latent"]) == 64


def test_latents_changed_by_hand_are_recorded(rows, labels, tokenizer):
    """A table of an edited model must not pass for one of VS2."""
    model = compared_model(rows)
    plain = evaluate(model, rows, labels, NAMES, tokenizer, templates="single")
    model.set_steering(edits={"set": {3: 50.0}})
    edited = evaluate(model, rows, labels, NAMES, tokenizer, templates="single")
    assert plain.meta["edits"] is None and edited.meta["edits"] == {"set": {"3": 50.0}}


def test_prompt_sets(rows, labels, tokenizer, tmp_path):
    """Prompt sets as users write them: a file, a list of templates, several of them."""
    file = tmp_path / "mine.txt"
    file.write_text("a photo of a {}.\n")
    model = compared_model(rows)

    def names(templates):
        result = evaluate(model, rows, labels, NAMES, tokenizer, templates=templates, methods=())
        return [(row["prompts"], row["top1"]) for row in result.rows]

    single = names("single")[0][1]
    assert names(str(file)) == names(["a photo of a {}."]) == [("custom", single)]
    assert names(["single", file, ["a photo of a {}."]]) == [
        ("single", single),
        ("custom", single),
        ("custom2", single),
    ]


def test_five_classes_have_no_top5(rows, labels, tokenizer):
    """Among five classes the right one is always among the top five: 100 % would look like an achievement."""
    result = evaluate(compared_model(rows), rows, labels % 5, NAMES[:5], tokenizer, templates="single", methods=())
    assert [row["top5"] for row in result.rows] == [None]


def test_works_in_bfloat16(rows, labels, tokenizer, result):
    """Half-precision CLIPs are what people load on a GPU; the table must be nearly the same."""
    model = compared_model(rows, statistics=True)
    model.clip.to(torch.bfloat16)
    half = evaluate(model, rows, labels, NAMES, tokenizer)
    agree = [one.predictions == two.predictions for one, two in zip(half.samples, result.samples, strict=True)]
    assert torch.stack(agree).float().mean() > 0.9 and half.meta["dtype"] == "bfloat16"


def test_a_store_brings_labels_and_class_names(images, labels, tokenizer, tmp_path):
    """From images on disk to the table without naming anything twice; a store of another CLIP or layer is refused."""
    pixels = ((images.clamp(-2, 2) + 2) * 63).byte().permute(0, 2, 3, 1)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    content = {"image": [Image.fromarray(one.numpy()) for one in pixels], "label": labels.tolist()}
    dataset = datasets.Dataset.from_dict(content, features=features)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})

    def extract(clip, layers):
        return extract_activations(
            clip, dataset, tmp_path, layers=layers, label_column="label", image_processor=processor, progress=False
        )

    store = extract(make_tiny_clip(), (0, -1))
    model = compared_model(store.tensor(layer=-1))
    from_store = evaluate(model, store, None, None, tokenizer, reference_rows=store, batch_size=16)
    rows = store.tensor(layer=-1)
    from_tensor = evaluate(model, rows, labels, NAMES, tokenizer, batch_size=16, reference_rows=rows)
    assert [row["top1"] for row in from_store.rows] == [row["top1"] for row in from_tensor.rows]
    assert from_store.meta["dataset"]["fingerprint"] == store.metadata["dataset"]["fingerprint"]
    with pytest.raises(ValueError, match=r"holds layers \[0\], not 2: extract"):
        evaluate(model, extract(make_tiny_clip(), (0,)), None, None, tokenizer)
    # Several stores are one set: labels are matched by name in it, too, and not where the names are others.
    both = [store, extract(make_tiny_clip(), (-1,))]
    told = {one: evaluate(model, both[::-1], None, one, tokenizer, methods=("clip",)).rows for one in (None,)}
    turned = evaluate(model, both, None, NAMES[::-1], tokenizer, methods=("clip",)).rows
    assert [row["top1"] for row in turned] == [row["top1"] for row in told[None]]
    both[1].metadata["class_names"] = NAMES[::-1]
    with pytest.raises(ValueError, match="different class names"):
        evaluate(model, both, None, NAMES, tokenizer, methods=("clip",))
    other = make_tiny_clip()
    other.vision_model.embeddings.class_embedding.data += 1
    with pytest.raises(ValueError, match="extracted with another CLIP"):
        evaluate(model, store, None, None, tokenizer, reference_rows=extract(other, (-1,)))


# Distribution normalisation


@pytest.mark.parametrize("statistics", [False, True])
@torch.no_grad()
def test_distribution_normalisation_with_other_training_rows(rows, labels, tokenizer, statistics):
    """A control without an SAE: by its equation, with an image mean of the training rows named, whether the checkpoint
    has its own or none."""
    model, train, test = compared_model(rows, statistics=statistics), rows[:30], rows[30:]
    model.set_steering(coefficient=0.3)
    wanted = ("distribution_norm", "full_distribution_norm", "balanced_norm")
    result = evaluate(model, test, labels[30:], NAMES, tokenizer, methods=wanted, reference_rows=train, batch_size=8)
    with model.steering(enabled=False):
        phi, mu = (normalize(model.image_features_from_cls(x).features, dim=-1) for x in (test, train))
    psi = class_embeddings(model.clip, tokenizer, NAMES, "ensemble")
    for method, coefficient in (("distribution_norm", 0.3), ("full_distribution_norm", 1.0)):
        scores = distribution_norm_scores(phi, psi, mu.mean(0), psi.mean(0), coefficient, "cosine")
        index = result.index(method, "ensemble")
        assert torch.equal(result.samples[index].predictions, scores.argmax(-1))
        assert result.rows[index]["reference"] == "train"
        assert result.rows[index].get("coefficient") == (0.3 if coefficient < 1 else None)
    others = [row for row in result.rows if row["method"] == "balanced_norm"]
    assert [row["reference"] for row in others] == (["checkpoint"] * 2 if statistics else [])
    # As printed in the paper, the text mean adds the same to each class.
    paper = distribution_norm_scores(phi, psi, mu.mean(0), psi.mean(0))
    shifted = distribution_norm_scores(phi, psi, mu.mean(0), torch.ones(24))
    assert torch.equal(shifted.argmax(-1), paper.argmax(-1))


# The interval


def test_bootstrap_equals_drawing_images():
    """The closed form must be the bootstrap over images that a reader would do by hand."""
    rng = np.random.default_rng(0)
    difference = rng.choice([-1, 0, 1], p=[0.08, 0.8, 0.12], size=400)
    drawn = [100 * rng.choice(difference, size=400).mean() for _ in range(20_000)]
    expected = np.quantile(drawn, [0.025, 0.975])
    found = paired_bootstrap(int((difference == 1).sum()), int((difference == -1).sum()), 400, num_resamples=20_000)
    assert found == pytest.approx(expected, abs=0.26)  # one image in 400 is 0.25 points
    assert paired_bootstrap(0, 0, 400) == (0, 0)
    one, same, other = (paired_bootstrap(300, 200, 5000, num_resamples=2000, seed=seed) for seed in (3, 3, 4))
    assert one == same != other


def test_interval_covers_the_true_gain_95_times_in_100():
    """An interval that misses the truth more often than it says would sell noise as a gain."""
    share, n = np.array([0.05, 0.87, 0.08]), 1000
    draws = np.random.default_rng(1).multinomial(n, share, size=2000)
    bounds = [
        paired_bootstrap(fixed, broken, n, num_resamples=500, seed=i) for i, (broken, _, fixed) in enumerate(draws)
    ]
    covered = np.mean([low <= 100 * (share[2] - share[0]) <= high for low, high in bounds])
    assert 0.93 < covered < 0.97


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": np.zeros((N, 32))}, "must be a tensor .* not ndarray"),
        ({"class_names": None}, "class_names are missing"),
        ({"methods": ("vs3",)}, "'vs3' is no row of a comparison. Use some of"),
        ({"methods": ("vs2_random+gate",)}, "may end in '.gate', but neither 'clip' nor controls"),
        ({"few_shot": 0}, "few_shot must be a whole number from 1"),
        ({"rows": torch.randn(7, 32), "labels": list(range(7)), "few_shot": 1}, "few_shot= needs classes with two"),
    ],
)
def test_bad_input_says_what_is_wrong(rows, labels, tokenizer, change, message):
    arguments = {"rows": rows, "labels": labels, "class_names": NAMES, "tokenizer": tokenizer} | change
    with pytest.raises((ValueError, TypeError), match=message):
        evaluate(compared_model(rows), **arguments)


# Real rows


def test_figures_on_real_rows(shared_data):
    """Plain CLIP and the centroid control on CIFAR-10 rows: figures that independent code measured before us."""
    from transformers import AutoTokenizer, CLIPModel

    def load(name):
        with safe_open(shared_data / "activations" / f"{name}.safetensors", "pt") as file:
            return file.get_tensor("cls"), file.get_tensor("label"), json.loads(file.metadata()["names"])

    train, _, _ = load("cifar10_train")
    rows, labels, names = load("cifar10_test")
    path = shared_data / "clip-vit-tiny-lit"
    sae = SAEModel(SAEConfig(hidden_size=192, top_k=16))
    sae.set_statistics(train.mean(0), 1.0)
    model = VS2CLIPForZeroShot(CLIPModel.from_pretrained(path).eval(), sae)
    result = evaluate(
        model,
        rows,
        labels,
        names,
        AutoTokenizer.from_pretrained(path),
        methods=("centroid", "distribution_norm", "full_distribution_norm"),
        reference_rows=train,
    )
    assert result.row("clip")["top1"] == pytest.approx(63.70)
    assert result.row("centroid")["gain"] == pytest.approx(4.00)
    # Those measured 64.00 and +3.80 with seven templates that they do not name; with OpenAI's seven it is four images less.
    assert result.row("clip", "ensemble")["top1"] == pytest.approx(63.80)
    assert result.row("centroid", "ensemble")["gain"] == pytest.approx(3.90)
    gained = {"centroid": 2, "distribution_norm": 1, "full_distribution_norm": 4}
    assert all(row["gain_ci"][0] > gained[row["method"]] for row in result.rows if row["method"] != "clip")


def test_examples_are_few_and_of_every_kind():
    """Pages show the clearest images: not all of one kind, not more than fit, in the order of the ranking."""
    ranked = [7, 1, 3, 5, 2, 4, 6]
    assert few_of_each(ranked, lambda row: row % 2, most=3, per_group=2) == [7, 1, 2]
    assert few_of_each(ranked, lambda row: row % 2, most=9, per_group=2) == [7, 1, 2, 4]
