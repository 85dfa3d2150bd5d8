"""Retrieval for the study: embeddings of any vision model, and the baselines against independent references."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from torch.nn.functional import normalize
from toy import make_sae
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from hf_vs2 import VS2CLIPForZeroShot, extract_activations
from hf_vs2.steering.retrieval import (
    RetrievalCorpus,
    contrastive_embedding_steer,
    embed_images,
    knn_vote,
    linear_probe,
    weighted_rag,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(0)
    pixels = [generator.integers(0, 255, (30 + i, 50 - i, 3), dtype=np.uint8) for i in range(7)]
    column = {"image": [PILImage.fromarray(one) for one in pixels], "label": [0, 1, 2, 0, 1, 2, 0]}
    return Dataset.from_dict(column).cast_column("image", Image())


def dinov2(folder):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    processor = BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(folder)
    return Dinov2Model.from_pretrained(folder), processor


# Embeddings


def test_embeddings_of_dinov2_are_its_pooled_output(images, tmp_path):
    """Another preprocessing or another token than the model's own would give other neighbours than the paper's."""
    model, processor = dinov2(tmp_path)
    with torch.no_grad():
        pixels = processor([row["image"] for row in images], return_tensors="pt")["pixel_values"]
        expected = normalize(model(pixels).pooler_output, dim=-1)
    found = embed_images(tmp_path, images, batch_size=3)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert found.dtype == torch.float32 and not found.requires_grad and not found.is_inference()
    model.train()
    again = embed_images(model, images.to_iterable_dataset(), batch_size=3)
    torch.testing.assert_close(again, found, atol=1e-6, rtol=0)
    assert model.training and model.encoder.layer[0].training, "the model given is left as it was"


def test_embeddings_without_a_pooled_output_are_the_cls_token(images, tmp_path):
    """Many vision checkpoints have no trained pooler."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTModel(ViTConfig(**sizes, image_size=28, patch_size=14), add_pooling_layer=False).eval()
    processor = BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
    with torch.no_grad():
        pixels = processor([row["image"] for row in images], return_tensors="pt")["pixel_values"]
        expected = normalize(model(pixels).last_hidden_state[:, 0], dim=-1)
    found = embed_images(model, images, image_processor=processor)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="no name to load its image processor by"):
        embed_images(model, images)


def test_embeddings_of_a_clip_are_plain_image_features(tiny_clip, images):
    """Of a steered model it must be the plain CLIP: neighbours are looked for before anything is steered."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    with torch.no_grad():
        pixels = processor([row["image"] for row in images], return_tensors="pt")["pixel_values"]
        expected = normalize(tiny_clip.get_image_features(pixels).pooler_output, dim=-1)
    for model in (tiny_clip, VS2CLIPForZeroShot(tiny_clip, make_sae(32))):
        found = embed_images(model, images, image_processor=processor)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_corpus_from_a_real_store_is_its_rows(tiny_clip, images, tmp_path):
    """The two ways to a corpus must agree, and a store knows which CLIP it is of."""
    tiny_clip.save_pretrained(tmp_path / "clip")
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    make = lambda layers: extract_activations(  # noqa: E731
        tmp_path / "clip", images, tmp_path / "stores", layers=layers, image_processor=processor, progress=False
    )
    corpus = RetrievalCorpus.from_store(make((1, -1)), clip=tiny_clip)
    with torch.no_grad():
        pixels = processor([row["image"] for row in images], return_tensors="pt")["pixel_values"]
        expected = tiny_clip.vision_model(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(corpus.rows, expected, atol=1e-4, rtol=1e-4)
    assert corpus.base_model_name_or_path == str(tmp_path / "clip") and corpus.base_model_fingerprint
    with torch.no_grad():
        tiny_clip.vision_model.post_layernorm.weight.mul_(1.5)
    with pytest.raises(ValueError, match="not the same weights"):
        RetrievalCorpus.from_store(make((1, -1)), clip=tiny_clip)
    with pytest.raises(ValueError, match=r"holds layers \[1\], not -1"):
        RetrievalCorpus.from_store(make((1,)))


def test_what_cannot_be_embedded_is_named(images, tmp_path):
    model, _ = dinov2(tmp_path)
    with pytest.raises(ValueError, match="is empty"):
        embed_images(model, images.select([]))
    with pytest.raises(ValueError, match="already loaded"):
        embed_images(model, images, revision="main")
    with pytest.raises(TypeError, match="Expected one split as a `datasets.Dataset`"):
        embed_images(model, [row["image"] for row in images])


# Baselines


@pytest.fixture()
def batch():
    return {
        "query": normalize(draw(5, 6), dim=-1).double(),
        "neighbors": normalize(draw(5, 4, 6, seed=1), dim=-1).double(),
        "similarity": draw(5, 4, seed=2).abs().double(),
        "positive": torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 1]]).bool(),
    }


def unit(vector):
    return vector / np.linalg.norm(vector)


def test_weighted_rag_is_the_papers_sum(batch):
    """E = a q + (1 - a) sum_j w_j r_j with w_j = s_j / sum s; without any weight the query is what is left."""
    found = weighted_rag(batch["query"], batch["neighbors"], batch["similarity"], 0.3).numpy()
    for row in range(5):
        q, r, s = (batch[name][row].numpy() for name in ("query", "neighbors", "similarity"))
        total = sum(s)
        expected = 0.3 * q + 0.7 * sum(s[j] / total * r[j] for j in range(4))
        np.testing.assert_allclose(found[row], unit(expected), rtol=1e-12)
    alone = weighted_rag(batch["query"], batch["neighbors"], 0 * batch["similarity"], 0.3)
    torch.testing.assert_close(alone, batch["query"], rtol=1e-6, atol=1e-7)


def test_clip_space_steering_is_a_difference_of_means(batch):
    """The comparison that says what the SAE adds: eq. 5's contrast, of embeddings."""
    found = contrastive_embedding_steer(batch["query"], batch["neighbors"], batch["positive"], 1.7).numpy()
    for row in range(5):
        q, r, positive = (batch[name][row].numpy() for name in ("query", "neighbors", "positive"))
        means = [r[chosen].mean(0) if chosen.any() else np.zeros(6) for chosen in (positive, ~positive)]
        np.testing.assert_allclose(found[row], unit(q + 1.7 * (means[0] - means[1])), rtol=1e-6)


