"""Each family of encoders, the whole way: extract, train, calibrate, evaluate, recommend, classify, explain, save, load. A tiny
random model of each, with a tokenizer and an image processor of its own kind beside it. What is quick is asked of all of them,
and what takes longer is marked slow."""

import datasets
import numpy as np
import pytest
import torch
import transformers
from made_families import CLIP_ENDS, LABELS, MADE, SIGLIP_ENDS, TEXT, TOWER, VISION
from PIL import Image
from torch.nn.functional import normalize
from transformers import pipeline

import hf_vs2
from hf_vs2 import SAEConfig, SAEModel, SAETrainer, SAETrainingArguments, VS2CLIPForZeroShot
from hf_vs2.adaptation.answers import compare
from hf_vs2.data.inputs import DEFAULT_TEMPLATES
from hf_vs2.data.labels.prompts import class_embeddings
from hf_vs2.data.stores.rows import rows_of
from hf_vs2.encoders.base_model import describe_base_model
from hf_vs2.encoders.families import FAMILIES, embedding_width, family_of, tower_of
from hf_vs2.encoders.loading import load_clip
from hf_vs2.encoders.processing import load_processing


WITH_TEXTS = [name for name, one in MADE.items() if one.tokenizer is not None]
QUICK = ["altclip", "siglip", "vit and bert", "dinov2"]
"""One of each kind; the others are asked the same, marked slow."""
FEW_METHODS = ["vs2", "amplify", "centroid", "anchored_prototypes", "distribution_norm"]
"""Of each kind of step and fit; of the families in `QUICK`, as CLIP is asked of all."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {}, tmp_path_factory


@pytest.fixture(params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MADE])
def family(request, folders):
    """`(name, folder of the model)`."""
    kept, factory = folders
    name = request.param
    if name not in kept:
        torch.manual_seed(0)
        kept[name] = folder = factory.mktemp(name.replace(" ", "_"))
        one = MADE[name]
        model = one.model()
        if hasattr(model, "logit_bias"):  # 0 in a model that was not trained, where nobody notices one that is lost
            model.logit_bias.data.fill_(-2)
        for part in (model, one.images(), *([] if one.tokenizer is None else [one.tokenizer()])):
            part.save_pretrained(folder)
    return name, kept[name]


def load(family):
    name, folder = family
    return FAMILIES[MADE[name].model_type].model.from_pretrained(folder, dtype=torch.float32).eval()


def size_of(family):
    """Side of the images that its processor gives."""
    return 48 if family[0] == "clipseg" else 28 if family[0] == "clip" else 32


def steered(family, model=None, **settings):
    """With a random SAE around the rows of noise."""
    model = load(family) if model is None else model
    torch.manual_seed(1)
    size = size_of(family)
    with torch.no_grad():
        rows = family_of(model).row(tower_of(model)(pixel_values=torch.randn(64, 3, size, size)))
    base = describe_base_model(model)
    sae = SAEModel(SAEConfig(hidden_size=rows.shape[1], expansion_factor=2, top_k=8, gate=None, **base))
    sae.set_statistics(rows.mean(0), rows.var(0).sum().item())
    hf_vs2.calibrate(sae, rows)
    sae.set_domain_statistics(hf_vs2.measure_statistics(sae, rows, clip=model))
    return VS2CLIPForZeroShot(model, sae.eval(), **settings)


def inputs_of(family, count=4):
    generator = torch.Generator().manual_seed(2)
    size, found = size_of(family), {}
    if family[0] in WITH_TEXTS:
        ids = torch.randint(5, 40, (3, 7), generator=generator)
        end = getattr(load(family).config.text_config, "eos_token_id", None)
        ids[:, -1] = 3 if end is None else end
        found["input_ids"] = ids
    return {"pixel_values": torch.randn(count, 3, size, size, generator=generator)} | found


def images(count=9):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)) for _ in range(count)]


def reader_of(family):
    """What stands for the texts: the tokenizer, or embeddings of the labels."""
    if family[0] in WITH_TEXTS:
        return load_processing(family[1])[0]
    width = embedding_width(load(family))
    return dict(zip(LABELS, torch.randn(3, width, generator=torch.Generator().manual_seed(3)), strict=True))


def test_every_family_is_tested():
    """A family that is registered belongs into MADE."""
    registered = {name for name, one in FAMILIES.items() if name == one.model_type}
    assert {one.model_type for one in MADE.values()} == registered


def test_off_and_held_back_are_the_model_itself_bit_for_bit(family):
    model, inputs = load(family), inputs_of(family)
    vs2 = steered(family, model)
    off = ({"enabled": False}, {"method": "none"}, {"fvu_threshold": 0.0})
    with torch.no_grad():
        if family[0] not in WITH_TEXTS:
            outputs = model(**inputs)
            plain = getattr(outputs, "image_embeds", None)
            plain = family_of(model).row(outputs) if plain is None else plain
            assert not torch.allclose(vs2.get_image_features(**inputs).pooler_output, plain)
            for settings in off:
                with vs2.steering(**settings):
                    assert torch.equal(vs2.get_image_features(**inputs).pooler_output, plain), settings
            with pytest.raises(ValueError, match="has no text tower, so it can't read labels"):
                vs2(**inputs)
            return
        plain = model(**inputs)
        assert not torch.allclose(vs2(**inputs).logits_per_image, plain.logits_per_image)
        for settings in off:
            with vs2.steering(**settings):
                found = vs2(**inputs)
            assert torch.equal(found.logits_per_image, plain.logits_per_image), settings
            assert torch.equal(found.image_embeds, plain.image_embeds)
        three = inputs | {"pixel_values": inputs["pixel_values"][:3]}  # as many images as texts
        expected = model(**three, return_loss=True).loss
        assert not torch.equal(vs2.eval()(**three, return_loss=True).loss, expected)
        with vs2.steering(fvu_threshold=0.0):
            assert torch.equal(vs2(**three, return_loss=True).loss, expected)


def test_replay_of_rows_is_the_whole_model(family):
    """Everything is compared on cached rows: they have to give what images give."""
    model, inputs = load(family), inputs_of(family)
    vs2 = steered(family, model)
    classes = class_embeddings(model, reader_of(family), LABELS)
    pixels = inputs["pixel_values"]
    methods = hf_vs2.methods.METHODS
    for name, method in {name: methods[name] for name in (FEW_METHODS if family[0] in QUICK else methods)}.items():
        if method.needs_corpus or (method.needs_softmax and family[0] == "siglip"):
            with pytest.raises(ValueError, match="corpus|scores labels by a sigmoid"):
                vs2.set_steering(method=name)
                vs2.image_features(pixels)
            vs2.set_steering(method="vs2")
            continue
        with torch.no_grad(), vs2.steering(method=name):
            whole = vs2.image_features(pixels, with_plain=True)
            replayed = vs2.image_features_from_cls(vs2.cls_rows(pixels))
            torch.testing.assert_close(replayed.features, whole.features, rtol=1e-4, atol=1e-5)
            assert torch.equal(whole.plain_features, plain_features(model, pixels))
            logits = vs2.class_logits(replayed, classes)
            torch.testing.assert_close(vs2.class_logits(whole, classes), logits, rtol=1e-3, atol=1e-3)
            if family[0] in WITH_TEXTS:
                texts = normalize(model.get_text_features(inputs["input_ids"]).pooler_output, dim=-1)
                logits = vs2.class_logits(replayed, texts)
                torch.testing.assert_close(vs2(**inputs).logits_per_image, logits, rtol=1e-3, atol=1e-3)


def plain_features(model, pixels):
    """The model's own."""
    if hasattr(model, "get_image_features"):
        return model.get_image_features(pixel_values=pixels).pooler_output
    outputs = model(pixel_values=pixels)
    embeds = getattr(outputs, "image_embeds", None)
    return family_of(model).row(outputs) if embeds is None else embeds


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_saved_loaded_and_classified(family, tmp_path, full):
    """By path alone: model, tokenizer and image processor of the family's own kind; plain scores are those of transformers'
    own pipeline for that family. Without texts the embeddings of the labels are given."""
    name, folder = family
    vs2 = steered(family)
    vs2.save_pretrained(tmp_path, full=full)
    again = VS2CLIPForZeroShot.from_pretrained(tmp_path)
    pixels = inputs_of(family)["pixel_values"]
    with torch.no_grad():
        assert torch.equal(again.image_features(pixels).features, vs2.image_features(pixels).features)
    assert type(again.clip) is FAMILIES[MADE[name].model_type].model
    (image,) = images(1)
    if name not in WITH_TEXTS:
        for one in (folder, tmp_path):
            with pytest.raises(ValueError, match="has no text tower, so it can't read labels. Give the embeddings"):
                hf_vs2.zero_shot_classifier(one, device="cpu")(image, LABELS)
    given = {} if name in WITH_TEXTS else {"tokenizer": reader_of(family)}
    classifier = hf_vs2.zero_shot_classifier(tmp_path, device="cpu", **given)
    answers = classifier(image, LABELS, return_details=True)
    if name in WITH_TEXTS:
        assert type(classifier.tokenizer) is type(MADE[name].tokenizer())
        own = {"tokenizer": classifier.tokenizer, "image_processor": MADE[name].images()}
        stock = pipeline("zero-shot-image-classification", model=load(family), device="cpu", **own)
        expected = {one["label"]: one["score"] for one in stock(image, candidate_labels=LABELS)}
    else:
        pixels = MADE[name].images()(image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            embeds = normalize(plain_features(load(family), pixels), dim=-1)
        logits = 100 * embeds @ normalize(torch.stack([given["tokenizer"][label] for label in LABELS]), dim=-1).T
        expected = dict(zip(LABELS, logits.softmax(-1)[0].tolist(), strict=True))
    assert {one["label"]: one["score"] for one in answers["plain"]} == pytest.approx(expected, abs=2e-3)
    classes = hf_vs2.class_embeddings(classifier.clip, classifier.tokenizer, LABELS, DEFAULT_TEMPLATES)
    with torch.no_grad():
        embeds = normalize(
            plain_features(load(family), MADE[name].images()(image, return_tensors="pt")["pixel_values"])
        )
    assert answers["similarity"] == pytest.approx((embeds @ classes.T).max().item(), abs=1e-3), "a cosine"
    plain = hf_vs2.zero_shot_classifier(folder, device="cpu", **given)(image, LABELS)
    assert {one["label"]: one["score"] for one in plain} == pytest.approx(expected, abs=2e-3)


@pytest.mark.slow
def test_extract_train_evaluate_recommend(family, tmp_path):
    """Rows equal the tower's own, the SAE trained on them belongs to this model and no other, and methods are compared."""
    name, folder = family
    data = datasets.Dataset.from_dict({"image": images(24), "label": [i % 3 for i in range(24)]})
    data = data.cast_column("label", datasets.ClassLabel(names=LABELS))
    store = hf_vs2.extract_activations(
        str(folder), data, tmp_path / "rows", device="cpu", label_column="label", progress=False
    )
    model, reader = load(family), reader_of(family)
    pixels = MADE[name].images()(images(24), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = family_of(model).row(tower_of(model)(pixel_values=pixels))
    torch.testing.assert_close(store.tensor(-1).float(), expected, rtol=1e-2, atol=1e-2)
    sae = SAEModel(SAEConfig(hidden_size=expected.shape[1], expansion_factor=2, top_k=8))
    arguments = SAETrainingArguments(output_dir=str(tmp_path / "run"), max_steps=3)
    SAETrainer(sae, arguments, store).train()
    vs2 = VS2CLIPForZeroShot.from_pretrained(tmp_path / "run", gate=None)
    assert type(vs2.clip) is type(model) and vs2.sae.config.site == family_of(model).site
    table = hf_vs2.evaluate(vs2, store, store.labels, LABELS, reader, num_resamples=9)
    assert {"clip", "vs2", "centroid"} <= {row["method"] for row in table.rows}
    advice = hf_vs2.recommend(vs2, store, class_embeddings(vs2.clip, reader, LABELS), labels=store.labels)
    assert advice.method in hf_vs2.methods.METHODS
    embeds = hf_vs2.retrieval.embed_images(vs2, data, image_processor=load_processing(folder)[1])
    torch.testing.assert_close(embeds, normalize(plain_features(model, pixels), dim=-1), rtol=1e-2, atol=1e-2)


def test_explanations_and_the_grid_are_of_the_models_own_scores(family):
    """Parts add up to the steered score, probabilities are those of the model (SigLIP's are sigmoids), and each cell of the
    grid is what the model answers there."""
    vs2 = steered(family)
    pixels = inputs_of(family, count=8)["pixel_values"]
    classes = normalize(torch.randn(3, embedding_width(vs2.clip), generator=torch.Generator().manual_seed(4)), dim=-1)
    rows = vs2.cls_rows(pixels).detach()
    images = vs2.image_features_from_cls(rows)
    logits = vs2.class_logits(images, classes).double()
    found = vs2.explain(pixels, classes)
    parts = found.plain_scores + found.normalisation + found.replacement + found.contributions.sum(-1)
    torch.testing.assert_close(parts, found.steered_scores)
    torch.testing.assert_close(found.steered_scores, logits, rtol=1e-3, atol=1e-3)
    own = logits.sigmoid() if family[0] == "siglip" else logits.softmax(-1)
    torch.testing.assert_close(found.probabilities()[1], own, rtol=1e-3, atol=1e-3)
    (shown, *_) = found.to_dict()
    assert shown["labels"][0]["steered"] == pytest.approx(
        (logits[0, 0] - (0 if family[0] == "siglip" else logits[0].mean())).item(), abs=1e-3
    )
    answers = logits.argmax(-1)
    grid = hf_vs2.steering_grid(
        vs2, rows, answers, classes, [vs2.steering_settings.gamma], [vs2.steering_settings.lambda_]
    )
    assert grid.top1.tolist() == [[100.0]]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        # As OFA-Sys' ChineseCLIPs have it: the words alone, without a configuration of the tokenizer.
        ("chinese_clip", "vocab.txt"),
        ("clipseg", None),
    ],
)
@pytest.mark.slow
def test_layouts_of_repositories(tmp_path, config, words):
    """Files as they lie on the Hub, which `save_pretrained` would write otherwise."""
    torch.manual_seed(0)
    one = MADE[config]
    one.images().save_pretrained(tmp_path)
    if words is None:  # CLIPSeg's repositories hold the CLIP inside the model with the decoder
        layers = {"extract_layers": [0, 1, 2], "reduce_dim": 8, "decoder_num_attention_heads": 2}
        settings = {**layers, "decoder_intermediate_size": 16, "projection_dim": 24}
        text = TEXT | {"vocab_size": 580} | CLIP_ENDS
        whole = transformers.CLIPSegForImageSegmentation(
            transformers.CLIPSegConfig(text_config=text, vision_config=VISION, **settings)
        )
        whole.save_pretrained(tmp_path)
        one.tokenizer().save_pretrained(tmp_path)
        assert torch.equal(load_clip(tmp_path).logit_scale, whole.clip.logit_scale)
    else:
        one.model().save_pretrained(tmp_path)
        vocab = one.tokenizer().get_vocab()
        (tmp_path / words).write_text("\n".join(sorted(vocab, key=vocab.get)) + "\n", encoding="utf-8")
    answer = hf_vs2.zero_shot_classifier(tmp_path, device="cpu")(images(1)[0], LABELS)
    assert sorted(one["label"] for one in answer) == sorted(LABELS)


