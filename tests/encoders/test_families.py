"""Each family of encoders, the whole way: extract, train, calibrate, evaluate, recommend, classify, explain, save, load. A tiny
random model of each, with a tokenizer and an image processor of its own kind beside it."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    GemmaTokenizer,
    MetaClip2Config,
    MetaClip2Model,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    XLMRobertaTokenizer,
    pipeline,
)

import hf_vs2
from hf_vs2 import SAEConfig, SAEModel, SAETrainer, SAETrainingArguments, VS2CLIPForZeroShot
from hf_vs2.data.labels.prompts import class_embeddings
from hf_vs2.encoders.base_model import describe_base_model
from hf_vs2.encoders.families import FAMILIES, family_of, steerable
from hf_vs2.encoders.processing import load_processing


LABELS = ["cat", "dog", "bird"]
WORDS = ["▁a", "▁photo", "▁of", "▁cat", "▁dog", "▁bird", "▁This", "▁is", ".", "▁", *"abcdefghijklmnopqrstuvwxyz"]
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}
CLS = [name for name in steerable() if FAMILIES[name].has_tokens]


def save_clip(folder):
    hf_clip = hf_vs2.__path__[0] + "/demo_assets"
    model = CLIPModel.from_pretrained(hf_clip, dtype=torch.float32)
    model.save_pretrained(folder)
    for part in load_processing(hf_clip):
        part.save_pretrained(folder)


def save_metaclip(folder):
    text = {**TOWER, "vocab_size": 60, "max_position_embeddings": 24, "eos_token_id": 2, "bos_token_id": 0}
    config = MetaClip2Config(text_config=text, vision_config=VISION, projection_dim=24)
    MetaClip2Model(config).save_pretrained(folder)
    vocab = [
        ("<s>", 0.0),
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((word, -1.0) for word in WORDS),
        ("<mask>", 0.0),
    ]
    XLMRobertaTokenizer(vocab=vocab).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


def save_siglip(folder):
    text = {**TOWER, "vocab_size": 60, "max_position_embeddings": 64, "projection_size": 32, "pad_token_id": 0}
    SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)).save_pretrained(folder)
    vocab = {word: place for place, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *WORDS, "<mask>"])}
    merges = [(left, right) for left in vocab for right in vocab if left + right in vocab]
    GemmaTokenizer(vocab=vocab, merges=merges, model_input_names=["input_ids"]).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


SAVE = {"clip": save_clip, "metaclip_2": save_metaclip, "siglip": save_siglip}


@pytest.fixture(scope="module", params=list(SAVE))
def family(request, tmp_path_factory):
    """`(name, folder of the model)`."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    SAVE[request.param](folder)
    return request.param, folder


def load(folder):
    name, folder = folder
    return FAMILIES[name].model.from_pretrained(folder, dtype=torch.float32).eval()


def steered(model, **settings):
    """With a random SAE around the rows of noise."""
    torch.manual_seed(1)
    size = model.config.vision_config.image_size
    with torch.no_grad():
        rows = family_of(model).row(model.vision_model(pixel_values=torch.randn(64, 3, size, size)))
    base = describe_base_model(model)
    sae = SAEModel(SAEConfig(hidden_size=rows.shape[1], expansion_factor=2, top_k=8, gate=None, **base))
    sae.set_statistics(rows.mean(0), rows.var(0).sum().item())
    hf_vs2.calibrate(sae, rows)
    sae.set_domain_statistics(hf_vs2.measure_statistics(sae, rows, clip=model))
    return VS2CLIPForZeroShot(model, sae.eval(), **settings)


def inputs_of(model, count=4):
    generator = torch.Generator().manual_seed(2)
    size = model.config.vision_config.image_size
    ids = torch.randint(4, 40, (3, 7), generator=generator)
    ids[:, -1] = 1 if isinstance(model, SiglipModel) else model.config.text_config.eos_token_id
    return {"pixel_values": torch.randn(count, 3, size, size, generator=generator), "input_ids": ids}


def images(count=9):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)) for _ in range(count)]


def test_every_family_is_tested():
    """A family that somebody registers belongs into SAVE."""
    assert set(SAVE) == set(steerable())


def test_off_and_held_back_are_the_model_itself_bit_for_bit(family):
    model = load(family)
    vs2, inputs = steered(model), inputs_of(model)
    with torch.no_grad():
        plain = model(**inputs, return_loss=True) if len(inputs["input_ids"]) == 4 else model(**inputs)
        moved = vs2(**inputs)
        assert not torch.allclose(moved.logits_per_image, plain.logits_per_image)
        for settings in ({"enabled": False}, {"method": "none"}, {"fvu_threshold": 0.0}):
            with vs2.steering(**settings):
                found = vs2(**inputs)
            assert torch.equal(found.logits_per_image, plain.logits_per_image), settings
            assert torch.equal(found.image_embeds, plain.image_embeds)


