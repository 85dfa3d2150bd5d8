"""Processes that share an extraction make every image's row once, however fast each is, and together what one makes."""

import contextlib
import io
import itertools
import os
import random
import signal
import subprocess
import sys
import time

import datasets
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from image_stores import contents, make_dataset, make_processor, put_tar

from hf_vs2.data import load_images
from hf_vs2.data.batches import Columns, ImageReader, read_batches
from hf_vs2.data.stores.activations import ActivationStore, extract_activations
from hf_vs2.data.stores.extraction import Extraction, even_shard_size
from hf_vs2.data.stores.parts import num_parts, shard_files
from hf_vs2.data.stores.sharing import WholeJob
from hf_vs2.data.stores.store_format import read_index, read_shard_header, write_shard
from hf_vs2.encoders.vision_tower import VisionTower


def planned(tower, folder, dataset, batch_size, shard_size, world_size, done=()):
    """The extractions of a job of so many processes, ready to take shards, and the shard size they agree on."""
    folder.mkdir(exist_ok=True)
    processes = []
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
        processes.append(one)
    return processes, size


def taken(processes, dice):
    """The batches that each process takes where chance says whose turn it is."""
    left = {one.rank: iter(one.spans) for one in processes}
    spans = [[] for _ in left]
    while left:
        rank = dice.choice(list(left))
        span = next(left[rank], None)
        if span is None:
            del left[rank]
        else:
            spans[rank].append((span.start, span.stop))
    return spans


def numbered(count: int, streaming: bool):
    dataset = datasets.Dataset.from_dict({"image": list(range(count))})
    return dataset.to_iterable_dataset() if streaming else dataset


