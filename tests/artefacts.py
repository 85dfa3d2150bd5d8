"""Folders of saved artefacts, and the numbers that are read from each."""

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from conftest import make_tiny_clip
from datasets import Dataset
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel

from hf_vs2.data.stores.activations import ActivationStore, extract_activations


MEMORY = 2 << 30


Numbers = Any


def store_folder(folder: Path) -> None:
    make_tiny_clip().save_pretrained(folder / "clip")
    clip = CLIPModel.from_pretrained(folder / "clip")
    images = [Image.new("RGB", (32, 32), (20 * i, 255 - 20 * i, 7 * i)) for i in range(10)]
    data = Dataset.from_dict({"image": images, "label": [i % 2 for i in range(10)]})
    store = extract_activations(
        clip,
        data,
        folder / "out",
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        shard_size=4,
        batch_size=4,
        label_column="label",
        progress=False,
    )
    shutil.move(store.path, folder / "store")
    shutil.rmtree(folder / "clip")
    shutil.rmtree(folder / "out")


def store_numbers(folder: Path) -> Numbers:
    store = ActivationStore.open(folder / "store")
    return [store.take(torch.arange(len(store))), store.labels, store.image_indices]


@contextmanager
def bounded_memory(extra: int = MEMORY) -> Iterator[None]:
    """Allocations beyond it fail, with an error that no test here expects."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
