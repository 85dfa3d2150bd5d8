"""Every benchmark runs, at a small size, in the environment that the tests run in: a figure of the docs can be taken again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file


FOLDER = Path(__file__).parents[1] / "benchmarks"

SMALL = {
    "atlas": "--latents 64 --images 60",
    "digests": "--num_rows 200 --rounds 1",
    "extraction": "--images PHOTOS --num_images 16 --num_photographs 8 --batch_size 8 --rounds 1",
    "fast_decode": "PHOTOS --num_images 6 --enlarged 1200 --rounds 1",
    "feeding": "--num_images 64 --processors 1 2 --rounds 1",
    "few_shot": "CLIP ROWS ROWS",
    "half_precision": "CHECKPOINT COLOURS --num_images 12",
    "import_time": "--rounds 1",
    "label_free": "--num_labels 10 --batch_size 2 --rounds 1",
    "label_sets": "CLIP --num_labels 300 --rounds 1",
    "million_rows": "--rows 2000 4000 --hidden_size 32 --num_latents 64 --top_k 4 --max_steps 20 --batch_size 64 --rounds 1",
    "neighbor_search": "--rows 500 --features 16 --queries 8 --num_neighbors 5 --repeats 1",
    "pipeline_throughput": "--images PHOTOS --num_images 8 --num_single 2 --stock_batch_sizes 4 --tower_batch_sizes 4 --rounds 1",
    "relu_sae": "",
    "replay_grid": "--num_rows 200 --num_classes 10 --num_latents 256 --top_k 8 --side 3 --replayed_cells 1 --rounds 1",
    "sae_train_step": "--setting 64 256 8 128 --rounds 2 --no_memory",
    "shared_extraction": "--num_images 64 --wait_ms 1 3 --rounds 1",
    "sizing": "--step_ms 10 --tower_images_per_second 1000 --reading_ms 3",
    "soak": "--num_images 40 --num_label_sets 2",
    "sparse_backward": "--hidden_size 64 --num_latents 256 --batch_size 64 --rounds 2",
    "start_up": "CHECKPOINT CLIP PHOTO --rounds 1",
    "steering_overhead": "--size ViT-B/32 --batch_size 2 --short_rounds 3 --rounds 2",
    "tower": "--batch_size 2 --rounds 1",
    "training_memory": "--hidden_size 32 --num_latents 256",
}


def test_the_table_has_every_benchmark():
    """A benchmark that is not in the table is one that nobody runs until its figures are asked for."""
    assert {path.stem for path in FOLDER.glob("*.py")} - {"common"} == SMALL.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_runs(name, checkpoint, clip_path, images_path, tmp_path):
    """`sae_train_step.py` died for months where there was no GPU, and its figures stood in the docs."""
    photographs = tmp_path / "photos"
    photographs.mkdir()
    for number in range(12):
        Image.effect_noise((640, 480), 40 + number).convert("RGB").save(photographs / f"{number}.jpg")
    rows = tmp_path / "rows.safetensors"
    labels = torch.arange(90) % 3
    names = json.dumps(["red", "green", "blue"])
    save_file({"cls": torch.randn(90, 32) + labels[:, None], "label": labels}, rows, {"names": names})
    places = {
        "PHOTOS": photographs,
        "PHOTO": photographs / "0.jpg",
        "ROWS": rows,
        "CLIP": clip_path,
        "CHECKPOINT": checkpoint,
        "COLOURS": images_path,
    }
    arguments = [str(places.get(word, word)) for word in SMALL[name].split()]
    done = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py", *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0 and done.stdout, done.stderr[-3000:]