def test_votes_are_weighted_by_similarity():
    """One near neighbour outvotes two far ones."""
    scores = knn_vote(torch.tensor([[2, 0, 0], [1, 1, 1]]), torch.tensor([[0.9, 0.3, 0.4], [0.5, 0.25, 0.25]]), 4)
    torch.testing.assert_close(scores, torch.tensor([[0.7, 0, 0.9, 0], [0, 1.0, 0, 0]]))


@pytest.mark.parametrize(("num_classes", "strength"), [(2, 1.0), (5, 0.1), (5, 10.0)])
def test_linear_probe_is_scikit_learns(num_classes, strength):
    """Reviewers know this baseline as `LogisticRegression`; an optimiser that stops early makes it look worse."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(num_classes, (300,), generator=generator)
    embeds = normalize(draw(num_classes, 8, seed=1)[labels] + 0.8 * draw(300, 8, seed=2), dim=-1)
    weight, bias = linear_probe(embeds, labels, num_classes, l2=strength)
    # For two classes it fits one row of weights: the difference of ours, whose penalty is half as large.
    penalty = strength / 2 if num_classes == 2 else strength
    theirs = linear_model.LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=10_000)
    expected = theirs.fit(embeds.double().numpy(), labels.numpy()).predict_proba(embeds.double().numpy())
    np.testing.assert_allclose((embeds @ weight.T + bias).softmax(-1).numpy(), expected, atol=2e-4)
    again = linear_probe(embeds, labels, num_classes, l2=strength)
    assert torch.equal(again[0], weight) and torch.equal(again[1], bias)


def test_linear_probe_has_a_row_for_classes_that_nothing_was_labelled_as():
    """CLIP's pseudo-labels often leave a class out; its column must exist, and lose."""
    embeds = normalize(draw(40, 6), dim=-1)
    labels = torch.arange(40) % 3 * 2  # classes 0, 2 and 4 of 6
    weight, bias = linear_probe(embeds, labels, 6)
    assert weight.shape == (6, 6) and set((embeds @ weight.T + bias).argmax(-1).tolist()) <= {0, 2, 4}
    for wrong in (labels - 1, labels + 2):
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 6\)"):
            linear_probe(embeds, wrong, 6)
    with pytest.raises(ValueError, match=r"do not fit: \(40, 6\) and \(39,\)"):
        linear_probe(embeds, labels[1:], 6)


# Real rows
