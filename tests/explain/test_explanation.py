"""Explanations: the parts add up to the scores that the model gives, and each latent's part is what its removal takes away."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_clip
from hub_models import make_sae
from steered import HIDDEN, LAST, LATENTS, cls_rows, fitted_sae, make_classes, make_inputs
from torch.nn.functional import normalize
from transformers import CLIPModel

import hf_vs2
from hf_vs2 import VS2CLIPForZeroShot
from hf_vs2.encoders.processing import load_processing
from hf_vs2.explain.inputs import resolve_names


CLIP_PATH = str(Path(hf_vs2.__file__).parent / "demo_assets")
SETTINGS = {
    "one gamma": {},
    "a gamma a latent, some negative": {"gamma": tuple(-2 + 0.05 * latent for latent in range(LATENTS))},
    "amplified reconstruction": {"method": "amplify", "gamma": 1.7},
    "edits on top": {"edits": {"amplify": {3: 4.0}, "suppress": [5, 9], "set": {7: 2.5, 11: -1.0}}},
}


def double_model():
    """The tiny CLIP and its SAE in float64, where the parts must add up to many digits. Its LayerNorm has weights, biases and an eps
    that count, as trained ones may."""
    clip = make_tiny_clip()
    norm, generator = clip.vision_model.post_layernorm, torch.Generator().manual_seed(4)
    norm.eps = 50.0
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * torch.randn(HIDDEN, generator=generator))
        norm.bias.copy_(0.3 * torch.randn(HIDDEN, generator=generator))
    return VS2CLIPForZeroShot(clip, fitted_sae(clip)).double().eval()


def total(explanation):
    parts = explanation.normalisation + explanation.replacement + explanation.contributions.sum(-1)
    return explanation.plain_scores + parts


@pytest.mark.parametrize("name", SETTINGS)
def test_each_contribution_is_what_removal_takes_away(name):
    """Held against the model's own LayerNorm and projection, applied with the steered row's normalisers frozen: linear there, so that
    taking one latent's change out of the row takes exactly its contribution out of the score."""
    model, classes = double_model(), make_classes()
    rows = cls_rows(model.clip, make_inputs(2)["pixel_values"].double())
    model.set_steering(**SETTINGS[name])
    found = model.explain_from_cls(rows, classes)
    norm, projection = model.clip.vision_model.post_layernorm, model.clip.visual_projection
    steered = model.steer_cls(rows).rows
    decoder = model.sae.W_dec.detach()
    for image, row in enumerate(steered):
        changes = found.latent_changes[image].unsqueeze(-1) * decoder[found.latent_indices[image]]
        base = model.sae(rows[image : image + 1]).reconstruction[0] if name.startswith("amplified") else rows[image]
        scale = row.norm() / (base + changes.sum(0)).norm()
        deviation = (row.var(unbiased=False) + norm.eps).sqrt()
        length = projection(norm(row)).norm()

        def frozen(moved, scale=scale, deviation=deviation, length=length):
            y = scale * moved
            embeds = projection((y - y.mean()) / deviation * norm.weight + norm.bias) / length
            return model.clip.logit_scale.exp() * (normalize(classes, dim=-1) @ embeds)

        whole = frozen(base + changes.sum(0))
        for place in range(len(changes)):
            removed = whole - frozen(base + changes.sum(0) - changes[place])
            torch.testing.assert_close(found.contributions[image, :, place], removed, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            found.normalisation[image], frozen(rows[image]) - found.plain_scores[image], rtol=0, atol=1e-6
        )


def test_what_has_no_sum_is_refused():
    """A wrong explanation looks like a right one: where scores are no sums over latents, there must be none."""
    clip = make_tiny_clip()
    rows, classes = cls_rows(clip, make_inputs(2)["pixel_values"]), make_classes()
    inner = VS2CLIPForZeroShot(clip, {0: fitted_sae(clip, 0), LAST: fitted_sae(clip, LAST)})
    with pytest.raises(ValueError, match=r"last layer \(2\) alone.*layers \[0, 2\]"):
        inner.explain_from_cls(rows, classes)
    model = VS2CLIPForZeroShot(clip, fitted_sae(clip), method="centroid")
    with pytest.raises(ValueError, match="'centroid' are no sums over latents"):
        model.explain_from_cls(rows, classes)
    model.set_steering(method="vs2")
    with pytest.raises(ValueError, match="3 labels for 4 class embeddings"):
        model.explain_from_cls(rows, classes, ["a", "b", "c"])
    found = model.explain_from_cls(rows, classes)
    with pytest.raises(ValueError, match="'cat' is not among the labels"):
        found.top("cat")
    with pytest.raises(ValueError, match="exclude each other"):
        found.parts(0, raw=True, against=1)
    with pytest.raises(TypeError, match="processor must be a CLIPProcessor or a pair"):
        model.explain(make_inputs(1)["pixel_values"], ["a"], processor=3)
    model.clip.visual_projection = torch.nn.Linear(HIDDEN, 24)
    with pytest.raises(ValueError, match="as CLIPModel has them"):
        model.explain_from_cls(rows, classes)


