"""`--model_dtype` and `--fast_decode`: faster, to slightly other numbers, which are never mixed with the exact ones."""

import numpy as np
import pytest
import torch
from commands import read_json, run, source
from PIL import ExifTags, Image

from hf_vs2 import ActivationStore, adapt, extract_activations, load_images


def test_clip_runs_in_half_precision_where_asked(checkpoint, clip_path, images_path, tmp_path, capsys):
    """Rows of another precision are in a store of their own, and that of float32 is found as before; SAE and
    steering stay in float32, so that FVU hardly moves."""
    stores = {}
    for dtype in ("auto", "float32", "bfloat16"):
        folder = tmp_path / dtype
        command = ["extract", *source(clip_path, images_path, "test"), "--output_dir", str(folder)]
        run(capsys, *command, "--model_dtype", dtype, "--disable_tqdm")
        (path,) = (path for path in folder.iterdir() if path.is_dir())
        stores[dtype] = ActivationStore.open(path)
    assert stores["auto"].path.name == stores["float32"].path.name != stores["bfloat16"].path.name
    assert stores["bfloat16"].metadata["model"]["dtype"] == "bfloat16"
    assert stores["bfloat16"].metadata["dtype"] == "float32"

    answers = {}
    for dtype in ("float32", "bfloat16"):
        path = tmp_path / f"{dtype}.json"
        command = ["classify", str(images_path / "test"), "--checkpoint", str(checkpoint), "--labels", "red", "blue"]
        run(capsys, *command, "--model_dtype", dtype, "--output", str(path), "--gate", "none")
        answers[dtype] = torch.tensor([answer["fvu"] for answer in read_json(path)])
    assert not torch.equal(answers["float32"], answers["bfloat16"])
    torch.testing.assert_close(answers["bfloat16"], answers["float32"], rtol=0.2, atol=0.02)


def test_a_loaded_clip_keeps_its_precision(tiny_clip, images_path, tmp_path):
    """Asked for another one it would be ignored, and its rows stored as if it had been heard."""
    with pytest.raises(ValueError, match="model_dtype.*loaded"):
        extract_activations(tiny_clip, load_images(images_path, split="test"), tmp_path, model_dtype="bfloat16")
    with pytest.raises(ValueError, match="model_dtype.*loaded"):
        adapt(tiny_clip, images_path / "test", ["red", "blue"], tmp_path / "adapted", model_dtype="bfloat16")


def test_large_photographs_are_decoded_smaller_where_asked(checkpoint, clip_path, tmp_path, capsys):
    """The flag reaches the pixels, and rows are in a store of their own. By how little pixels move is tested with
    the images."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(2):
        coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((800, 640)).save(photos / f"{number}.jpg", exif=turned(number * 6))
    stores, answers = {}, {}
    for flags in ((), ("--fast_decode",)):
        folder = tmp_path / f"store{len(flags)}"
        run(capsys, "extract", *source(clip_path, photos), "--output_dir", str(folder), *flags, "--disable_tqdm")
        (path,) = (path for path in folder.iterdir() if path.is_dir())
        stores[flags] = ActivationStore.open(path)
        path = tmp_path / f"{len(flags)}.json"
        command = ["classify", str(photos), "--checkpoint", str(checkpoint), "--labels", "red", "blue"]
        run(capsys, *command, "--output", str(path), "--gate", "none", *flags)
        answers[flags] = torch.tensor([answer["predictions"][0]["score"] for answer in read_json(path)])
    exact, fast = stores.values()
    assert exact.path.name != fast.path.name
    assert "fast_decode" not in exact.metadata["preprocessing"], "stores made before would not be found"
    assert not torch.equal(exact.tensor(), fast.tensor())
    assert not torch.equal(*answers.values())


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif
