"""The corpus of VS2++: comes back as it was saved, is refused where it can't belong, and serves a model without growing stale."""

import copy
import os
import pickle

import pytest
import torch
from conftest import make_tiny_clip
from toy import make_sae
from transformers import CLIPModel

from hf_vs2 import VS2CLIPForZeroShot
from hf_vs2.functional.neighbors import nearest_neighbors, pseudo_labels, select_positives
from hf_vs2.steering.corpus import RetrievalCorpus
from hf_vs2.steering.corpus_search import CorpusSearch


HIDDEN = 32


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same_corpus(left, right):
    """Every field, tensors bit for bit."""
    for name in RetrievalCorpus.__dataclass_fields__:
        ours, theirs = getattr(left, name), getattr(right, name)
        if isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype, name
        else:
            assert ours == theirs, name


@pytest.fixture()
def named_clip(tmp_path):
    make_tiny_clip().save_pretrained(tmp_path / "clip")
    return CLIPModel.from_pretrained(tmp_path / "clip")


# On disk


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("encoder", [None, "facebook/dinov2-small"])
def test_comes_back_as_it_was(named_clip, tmp_path, dtype, encoder):
    """What was built once is what every later session searches: its rows, its CLIP and its encoder."""
    more = {"embeddings": 5 * draw(20, 6, seed=1), "encoder": encoder, "encoder_revision": "abc"} if encoder else {}
    corpus = RetrievalCorpus.from_store(draw(20, HIDDEN), clip=named_clip, dtype=dtype, **more)
    corpus.save_pretrained(tmp_path / "corpus")
    found = RetrievalCorpus.from_pretrained(tmp_path / "corpus")
    same_corpus(found, corpus)
    assert found.rows.dtype == getattr(torch, dtype) and found.base_model_name_or_path == str(tmp_path / "clip")
    assert sorted(os.listdir(tmp_path / "corpus")) == ["corpus.json", "corpus.safetensors"]
    if encoder:
        torch.testing.assert_close(found.embeddings.float().norm(dim=1), torch.ones(20), atol=0.01, rtol=0)


def test_a_corpus_of_another_clip_is_refused(tiny_clip):
    """Rows of another CLIP have the right shape and give neighbours that mean nothing."""
    tiny_clip.config._name_or_path, tiny_clip.config._commit_hash = "some/clip", "123"
    corpus = RetrievalCorpus.from_store(draw(20, HIDDEN), clip=tiny_clip)
    assert (corpus.base_model_name_or_path, corpus.base_model_revision) == ("some/clip", "123")
    model = VS2CLIPForZeroShot(tiny_clip, make_sae(HIDDEN))
    model.set_corpus(corpus)
    with torch.no_grad():
        tiny_clip.vision_model.post_layernorm.weight.mul_(1.5)
    with pytest.raises(ValueError, match="made with some/clip.*not the same weights"):
        model.set_corpus(corpus)
    with pytest.raises(ValueError, match="rows have 16 features, the vision tower gives 32"):
        model.set_corpus(RetrievalCorpus(draw(20, 16)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": torch.ones(3, 4).double()}, r"torch.float64"),
        ({"rows": torch.ones(3, 4), "embeddings": torch.ones(3, 2)}, r"embeddings= and encoder= go together"),
        ({"rows": torch.ones(3, 4), "encoder": "x/y"}, r"embeddings= and encoder= go together"),
        ({"rows": torch.ones(3, 4), "encoder": "x/y", "embeddings": torch.ones(2, 2)}, r"2 embeddings for 3 rows"),
    ],
)
def test_material_that_is_no_corpus_is_named(arguments, message):
    """Otherwise it would fail somewhere in a search, or not at all."""
    with pytest.raises(ValueError, match=message):
        RetrievalCorpus(**arguments)


# At work


def search_settings(clip, **changed):
    arguments = {"num_neighbors": 6, "positives": "majority", "class_embeds": draw(4, 24, seed=3), **changed}
    return lambda search, sae, rows: search.neighbors(
        search.prepared(clip, sae, arguments["class_embeds"]), clip, rows, **arguments
    )


@torch.no_grad()
def by_hand(clip, sae, corpus, rows, classes, num_neighbors, positives):
    embed = lambda rows: clip.visual_projection(clip.vision_model.post_layernorm(rows))  # noqa: E731
    found = nearest_neighbors(embed(rows), embed(corpus), num_neighbors)[1]
    labels = pseudo_labels(embed(corpus), classes)
    values, indices = sae.encode(corpus)
    return (
        values[found],
        indices[found],
        select_positives(labels[found], positives, pseudo_labels(embed(rows), classes)),
    )


