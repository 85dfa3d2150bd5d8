"""The examples do what their first lines say, from a command line, against the Hub of the tests."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel

import hf_vs2
from hf_vs2 import SAEModel
from hf_vs2.encoders.processing import load_processing


EXAMPLES = Path(__file__).parents[1] / "examples"
CLIP_FILES = Path(hf_vs2.__file__).parent / "demo_assets"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples") / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(60):
        pixels = generator.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((30, 40)).save(folder / f"{number:02d}.png")
    return folder


def run_example(monkeypatch, capsys, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_train_push_and_classify(hub, photos, tmp_path, monkeypatch, capsys):
    """What the first example shares, the second can use, by its id alone."""
    CLIPModel.from_pretrained(CLIP_FILES, dtype=torch.float32).push_to_hub("ada/example-clip")
    for part in load_processing(CLIP_FILES):
        part.push_to_hub("ada/example-clip")
    arguments = ["--model", "ada/example-clip", "--dataset", photos, "--output_dir", tmp_path / "sae"]
    arguments += ["--repo_id", "ada/example-sae", "--top_k", 8, "--max_steps", 20, "--license", "mit"]
    lines = run_example(monkeypatch, capsys, "train_and_push.py", *arguments)
    assert lines[-1] == f"{hub.url}/ada/example-sae/commit/{hub['ada/example-sae'].head.sha}"
    files = hub["ada/example-sae"].head.files
    expected = {".gitattributes", "README.md", "config.json", "hf_vs2_shim.py"}
    assert set(files) == expected | {"model.safetensors", "statistics.safetensors"}
    card = hub["ada/example-sae"].text("README.md")
    assert "`learning_rate` 0.0005" in card and str(tmp_path) not in card
    assert SAEModel.from_pretrained("ada/example-sae").config.base_model_name_or_path == "ada/example-clip"

    (photos / "notes.txt").write_text("not an image")
    arguments = [photos, "--model", "ada/example-sae", "--labels", "three", "nine"]
    lines = run_example(monkeypatch, capsys, "classify_folder.py", *arguments)
    assert len(lines) == 60
    assert all(f"{number:02d}.png: " in line and "plain CLIP: " in line for number, line in enumerate(lines))