@pytest.mark.parametrize("streaming", [False, True])
def test_every_image_is_in_one_batch_of_one_process(tiny_clip, tmp_path, streaming):
    """A gap loses rows without a word; a duplicate costs a forward pass and may tear a shard that two processes write."""
    tower, dice = VisionTower.of(tiny_clip, None, None), random.Random(0)
    cases = itertools.product((1, 2, 7, 33), (1, 4, 5), (8, 100), (1, 2, 3, 8))
    for number, (count, batch_size, shard_size, world_size) in enumerate(cases):
        case = (count, batch_size, shard_size, world_size)
        processes, size = planned(
            tower, tmp_path / str(number), numbered(count, streaming), batch_size, shard_size, world_size
        )
        spans = taken(processes, dice)
        everything = sorted(itertools.chain(*spans))
        images = [image for start, stop in everything for image in range(start, stop)]
        assert images == list(range(count)), case
        assert streaming or {one.total for one in processes} == {count}
        assert all(0 < stop - start <= batch_size for start, stop in everything), case
        assert all(start // size == (stop - 1) // size for start, stop in everything), f"{case}: crosses a shard"
        owners = [{start // size for start, _ in mine} for mine in spans]
        assert sum(map(len, owners)) == len(set().union(*owners)), f"{case}: two processes write one shard"
        if shard_size % batch_size == 0:
            assert all(start % batch_size == 0 for start, _ in everything), f"{case}: other batches than alone"


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_there_is_not_made_again(tiny_clip, tmp_path, streaming):
    """Resuming, with another number of processes, makes exactly the shards that are missing, whoever had taken them."""
    tower, dice = VisionTower.of(tiny_clip, None, None), random.Random(0)
    for world_size in (1, 2, 3, 5):
        folder, dataset = tmp_path / str(world_size), numbered(33, streaming)
        processes, size = planned(tower, folder, dataset, 2, 4, world_size, done=(0, 3, 4))
        assert next(iter(processes[0].spans)).start == size  # and then it dies
        processes, _ = planned(tower, folder, dataset, 2, 4, world_size)
        spans = taken(processes, dice)
        images = [image for start, stop in sorted(itertools.chain(*spans)) for image in range(start, stop)]
        assert images == [image for image in range(33) if image // size not in (0, 3, 4)]


@pytest.mark.parametrize("num_workers", [None, 0, 2])
def test_a_process_takes_shards_for_the_batches_it_is_about_to_read(tiny_clip, tmp_path, num_workers):
    """What it has taken nobody else can make, however slow it is."""
    (one,), _ = planned(VisionTower.of(tiny_clip, None, None), tmp_path, make_dataset(40), 1, 1, 1)
    with contextlib.closing(read_batches(one.reader, one.spans, num_workers, torch.device("cpu"))) as batches:
        next(batches)
        time.sleep(0.2)  # for those that read ahead
        assert 1 <= len(list(one.claims.folder.iterdir())) <= 1 + 2 * (2 if num_workers is None else num_workers)


def test_shards_are_small_enough_to_be_shared():
    """In shards of 4096, one process would make all of CIFAR's rows that fit into one, and the last of few large shards
    is waited for by all."""
    assert even_shard_size(2000, 4096, 64, world_size=1) == 4096, "one process: as before"
    assert even_shard_size(2000, 4096, 64, world_size=2) == 128
    assert even_shard_size(50_000, 4096, 64, world_size=8) == 832
    assert even_shard_size(14_200_000, 4096, 64, world_size=8) == 4096
    for count, batch_size, world_size in itertools.product((1, 63, 64, 999, 10_000), (1, 16, 64), (2, 4, 8)):
        size = even_shard_size(count, 4096, batch_size, world_size)
        assert size % batch_size == 0
        assert -(-count // size) >= min(4 * world_size, -(-count // batch_size)), (count, batch_size, world_size)


def test_progress_is_that_of_all_processes(tmp_path, monkeypatch):
    """A bar of one process's share would say 100 % when nothing is known of the others, or end at a half."""
    shown = io.StringIO()
    shown.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", shown)

    def made(number):
        write_shard(tmp_path, number, {"image_index": torch.arange(8)}, {"start": 8 * number, "stop": 8 * number + 8})

    made(0)  # by an earlier run
    with WholeJob(tmp_path, 20, shown=True) as job:
        job.add(4)
        assert job.bar.n == 4
        made(1)
        made(2)  # by another process
        job.add(4)
        job.count()
        assert job.bar.n == 16
    assert job.bar.n == 20


def tar_files(folder, counts, broken=()):
    """A stream of webdataset's archives, each of so many images."""
    rows = make_dataset(sum(counts), broken).cast_column("image", datasets.Image(decode=False))
    numbers = iter(range(len(rows)))
    for name, count in enumerate(counts):
        members = {}
        for number, row in ((number, rows[number]) for number in itertools.islice(numbers, count)):
            members[f"{number:04d}.png"] = row["image"]["bytes"]
            members[f"{number:04d}.cls"] = str(row["label"]).encode()
        put_tar(folder / f"{name:03d}.tar", members)
    return load_images(folder, streaming=True, image_column="png")


def test_what_reads_other_rows_in_parts_is_not_read_in_parts(tmp_path):
    """Parts must hold the rows of the whole, in its order."""
    stream = tar_files(tmp_path / "tars", [3, 1, 4, 2])
    assert num_parts(stream, 1) == 1
    by_row = [
        stream,
        stream.filter(lambda row: row["label"] != 1),
        stream.map(lambda row: {"n": 1}).select_columns("png"),
    ]
    for one in by_row:
        assert num_parts(one, 2) == num_parts(one, 4) == 4
        rows = [
            row["png"]["path"] for part in range(3) for row in one.shard(num_shards=3, index=part, contiguous=True)
        ]
        assert rows == [row["png"]["path"] for row in one]
        assert num_parts(one, 5) == 1, "fewer files than processes"
    for other in (
        stream.take(5),
        stream.skip(2),
        stream.shuffle(seed=0, buffer_size=2),
        stream.map(lambda row, number: {"number": number}, with_indices=True),
        stream.map(lambda rows: {"first": [rows["png"][0]] * len(rows["png"])}, batched=True),
        datasets.interleave_datasets([stream, stream]),
        split_dataset_by_node(stream, 0, 2),
    ):
        assert num_parts(other, 2) == 1


WORKER = """
import sys, time
import torch
from conftest import make_tiny_clip
from image_stores import make_dataset, make_processor
from hf_vs2.activations import extract_activations
from hf_vs2.data import batches, load_images, open_image

rank, folder, count, streaming, shard_size, seconds = sys.argv[1:]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}.meeting", rank=int(rank), world_size=2)

def slow(value, name, **options):
    time.sleep(float(seconds))
    with open(f"{folder}.log{rank}", "a") as file:
        file.write(name + chr(10))
    return open_image(value, name, **options)

batches.open_image = slow
def note(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".tar"):
        with open(f"{folder}.tars{rank}", "a") as file:
            file.write(str(arguments[0]) + chr(10))

sys.addaudithook(note)
columns = {"label_column": "label"}
if not count.isdigit():
    dataset = load_images(count, streaming=True, image_column="png")
    columns = {"image_column": "png", "label_column": "label", "on_error": "skip"}
elif streaming:
    dataset = make_dataset(int(count)).to_iterable_dataset()
else:
    dataset = make_dataset(int(count))
options = {"image_processor": make_processor(), "batch_size": 4, "shard_size": int(shard_size), "num_workers": 0}
extract_activations(make_tiny_clip(), dataset, folder, dataset_fingerprint="x", progress=False, **columns, **options)
"""


def start(folder, count, streaming=False, shard_size=8, seconds=(0.0, 0.0)):
    """Two processes that extract together; `seconds` is what opening an image takes each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    folder.with_name(f"{folder.name}.meeting").unlink(missing_ok=True)
    arguments = [str(folder), str(count), "1" if streaming else "", str(shard_size)]
    return [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), *arguments, str(seconds[rank])],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def opened(folder):
    """How many images each process has opened."""
    logs = [folder.with_name(f"{folder.name}.log{rank}") for rank in range(2)]
    return [len(log.read_text().splitlines()) if log.exists() else 0 for log in logs]


def of_one(model, folder, count, streaming=False, shard_size=8):
    dataset = make_dataset(count).to_iterable_dataset() if streaming else make_dataset(count)
    options = {"image_processor": make_processor(), "batch_size": 4, "shard_size": shard_size, "label_column": "label"}
    return extract_activations(model, dataset, folder, dataset_fingerprint="x", progress=False, **options)


@pytest.fixture()
def one_thread():
    """The number of threads can change the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_same_rows(one, two, count):
    assert torch.equal(one.tensor(), two.tensor())
    assert torch.equal(one.labels, two.labels)
    assert one.image_indices.tolist() == two.image_indices.tolist() == list(range(count))
    assert not [path for path in two.path.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, streaming, shard_size, least",
    [(45, False, 8, 4), (45, True, 4, 4), (1, False, 8, 0), (1, True, 8, 0)],
)
def test_two_real_processes_make_the_rows_of_one(tiny_clip, one_thread, tmp_path, count, streaming, shard_size, least):
    """Row by row and bit by bit, with remainders, and with fewer images than processes; the quicker one makes more."""
    processes = start(tmp_path / "two", count, streaming, shard_size, seconds=(0.3, 0.0))
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    one = of_one(tiny_clip, tmp_path / "one", count, streaming, shard_size)
    two = ActivationStore.open(tmp_path / "two")
    assert_same_rows(one, two, count)
    slow, quick = opened(tmp_path / "two")
    assert slow + quick == count
    assert count == 1 or least <= slow <= count // 3
    assert not streaming or contents(one.path) == contents(two.path)


@pytest.mark.slow
def test_an_error_ends_the_work_of_all(tmp_path):
    """Whoever waits for hours of work of others before the message of an unreadable image is told it too late."""
    folder = tmp_path / "two"
    processes = start(folder, 400, seconds=(0.05, float("nan")))
    messages = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert "Invalid value NaN" in messages[1]
    assert "StoreError: The extraction failed on another process: see its message" in messages[0]
    assert opened(folder)[0] < 300


@pytest.mark.slow
def test_each_process_reads_archives_of_its_own(tiny_clip, one_thread, tmp_path):
    """Of a stream of several files none is read by two processes, but the first, which shows what the columns are. The
    rows are those of one process, and what a process that died had made of them isn't made again."""
    folder, tars, images = tmp_path / "two", tmp_path / "tars", [9, 0, 14, 1, 5, 17]
    stream = tar_files(tars, images, broken=(3, 40))
    victim, other = start(folder, tars, True, 4, seconds=(0.5, 0.05))
    while opened(folder)[0] < 9:  # the first shards are there
        assert victim.poll() is None
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    assert "Another process of this job has died" in other.communicate(timeout=300)[1]
    victim.communicate()
    read = [set(folder.with_name(f"{folder.name}.tars{rank}").read_text().split()) for rank in range(2)]
    assert read[0] & read[1] <= {str(tars / "000.tar")}
    assert read[0] | read[1] == {str(path) for path in tars.iterdir()}
    store = next(folder.glob("*/index.json")).parent
    headers = [read_shard_header(path.parent, int(path.stem[6:])) for path in shard_files(store)]
    there = sum(header["stop"] - header["start"] for header in headers)
    for log in folder.parent.glob("*.log*"):
        log.unlink()
    assert [process.wait(timeout=300) for process in start(folder, tars, True, 4)] == [0, 0]
    assert sum(opened(folder)) == sum(images) - there > 0

    one = extract_activations(
        tiny_clip, stream, tmp_path / "one", image_column="png", label_column="label", dataset_fingerprint="x",
        image_processor=make_processor(), batch_size=4, shard_size=4, on_error="skip", progress=False,
    )  # fmt: skip
    two = ActivationStore.open(folder)
    assert two.image_indices.tolist() == one.image_indices.tolist() == [n for n in range(46) if n not in (3, 40)]
    assert torch.equal(one.labels, two.labels)
    torch.testing.assert_close(one.tensor(), two.tensor(), atol=1e-5, rtol=1e-5)  # in other batches
    assert [item["index"] for item in two.metadata["skipped"]] == [3, 40]
    assert "image 3 of part 0" in two.metadata["skipped"][0]["error"]
    assert sorted(path.name for path in two.path.iterdir()) == sorted(path.name for path in one.path.iterdir())
