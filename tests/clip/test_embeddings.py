"""Embeddings for search and clustering: `encode_images` and `encode_text`, asked for as in sentence-transformers."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from hf_vs2 import VS2CLIPForZeroShot
from hf_vs2.data import load_images
from hf_vs2.data.images import UnreadableImageError


@pytest.fixture(scope="module")
def model(checkpoint):
    return VS2CLIPForZeroShot.from_pretrained(checkpoint, gate=None)


@pytest.fixture(scope="module")
def folder(images_path):
    return images_path / "test" / "red"


@pytest.fixture(scope="module")
def expected(model, folder, clip_path):
    """What CLIP's own interface gives for the folder: steered and plain."""
    processor = AutoProcessor.from_pretrained(clip_path, use_fast=False)
    inputs = processor(
        text=["red", "a green thing"],
        images=[Image.open(file) for file in sorted(folder.iterdir())],
        return_tensors="pt",
        padding=True,
    )
    with torch.no_grad():
        steered = model.get_image_features(inputs["pixel_values"]).pooler_output
        plain = model.clip.get_image_features(inputs["pixel_values"]).pooler_output
        inputs.pop("pixel_values")
        return steered.numpy(), plain.numpy(), model.clip.get_text_features(**inputs).pooler_output.numpy()


def test_images_from_anywhere_have_the_models_embeddings(model, folder, expected):
    """Whoever indexes a collection gets, in its order, what the model computes. More ways to give it: tests/doors.py."""
    for images in (str(folder), folder, load_images(folder), load_images(folder, streaming=True)):
        found = model.encode_images(images, batch_size=3)
        assert isinstance(found, np.ndarray) and found.dtype == np.float32
        np.testing.assert_allclose(found, expected[0], atol=1e-4)


def test_steered_or_not(model, folder, expected):
    """`steered=False` is plain CLIP; settings of one call leave the model as it was."""
    plain = model.encode_images(folder, steered=False)
    np.testing.assert_allclose(plain, expected[1], atol=1e-4)
    held_back = model.encode_images(folder, steered=True, fvu_threshold=0.0)
    assert np.array_equal(held_back, plain), "what the gate holds back is plain CLIP's, bit for bit"
    assert not np.allclose(model.encode_images(folder), plain, atol=1e-3)
    with model.steering(enabled=False):
        assert np.array_equal(model.encode_images(folder), plain)
        np.testing.assert_allclose(model.encode_images(folder, steered=True), expected[0], atol=1e-4)
    with pytest.raises(ValueError, match="moves no image"):
        model.encode_images(folder, steered=True, method="prototypes")
    with pytest.raises(ValueError, match="exclude each other"):
        model.encode_images(folder, steered=False, gamma=2)


def test_texts(model, expected):
    np.testing.assert_allclose(model.encode_text(["red", "a green thing"], batch_size=1), expected[2], atol=1e-5)
    assert model.encode_text("red").shape == expected[2][0].shape
    assert model.encode_text("red", normalize_embeddings=True) @ model.encode_text(
        "red", normalize_embeddings=True
    ) == pytest.approx(1)


def test_forms_of_the_answer(model, folder):
    """As in sentence-transformers: numpy, one tensor, or a list of tensors; one row for one image."""
    (file, *_) = sorted(folder.iterdir())
    rows = model.encode_images(folder, convert_to_tensor=True, normalize_embeddings=True)
    assert torch.is_tensor(rows) and torch.allclose(rows.norm(dim=-1), torch.ones(8))
    (rows[:1] * torch.nn.Parameter(torch.ones(1))).sum().backward()  # a probe can be trained on them
    one = model.encode_images(str(file), convert_to_numpy=False)
    assert torch.is_tensor(one) and one.shape == rows.shape[1:]
    assert [row.shape for row in model.encode_images([file], convert_to_numpy=False)] == [one.shape]


def test_mistakes(model, folder, tmp_path):
    """One line that names the input."""
    shutil.copytree(folder, tmp_path / "some")
    (tmp_path / "some" / "00.png").write_bytes(b"nothing")
    for images, error, message in (
        (tmp_path / "some", UnreadableImageError, "00.png"),
        ([], ValueError, "no image"),
        (tmp_path / "none.png", UnreadableImageError, "none.png"),
        (7, TypeError, "One image or several expected"),
        (load_images(folder).rename_column("image", "img"), ValueError, "no column 'image'"),
    ):
        with pytest.raises(error, match=message):
            model.encode_images(images)
    for texts, error in (([], ValueError), ([3], TypeError), (["a", None], TypeError)):
        with pytest.raises(error, match="encode_text takes"):
            model.encode_text(texts)
    with pytest.raises(ValueError, match="batch_size must be a whole number .* not 0"):
        model.encode_images(folder, batch_size=0)