# Images and words


@pytest.fixture(scope="module")
def real_model():
    clip = CLIPModel.from_pretrained(CLIP_PATH, dtype=torch.float32)
    return VS2CLIPForZeroShot(clip, make_sae(clip, gate=None)).eval()


def test_images_and_words_are_read_as_the_pipeline_reads_them(real_model, tmp_path):
    """`model.explain("cat.png", labels)` from a model alone must be about the same numbers as the classifier's answer."""
    from PIL import Image

    labels = ["three", "a_zero", "nine of them"]
    generator = torch.Generator().manual_seed(0)
    images = [
        Image.fromarray(torch.randint(0, 255, (5, 6, 3), generator=generator, dtype=torch.uint8).numpy()).resize(
            (40, 48)
        )
        for _ in range(3)
    ]
    images[0].save(tmp_path / "image.png")
    found = real_model.explain([str(tmp_path / "image.png"), *images[1:]], labels)
    answers = hf_vs2.zero_shot_classifier(real_model, device="cpu")(images, labels, return_details=True)
    for image, answer in enumerate(answers):
        for kind, scores in (("predictions", found.steered_scores), ("plain", found.plain_scores)):
            expected = {one["label"]: one["score"] for one in answer[kind]}
            probabilities = scores[image].softmax(-1).tolist()
            assert probabilities == pytest.approx([expected[label] for label in labels], abs=1e-5)
    torch.testing.assert_close(total(found), found.steered_scores, rtol=0, atol=1e-9)

    processing = load_processing(CLIP_PATH)
    one = real_model.explain(images[1], labels, processor=processing, vocabulary=["three", "nine", "A"])
    torch.testing.assert_close(one.contributions[0], found.contributions[1], rtol=0, atol=1e-4)
    assert {latent["name"] for latent in one.top("three", 8)} <= {"three", "nine", "A", None}, (
        "None where no word beats chance"
    )
    pixels = processing[1](images, return_tensors="pt")["pixel_values"]
    classes = hf_vs2.class_embeddings(real_model.clip, processing[0], labels, ["This is a photo of {}."])
    tensors = real_model.explain(pixels, classes)  # needs neither tokenizer nor image processor
    torch.testing.assert_close(tensors.steered_scores, found.steered_scores, rtol=0, atol=1e-4)
    json.dumps(found.to_dict())


def test_half_precision_explains_its_own_rows(real_model):
    """A bfloat16 model is explained in float64 from the rows it has: the sum stays exact, the scores are near the model's."""
    from PIL import Image

    model = copy.deepcopy(real_model).to(torch.bfloat16)
    image = Image.linear_gradient("L").convert("RGB")
    found = model.explain(image, ["three", "nine"], processor=load_processing(CLIP_PATH))
    exact = real_model.explain(image, ["three", "nine"], processor=load_processing(CLIP_PATH))
    torch.testing.assert_close(total(found), found.steered_scores, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.steered_scores, exact.steered_scores, rtol=0, atol=1.0)


# Names


def test_names_come_in_every_form_people_have_them(tmp_path):
    """An atlas' file, a hand-written dict and a list must all put the same name to a latent."""
    expected = {1: "stripes", 4: "snow"}
    atlas = {
        "latents": [
            {"index": 0, "names": []},
            {"index": 1, "names": [{"name": "stripes", "score": 0.4}, {"name": "zebra", "score": 0.3}]},
            {"index": 4, "names": [{"name": "snow", "score": 0.2}]},
        ]
    }
    (tmp_path / "latents.json").write_text(json.dumps(atlas))
    (tmp_path / "mine.json").write_text(json.dumps({"1": "stripes", "4": "snow"}))
    forms = [expected, {"1": "stripes", "4": "snow"}, [None, "stripes", None, None, "snow"], atlas]
    for form in [*forms, tmp_path / "latents.json", str(tmp_path / "mine.json")]:
        assert resolve_names(form) == expected
    assert resolve_names(None) == {}
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is not a JSON file"):
        resolve_names(tmp_path / "broken.json")
    (tmp_path / "other.json").write_text(json.dumps({"latents": [{"names": [{"name": "x"}]}]}))
    with pytest.raises(ValueError, match=r"other\.json: latents\[0\] is not as an atlas writes it"):
        resolve_names(tmp_path / "other.json")
    with pytest.raises(ValueError, match="expected the number of a latent and its name"):
        resolve_names({"stripes": 1})
    with pytest.raises(OSError, match=r"nowhere\.json"):
        resolve_names("nowhere.json")