def test_what_can_not_be_steered_is_refused_in_one_line(tmp_path):
    """By the configuration alone, before any weight is read."""
    flexible = transformers.Siglip2Config(text_config=TEXT | SIGLIP_ENDS, vision_config=TOWER)
    cases = {
        "flexible": (flexible, "is a SigLIP 2 of flexible resolution.*Take one of fixed resolution"),
        "tower": (transformers.AltCLIPVisionConfig(**VISION), "holds a model of type 'altclip_vision_model'"),
        "blip": (transformers.BlipConfig(), "holds a model of type 'blip'; expected a"),
    }
    for name, (config, told) in cases.items():
        config.save_pretrained(tmp_path / name)
        for load_it in (load_clip, hf_vs2.zero_shot_classifier):
            with pytest.raises(ValueError, match=told):
                load_it(tmp_path / name)


@pytest.mark.parametrize("family", ["siglip"], indirect=True)
def test_sigmoid_scores_are_probabilities_of_their_own(family):
    """What `adapt` reports is what `classify` shows, and a method that shares an image out by a softmax is refused."""
    vs2 = steered(family)
    rows = vs2.cls_rows(inputs_of(family)["pixel_values"]).detach()
    classes = class_embeddings(vs2.clip, reader_of(family), LABELS)
    logits = vs2.class_logits(vs2.image_features_from_cls(rows), classes)
    sure = compare(vs2, rows_of(rows, None), classes).adapted_confidence
    torch.testing.assert_close(sure, logits.sigmoid().amax(-1))
    with pytest.raises(ValueError, match="each by itself, and this method shares each image out among the labels"):
        vs2.set_steering(method="anchored_prototypes")


@pytest.mark.parametrize("family", ["siglip"], indirect=True)
def test_inner_layers_without_tokens_are_refused(family, tmp_path):
    """SigLIP's tokens are patches: there is no row of an inner layer to read."""
    model = load(family)
    sae = SAEModel(SAEConfig(hidden_size=32, expansion_factor=2, top_k=8, site="pooled"))
    with pytest.raises(ValueError, match="has no CLS token: it is steered at its last layer alone"):
        VS2CLIPForZeroShot(model, {0: sae})
    with pytest.raises(ValueError, match="has no CLS token: of its layers only the last"):
        hf_vs2.extract_activations(model, datasets.Dataset.from_dict({"image": images(2)}), tmp_path, layers=(0,))
    other = SAEModel(SAEConfig(hidden_size=32, expansion_factor=2, top_k=8))
    with pytest.raises(
        ValueError, match="reads the 'cls' row, and the row that is steered in this model is the 'pooled'"
    ):
        VS2CLIPForZeroShot(model, other)