def test_replay_of_rows_is_the_whole_model(family):
    """Everything is compared on cached rows: they have to give what images give."""
    model = load(family)
    inputs = inputs_of(model)
    vs2 = steered(model)
    classes = torch.nn.functional.normalize(
        model.get_text_features(inputs["input_ids"]).pooler_output.detach(), dim=-1
    )
    for name, method in hf_vs2.methods.METHODS.items():
        if method.needs_corpus or (method.needs_softmax and family[0] == "siglip"):
            with pytest.raises(ValueError, match="corpus|scores labels by a sigmoid"):
                vs2.set_steering(method=name)
                vs2(**inputs)
            vs2.set_steering(method="vs2")
            continue
        with torch.no_grad(), vs2.steering(method=name):
            whole = vs2.image_features(inputs["pixel_values"], with_plain=True)
            replayed = vs2.image_features_from_cls(vs2.cls_rows(inputs["pixel_values"]))
            torch.testing.assert_close(replayed.features, whole.features, rtol=1e-4, atol=1e-5)
            plain = model.get_image_features(inputs["pixel_values"]).pooler_output
            assert torch.equal(whole.plain_features, plain)
            logits = vs2.class_logits(replayed, classes)
            torch.testing.assert_close(vs2(**inputs).logits_per_image, logits, rtol=1e-3, atol=1e-3)


def test_loss_is_the_models_own(family):
    model = load(family)
    inputs = inputs_of(model, count=3)
    with torch.no_grad():
        expected = model(**inputs, return_loss=True).loss
        vs2 = steered(model)
        assert torch.equal(vs2.eval()(**inputs, return_loss=True).loss, expected) is False
        with vs2.steering(fvu_threshold=0.0):
            assert torch.equal(vs2(**inputs, return_loss=True).loss, expected)


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_saved_loaded_and_classified(family, tmp_path, full):
    """By path alone: model, tokenizer and image processor of the family's own kind; plain scores are those of transformers'
    own pipeline for that family."""
    name, folder = family
    vs2 = steered(load(family))
    vs2.save_pretrained(tmp_path, full=full)
    again = VS2CLIPForZeroShot.from_pretrained(tmp_path)
    inputs = inputs_of(vs2.clip)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits_per_image, vs2(**inputs).logits_per_image)
    assert type(again.clip) is FAMILIES[name].model
    classifier = hf_vs2.zero_shot_classifier(tmp_path, device="cpu")
    (image,) = images(1)
    answers = classifier(image, LABELS, return_details=True)
    stock = pipeline("zero-shot-image-classification", model=load(family), device="cpu", **parts_of(classifier))
    expected = {one["label"]: one["score"] for one in stock(image, candidate_labels=LABELS)}
    assert {one["label"]: one["score"] for one in answers["plain"]} == pytest.approx(expected, abs=2e-3)
    plain = hf_vs2.zero_shot_classifier(folder, device="cpu")(image, LABELS)
    assert {one["label"]: one["score"] for one in plain} == pytest.approx(expected, abs=2e-3)


def parts_of(classifier):
    return {"tokenizer": classifier.tokenizer, "image_processor": classifier.image_processor}


@pytest.mark.slow
def test_extract_train_evaluate_recommend(family, tmp_path):
    """Rows equal the tower's own, the SAE trained on them belongs to this model and no other, and methods are compared."""
    name, folder = family
    data = datasets.Dataset.from_dict({"image": images(24), "label": [i % 3 for i in range(24)]})
    data = data.cast_column("label", datasets.ClassLabel(names=LABELS))
    store = hf_vs2.extract_activations(
        str(folder), data, tmp_path / "rows", device="cpu", label_column="label", progress=False
    )
    model, (tokenizer, processor) = load(family), load_processing(folder)
    pixels = processor(images(24), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = family_of(model).row(model.vision_model(pixel_values=pixels))
    torch.testing.assert_close(store.tensor(-1).float(), expected, rtol=1e-2, atol=1e-2)
    sae = SAEModel(SAEConfig(hidden_size=expected.shape[1], expansion_factor=2, top_k=8))
    arguments = SAETrainingArguments(output_dir=str(tmp_path / "run"), max_steps=3)
    SAETrainer(sae, arguments, store).train()
    vs2 = VS2CLIPForZeroShot.from_pretrained(tmp_path / "run", gate=None)
    assert type(vs2.clip) is FAMILIES[name].model and vs2.sae.config.site == FAMILIES[name].site
    table = hf_vs2.evaluate(vs2, store, store.labels, LABELS, tokenizer, num_resamples=9)
    assert {"clip", "vs2", "centroid"} <= {row["method"] for row in table.rows}
    advice = hf_vs2.recommend(vs2, store, class_embeddings(vs2.clip, tokenizer, LABELS), labels=store.labels)
    assert advice.method in hf_vs2.methods.METHODS


def test_explanations(family):
    """Of families with a CLIP's tail; of SigLIP refused in one line."""
    name, _ = family
    vs2 = steered(load(family))
    pixels = inputs_of(vs2.clip)["pixel_values"]
    classes = torch.eye(
        3, vs2.clip.vision_model.config.hidden_size if name == "siglip" else vs2.clip.config.projection_dim
    )
    if name in CLS:
        assert vs2.explain(pixels, classes).contributions.shape[0] == len(pixels)
        return
    with pytest.raises(ValueError, match="worked out from post_layernorm and visual_projection.*SiglipModel"):
        vs2.explain(pixels, classes)


def test_inner_layers_without_tokens_are_refused(tmp_path):
    """SigLIP's tokens are patches: there is no row of an inner layer to read."""
    save_siglip(tmp_path / "siglip")
    model = SiglipModel.from_pretrained(tmp_path / "siglip")
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
