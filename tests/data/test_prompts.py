"""Class prompts: what a user gets for templates and class names, and the matrix of class embeddings."""

import pytest
import torch
from torch.nn.functional import normalize
from words import NAMES, make_word_tokenizer

from hf_vs2.data.labels.prompts import ENSEMBLE_TEMPLATES, SINGLE_TEMPLATE, class_embeddings, resolve_templates


@pytest.fixture()
def tokenizer():
    return make_word_tokenizer()


@torch.no_grad()
def naive_class_embedding(clip, tokenizer, name, templates):
    """One class by the book, one prompt at a time, nothing padded."""
    rows = []
    for template in templates:
        inputs = tokenizer(template.format(name), return_tensors="pt")
        features = clip.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        rows.append(normalize(features.pooler_output[0], dim=-1))
    return normalize(torch.stack(rows).mean(0), dim=-1)


@pytest.mark.parametrize("batch_size", [1, 5, 256])
def test_class_embeddings_equal_clip_prompt_by_prompt(tiny_clip, tokenizer, batch_size):
    """Batching and padding would shift every zero-shot result if they changed an embedding."""
    embeddings = class_embeddings(tiny_clip, tokenizer, NAMES, "ensemble", batch_size=batch_size)
    expected = torch.stack([naive_class_embedding(tiny_clip, tokenizer, name, ENSEMBLE_TEMPLATES) for name in NAMES])
    assert embeddings.dtype == torch.float32 and embeddings.shape == (len(NAMES), 24)
    torch.testing.assert_close(embeddings, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(len(NAMES)))


def test_prompts_in_order_of_length_give_their_own_rows(tiny_clip, tokenizer):
    """The rows of a large label set stand in the order of the labels whatever the batches were; one batch is the same
    bits."""
    usual = class_embeddings(tiny_clip, tokenizer, NAMES, "ensemble", batch_size=3)
    sorted_rows = class_embeddings(tiny_clip, tokenizer, NAMES, "ensemble", batch_size=3, by_length=True)
    torch.testing.assert_close(sorted_rows, usual)
    assert torch.equal(
        class_embeddings(tiny_clip, tokenizer, NAMES, by_length=True), class_embeddings(tiny_clip, tokenizer, NAMES)
    )


def test_each_distinct_prompt_is_encoded_once(tiny_clip, tokenizer, monkeypatch):
    """A template given twice, or a class name with an underscore, must not cost (or change) anything."""
    encoded = []
    original = tiny_clip.get_text_features
    monkeypatch.setattr(tiny_clip, "get_text_features", lambda **k: encoded.extend(k["input_ids"]) or original(**k))
    twice = class_embeddings(tiny_clip, tokenizer, ["night_bird", "dog"], [*SINGLE_TEMPLATE, *SINGLE_TEMPLATE])
    assert len(encoded) == 2
    torch.testing.assert_close(twice, class_embeddings(tiny_clip, tokenizer, ["night bird", "dog"], "single"))


def test_names_and_templates_may_hold_braces_of_their_own(tiny_clip, tokenizer):
    """`str.format` would fail on such a name or template, or fill in something else."""
    embeddings = class_embeddings(tiny_clip, tokenizer, ["dog", "set {}"], ["a {key} photo of a {}."])
    assert embeddings.isfinite().all()


def test_a_long_prompt_is_cut_with_a_warning(tiny_clip, tokenizer, caplog):
    """Past the last position the text tower fails with an index error; a silent cut would hide a lost class name."""
    name = "dog " * 30
    embeddings = class_embeddings(tiny_clip, tokenizer, [name, "cat"], ["{}"])
    assert embeddings.isfinite().all()
    assert "1 of 2 prompts fill all 20 positions" in caplog.text


def test_works_in_bfloat16_and_returns_float32(tiny_clip, tokenizer):
    """A half-precision CLIP must not give a classifier that float32 image features cannot be multiplied with."""
    expected = class_embeddings(tiny_clip, tokenizer, NAMES, "ensemble")
    half = class_embeddings(tiny_clip.to(torch.bfloat16), tokenizer, NAMES, "ensemble")
    assert half.dtype == torch.float32
    assert (half * expected).sum(-1).min() > 0.99


def test_resolve_templates(tmp_path):
    """The four ways to name templates; the ensemble is OpenAI's published seven, in its order."""
    assert resolve_templates("single") == ("a photo of a {}.",)
    assert len(resolve_templates("ensemble")) == 7 and resolve_templates("ensemble")[0] == "itap of a {}."
    file = tmp_path / "templates.txt"
    file.write_text("\ufeffa photo of a {}.\r\n\n  a drawing of a {}. \n", encoding="utf-8")
    assert resolve_templates(file) == resolve_templates(str(file)) == ("a photo of a {}.", "a drawing of a {}.")
    assert resolve_templates(["{} texture."]) == ("{} texture.",)
    (tmp_path / "t.json").write_text('["a {}.", "the {}."]')
    assert resolve_templates(tmp_path / "t.json") == ("a {}.", "the {}.")


def test_a_foreign_tokenizer_is_refused(tiny_clip):
    """Token ids beyond the text tower's table end in an index error deep inside torch (or an assert on a GPU)."""
    tokenizer = make_word_tokenizer()
    tokenizer.add_tokens([f"extra{i}" for i in range(120)])
    with pytest.raises(ValueError, match="not the tokenizer of this CLIP"):
        class_embeddings(tiny_clip, tokenizer, ["extra110"], "single")
