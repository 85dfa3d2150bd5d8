"""Names of latents: the words that a decoder direction moves an image towards, through the model's own tail."""

import pytest
import torch
from conftest import make_tiny_clip
from torch.nn.functional import normalize
from toy import make_sae
from words import NAMES, make_word_tokenizer

from hf_vs2 import VS2CLIPForZeroShot
from hf_vs2.data.labels.prompts import class_embeddings
from hf_vs2.explain.inputs import resolve_names
from hf_vs2.explain.latent_names import (
    chance_score,
    closest_words,
    common_words,
    embedding_directions,
    name_latents,
    read_vocabulary,
)


@pytest.fixture()
def model():
    return VS2CLIPForZeroShot(make_tiny_clip(), make_sae(32, expansion_factor=2)).eval()


def test_directions_are_the_closed_form_of_the_tail(model):
    """A name is only as good as its direction: LayerNorm's Jacobian, the projection and the unit length, worked out by hand."""
    norm, projection = model.clip.vision_model.post_layernorm, model.clip.visual_projection.weight.detach().double()
    with torch.no_grad():  # an affine part that is not the identity
        norm.weight.copy_(torch.linspace(0.5, 2, 32))
        norm.bias.copy_(torch.linspace(-1, 1, 32))
    x, d = model.sae.mean.double(), model.sae.W_dec.detach().double()
    scale = (x.var(unbiased=False) + norm.eps).sqrt()
    z = (x - x.mean()) / scale
    centred = d - d.mean(-1, keepdim=True)
    through_norm = norm.weight.double() * (centred - z * (centred @ z / 32).unsqueeze(-1)) / scale
    embedding = projection @ (norm.weight.double() * z + norm.bias.double())
    unit = embedding / embedding.norm()
    moved = through_norm @ projection.T / embedding.norm()
    expected = (moved - torch.outer(moved @ unit, unit)).float()
    torch.testing.assert_close(embedding_directions(model), expected, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():  # as commands run
        torch.testing.assert_close(embedding_directions(model), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_latent_is_named_after_the_word_that_it_favours(model):
    """The first name must be the word whose centred cosine grows most when an image moves a little along the latent."""
    tokenizer = make_word_tokenizer()
    names = name_latents(model, tokenizer, NAMES, top=3)
    words = class_embeddings(model.clip, tokenizer, NAMES)
    axes = normalize(words - words.mean(0), dim=-1)

    def embed(rows):
        with model.steering(enabled=False):
            return normalize(model.image_features_from_cls(rows).features, dim=-1)

    step = 1e-3
    grown = (embed(model.sae.mean + step * model.sae.W_dec) - embed(model.sae.mean.unsqueeze(0))) @ axes.T
    assert torch.equal(names.indices[:, 0], grown.argmax(-1))
    assert len(set(names.indices[:, 0].tolist())) > 2  # they do differ
    assert names.of(5)[0] == (NAMES[names.indices[5, 0]], names.scores[5, 0].item())
    assert (names.scores.diff(dim=-1) <= 0).all() and names.scores.shape == (64, 3)


@torch.no_grad()
def test_a_word_that_chance_would_find_is_no_name(model):
    """There is always a nearest word: stated as a name it tells a reader of directions without meaning what they are."""
    directions = torch.eye(6)[:4] + 0.1
    words = normalize(torch.eye(6)[:5], dim=-1)
    floor = chance_score(directions, words)
    generator = torch.Generator().manual_seed(1)
    best = closest_words(torch.randn(2000, 4, generator=generator) @ directions, words, 1)[1]
    assert 0.97 < (best < floor).float().mean() < 1
    names = name_latents(model, make_word_tokenizer(), NAMES, top=2)
    above = {latent: names.of(latent)[0][0] for latent in range(64) if names.scores[latent, 0] >= names.floor}
    assert len(above) < 64 and resolve_names(names) == above and names.name(0) == above.get(0)
    atlas = [{"index": 0, "names": [{"name": "dog"}], "named": False}, {"index": 1, "names": [{"name": "cat"}]}]
    assert resolve_names({"latents": atlas}) == {1: "cat"}


def test_common_words_are_words():
    """The words that ship: thousands, each once, as prompts can take them."""
    words = common_words()
    assert len(words) > 2500 and len({word.casefold() for word in words}) == len(words)
    assert all(word and word == word.strip() for word in words) and {"frog", "truck", "striped"} <= set(words)


def test_what_all_words_share_names_nothing():
    """With the modality gap left in, the word nearest to the common part would be every latent's name."""
    words = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, -1.0]])
    common = torch.tensor([[5.0, 0.0, 0.0]])
    directions = torch.tensor([[9.0, 1.0, 0.0], [-9.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    indices, scores = closest_words(directions, normalize(words + common, dim=-1), top=9, block=2)
    assert indices.shape == (3, 3)  # no more words than there are
    assert indices[:2, 0].tolist() == [0, 1]
    assert scores[2].tolist() == [0, 0, 0]  # a zero direction, not NaN
    plain = closest_words(directions, normalize(words + 100 * common, dim=-1), top=1)
    assert plain[0][:2, 0].tolist() == [0, 1]


def test_names_do_not_depend_on_the_dtype_of_the_clip(model):
    """In half precision the derivative of a LayerNorm is noise; the tail is taken in float32."""
    expected = embedding_directions(model)
    model.clip.to(torch.bfloat16)
    found = embedding_directions(model)
    assert found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.99


def test_vocabulary_files_are_read_as_people_write_them(model, tmp_path):
    """Windows' mark, empty lines, underscores and repeated words must not stop an atlas; a file without words must, by name."""
    path = tmp_path / "words.txt"
    path.write_bytes("\ufeffnight_bird\r\n\r\n  sea  horse \nnight bird\n".encode())
    assert read_vocabulary(path) == ["night bird", "sea horse"]
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="words.txt is empty"):
        read_vocabulary(path)
    path.write_bytes(b"\xff\xfe\x00caf\xe9")
    with pytest.raises(ValueError, match="words.txt is not UTF-8"):
        read_vocabulary(path)
    with pytest.raises(ValueError, match="one word, 'dog'"):
        name_latents(model, make_word_tokenizer(), ["dog"])