@pytest.mark.parametrize("positives", ["majority", "query"])
def test_what_is_kept_follows_weights_and_classes(tiny_clip, positives):
    """Latents, embeddings and pseudo-labels are kept between batches; after a training step or with other labels the old ones
    would be wrong without a word."""
    sae, corpus = make_sae(HIDDEN).requires_grad_(False), RetrievalCorpus(3 * draw(50, HIDDEN))
    search, rows, classes = CorpusSearch(corpus), 3 * draw(8, HIDDEN, seed=2), draw(4, 24, seed=3)

    def check(classes):
        found = search_settings(tiny_clip, class_embeds=classes, positives=positives)(search, sae, rows)
        expected = by_hand(tiny_clip, sae, corpus.rows, rows, classes, 6, positives)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
        return found

    first = check(classes)
    assert first.positive.any() and not first.positive.all()
    others = [check(draw(4, 24, seed=seed)) for seed in range(4, 14)]
    assert len(search._labels) == search.max_label_sets
    assert any(not torch.equal(first.positive, other.positive) for other in others)
    classes.neg_()  # the same tensor with other content
    assert not torch.equal(check(classes).positive, first.positive)
    with torch.no_grad():
        tiny_clip.visual_projection.weight.data.copy_(draw(24, HIDDEN, seed=4))
    check(classes)
    sae.W_enc.data.add_(0.5)
    check(classes)
    sae.config.top_k = 3
    assert check(classes).values.shape == (8, 6, 3)


def test_computed_once(tiny_clip, monkeypatch):
    """A corpus of 50,000 rows must not be encoded again for every batch."""
    search, sae = CorpusSearch(RetrievalCorpus(draw(30, HIDDEN))), make_sae(HIDDEN)
    ask = search_settings(tiny_clip)
    ask(search, sae, draw(3, HIDDEN))
    calls = []
    monkeypatch.setattr(type(sae), "encode", lambda *args: calls.append("encode"))
    monkeypatch.setattr("hf_vs2.steering.corpus_search.NeighborIndex", lambda *args: calls.append("index"))
    ask(search, sae, draw(3, HIDDEN))
    assert not calls


def test_another_encoder_finds_the_neighbors_and_clip_labels_them(tiny_clip):
    """With DINOv2's embeddings the neighbours are DINOv2's; images outside their space can't be searched for."""
    rows, embeddings = 3 * draw(50, HIDDEN), draw(50, 5, seed=8)
    corpus = RetrievalCorpus.from_store(rows, embeddings=embeddings, encoder="some/dino")
    sae, queries = make_sae(HIDDEN).requires_grad_(False), draw(8, 5, seed=9)
    ask = search_settings(tiny_clip, retrieval_embeds=queries, exclude=torch.arange(8))
    found = ask(CorpusSearch(corpus), sae, rows[:8])
    chosen = nearest_neighbors(queries, embeddings, 6, exclude=torch.arange(8))[1]
    assert torch.equal(found.indices, sae.encode(rows)[1][chosen])
    for wrong, message in ((None, "none were given"), (queries[:3], r"these are \(3, 5\)")):
        with pytest.raises(ValueError, match=rf"space of some/dino.*retrieval_embeds=, \(8, 5\); {message}"):
            search_settings(tiny_clip, retrieval_embeds=wrong)(CorpusSearch(corpus), sae, rows[:8])
    own = CorpusSearch(RetrievalCorpus(rows))
    with pytest.raises(ValueError, match="searched in the CLIP's own space"):
        search_settings(tiny_clip, retrieval_embeds=queries)(own, sae, rows[:8])


def test_copies_share_the_rows(tiny_clip):
    """`copy.deepcopy(model)` and DataLoader workers: the corpus is large, and what is kept belongs to other weights."""
    search, sae = CorpusSearch(RetrievalCorpus(draw(30, HIDDEN))), make_sae(HIDDEN)
    first = search_settings(tiny_clip)(search, sae, draw(3, HIDDEN))
    copied = copy.deepcopy(search)
    assert copied.corpus is search.corpus and not copied._indexed
    sent = pickle.loads(pickle.dumps(search))
    assert not sent._indexed
    found = search_settings(tiny_clip)(sent, sae, draw(3, HIDDEN))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, found, strict=True))


# The Hub
