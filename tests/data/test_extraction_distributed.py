"""Processes that share an extraction make every image's row once, whatever the remainders, and together what one makes."""

import itertools
import json
import os
import subprocess
import sys

import datasets
import pytest
import torch
from image_stores import contents, make_dataset, make_processor

from hf_vs2.data.batches import Columns, ImageReader
from hf_vs2.data.stores.activations import ActivationStore, extract_activations
from hf_vs2.data.stores.extraction import Extraction, even_shard_size
from hf_vs2.data.stores.store_format import read_index, write_shard
from hf_vs2.encoders.vision_tower import VisionTower


def plans(tower, folder, dataset, batch_size, shard_size, world_size, done=()):
    """The batches that each process of `world_size` would make, and the shard size they agree on."""
    folder.mkdir(exist_ok=True)
    spans = []
    for rank in range(world_size):
        index = {"format": "hf_vs2.activations", "format_version": 1, "shard_size": shard_size, "complete": False}
        index |= {"model": tower.identity(), "layers": [0], "site": "cls", "preprocessing": {}, "dtype": "float32"}
        index |= {"dataset": {"fingerprint": "numbers", "split": None}, "columns": {"image": "image", "label": None}}
        reader = ImageReader(dataset, Columns("image", None), make_processor())
        one = Extraction(tower, reader, index, folder / "store", batch_size, 0, False, False)
        one.rank, one.world_size = rank, world_size
        if rank == 0:
            one._begin()
            size = read_index(one.folder)["shard_size"]
            for number in done:
                start = number * size
                header = {"store": "store", "start": start, "stop": start + size, "skipped": []}
                write_shard(one.folder, number, {"image_index": torch.arange(start, start + size)}, header)
        one.index["shard_size"] = size
        one._plan()
        spans.append([(span.start, span.stop) for span in one.spans])
    return spans, size


def numbered(count: int, streaming: bool):
    dataset = datasets.Dataset.from_dict({"image": list(range(count))})
    return dataset.to_iterable_dataset() if streaming else dataset


@pytest.mark.parametrize("streaming", [False, True])
def test_every_image_is_in_one_batch_of_one_process(tiny_clip, tmp_path, streaming):
    """A gap loses rows without a word; a duplicate costs a forward pass and may tear a shard that two processes write."""
    tower = VisionTower.of(tiny_clip, None, None)
    cases = itertools.product((1, 2, 7, 33), (1, 4, 5), (8, 100), (1, 2, 3, 8))
    for number, (count, batch_size, shard_size, world_size) in enumerate(cases):
        case = (count, batch_size, shard_size, world_size)
        spans, size = plans(
            tower, tmp_path / str(number), numbered(count, streaming), batch_size, shard_size, world_size
        )
        everything = sorted(itertools.chain(*spans))
        images = [image for start, stop in everything for image in range(start, stop)]
        assert images == list(range(count)), case
        assert all(0 < stop - start <= batch_size for start, stop in everything), case
        assert all(start // size == (stop - 1) // size for start, stop in everything), f"{case}: crosses a shard"
        owners = [{start // size for start, _ in mine} for mine in spans]
        assert sum(map(len, owners)) == len(set().union(*owners)), f"{case}: two processes write one shard"
        if shard_size % batch_size == 0:
            assert all(start % batch_size == 0 for start, _ in everything), f"{case}: other batches than alone"


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_there_is_not_made_again(tiny_clip, tmp_path, streaming):
    """Resuming, with another number of processes, deals out exactly the shards that are missing."""
    tower = VisionTower.of(tiny_clip, None, None)
    for world_size in (1, 2, 3, 5):
        dataset = numbered(33, streaming)
        spans, size = plans(tower, tmp_path / str(world_size), dataset, 2, 4, world_size, done=(0, 3, 4))
        images = [image for start, stop in sorted(itertools.chain(*spans)) for image in range(start, stop)]
        assert images == [image for image in range(33) if image // size not in (0, 3, 4)]
        if not streaming:
            counts = [len({start // size for start, _ in mine}) for mine in spans]
            assert max(counts) - min(counts) <= 1, "the missing shards are dealt out evenly"


def test_small_data_sets_are_shared_too():
    """In shards of 4096, one process would make all of CIFAR's rows that fit into one, and 13 shards leave 8 GPUs uneven."""
    assert even_shard_size(2000, 4096, 64, world_size=1) == 4096, "one process: as before"
    assert even_shard_size(2000, 4096, 64, world_size=2) == 1024
    assert even_shard_size(50_000, 4096, 64, world_size=8) == 3136  # 16 shards, two each; 13 of 4096 would be 2 or 1
    assert even_shard_size(14_200_000, 4096, 64, world_size=8) == 4096
    for count, batch_size, world_size in itertools.product((1, 63, 64, 999, 10_000), (1, 16, 64), (2, 4, 8)):
        size = even_shard_size(count, 4096, batch_size, world_size)
        shares = [0] * world_size
        for number, start in enumerate(range(0, count, size)):
            shares[number % world_size] += min(size, count - start)
        rounding = batch_size * -(-(number + 1) // world_size)  # less than a batch a shard
        assert max(shares) < -(-count // world_size) + rounding, (count, size)


WORKER = """
import json, os, sys
import torch
from conftest import make_tiny_clip
from image_stores import make_dataset, make_processor
from hf_vs2.activations import extract_activations

torch.distributed.init_process_group("gloo")
torch.set_num_threads(1)
rank = torch.distributed.get_rank()
for name, count, streaming, shard_size in json.loads(sys.argv[2]):
    dataset = make_dataset(count).to_iterable_dataset() if streaming else make_dataset(count)
    options = {"image_processor": make_processor(), "batch_size": 4, "shard_size": shard_size, "label_column": "label"}
    extract_activations(make_tiny_clip(), dataset, sys.argv[1] + "/" + name, dataset_fingerprint=name, progress=False, **options)
torch.distributed.destroy_process_group()
"""
RUNS = [
    ("map", 45, False, 8),
    ("stream", 45, True, 8),
    ("one shard", 30, False, 4096),
    ("one image", 1, False, 8),
    ("stream of one", 1, True, 8),
]


@pytest.fixture()
def one_thread():
    """The number of threads can change the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_two_real_processes_make_the_rows_of_one(tiny_clip, one_thread, tmp_path):
    """Row by row and bit by bit, from data sets and streams, with remainders, and with fewer images than processes."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    path = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    subprocess.run([*command, str(tmp_path / "two"), json.dumps(RUNS)], env=environment, check=True, timeout=300)
    for name, count, streaming, shard_size in RUNS:
        dataset = make_dataset(count).to_iterable_dataset() if streaming else make_dataset(count)
        options = {
            "image_processor": make_processor(),
            "batch_size": 4,
            "shard_size": shard_size,
            "label_column": "label",
        }
        one = extract_activations(
            tiny_clip, dataset, tmp_path / "one" / name, dataset_fingerprint=name, progress=False, **options
        )
        two = ActivationStore.open(tmp_path / "two" / name)
        assert torch.equal(one.tensor(), two.tensor()), name
        assert torch.equal(one.image_indices, two.image_indices) and torch.equal(one.labels, two.labels), name
        assert two.image_indices.tolist() == list(range(count)), name
        if not name.startswith("one"):
            assert contents(one.path) == contents(two.path), name
    shared = ActivationStore.open(tmp_path / "two" / "one shard")
    assert [shard["rows"] for shard in shared.metadata["shards"]] == [16, 14]
