"""The store gives the rows that were written, from any place at any time, without growing into memory, or says which file is bad."""

import io
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from trainings import finish_store

from hf_vs2.data.stores.rows import checked_labels, rows_of
from hf_vs2.data.stores.store import ActivationStore, _fill
from hf_vs2.data.stores.store_format import (
    ROW_DTYPES,
    StoreError,
    read_shard_header,
    shard_name,
    write_shard,
)
from hf_vs2.training.calibration import activation_statistics


def make_store(folder, dtype="float32", rows_per_shard=(7, 0, 30, 1, 12), layers=(0, 2), hidden=5):
    """A store of uneven shards, one of them empty, and the rows of each layer."""
    dice = torch.Generator().manual_seed(0)
    rows = {layer: torch.randn(sum(rows_per_shard), hidden, generator=dice).to(ROW_DTYPES[dtype]) for layer in layers}
    start = 0
    for number, count in enumerate(rows_per_shard):
        part = slice(start, start := start + count)
        tensors = {f"layer_{layer}": values[part].contiguous() for layer, values in rows.items()}
        write_shard(folder, number, tensors | {"image_index": torch.arange(part.start, part.stop)}, {})
        assert read_shard_header(folder, number)["rows"] == count
    store = finish_store(folder, rows_per_shard, hidden, list(layers), dtype=dtype)
    return store, {layer: values.float() for layer, values in rows.items()}


# The right rows


@pytest.mark.parametrize("dtype", list(ROW_DTYPES))
def test_rows_come_as_asked_for_whatever_the_order(tmp_path, dtype):
    """An SAE would be trained on other images' rows, or on bytes read at the wrong place, without any error."""
    store, rows = make_store(tmp_path, dtype)
    dice = torch.Generator().manual_seed(1)
    orders = {
        "all": torch.arange(50),
        "backwards": torch.arange(49, -1, -1),
        "stretches": torch.cat([torch.arange(20, 45), torch.arange(3, 9), torch.arange(30, 50)]),
        "repeated": torch.tensor([6, 6, 7, 7, 6, 7, 8]),
        "from the end": torch.arange(-50, 0),
        "around the end": torch.tensor([48, 49, -1, 0, 1, -50]),
        "every other": torch.arange(0, 50, 2),
        "at random": torch.randint(-50, 50, (200,), generator=dice),
        "none": torch.empty(0, dtype=torch.int64),
    }
    for layer in (0, 2):
        for name, wanted in orders.items():
            taken = store.take(wanted, layer)
            assert taken.dtype == torch.float32, name
            assert torch.equal(taken, rows[layer][wanted]), (name, layer)
        assert torch.equal(store.tensor(layer), rows[layer])
    assert torch.equal(store.image_indices, torch.arange(50))


class TakenRows(torch.utils.data.Dataset):
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return len(self.store)

    def __getitem__(self, number):
        return self.store.take([number], 2)[0]


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_worker_processes_read_the_store_they_were_handed(tmp_path, start):
    """A DataLoader over a store would fail or mix up rows: workers share open files with their parent, or receive a pickle."""
    if start not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {start} processes")
    store, rows = make_store(tmp_path)
    store.take([3, 20], 2)
    loader = DataLoader(TakenRows(store), batch_size=4, num_workers=2, multiprocessing_context=start)
    assert torch.equal(torch.cat(list(loader)), rows[2])


def test_threads_read_at_the_same_time(tmp_path):
    """A server that answers several requests at once would get rows of another request."""
    store, rows = make_store(tmp_path, rows_per_shard=(1000,) * 4, hidden=64)

    def right(seed):
        wanted = torch.randint(4000, (300,), generator=torch.Generator().manual_seed(seed))
        return torch.equal(store.take(wanted, 0), rows[0][wanted])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, range(100)))


def test_a_store_is_found_from_another_folder_and_a_mask_is_no_list_of_rows(tmp_path, monkeypatch):
    """A relative path must not be looked for where the program went since; a mask would give rows 0 and 1 again and
    again."""
    rows = torch.randn(5, 4)
    write_shard(tmp_path / "store", 0, {"layer_2": rows, "image_index": torch.arange(5)}, {})
    finish_store(tmp_path / "store", [5], 4, [2])
    monkeypatch.chdir(tmp_path)
    store = ActivationStore.open("store")
    monkeypatch.chdir("/")
    assert torch.equal(store.take([1, 3]), rows[[1, 3]])
    for numbers in (torch.tensor([True, False, True, False, False]), torch.tensor([0.9, 1.9])):
        with pytest.raises(TypeError, match="must be row numbers, not torch"):
            store.take(numbers)


def test_an_exported_dataset_outlives_the_store(tmp_path):
    """`to_dataset` shares the mapped files; it must keep them mapped itself."""
    store, rows = make_store(tmp_path)
    dataset = store.to_dataset(2)
    del store
    assert torch.equal(dataset.with_format("torch")["activation"][:], rows[2])


def test_a_read_that_stops_short_is_continued():
    """One read brings at most 2 GB: rows of a large shard would be left as whatever was in memory."""

    class Short(io.BytesIO):
        def readinto(self, into):
            return super().readinto(memoryview(into)[:7])

    sent, received = os.urandom(500), bytearray(500)
    file = Short(sent)
    _fill(file, memoryview(received))
    assert received == sent
    with pytest.raises(ValueError, match="ends too early"):
        _fill(file, memoryview(received))


# Damage while in use


def cut(file, size):
    os.truncate(file, size - 8)


def overwrite(file, size):
    file.write_bytes(b"\xff" * size)


def other_shape(file, size):
    tensors = {"layer_0": torch.zeros(60, 5), "layer_2": torch.zeros(30, 5), "image_index": torch.arange(30)}
    save_file(tensors, file)


def same_size(file, size):
    """As many bytes, other rows: a shard of another model with a smaller width."""
    before = file.read_bytes()
    length = int.from_bytes(before[:8], "little")
    header = before[8 : 8 + length].replace(b"[30,5]", b"[50,3]")
    assert header.count(b"[50,3]") == 2
    file.write_bytes(before[:8] + header + before[8 + length :])


def other_dtype(file, size):
    before = file.read_bytes()
    file.write_bytes(before.replace(b'"F32"', b'"I32"'))


def missing(file, size):
    file.unlink()


IN_ITS_PLACE, INTO_IT = (cut, other_shape, missing), (overwrite, same_size, other_dtype)


@pytest.mark.parametrize(
    ("damage", "read_before"),
    [*((one, False) for one in IN_ITS_PLACE + INTO_IT), *((one, True) for one in IN_ITS_PLACE)],
)
def test_damage_since_the_store_was_opened_names_the_file(tmp_path, damage, read_before):
    """Bytes of something else would be read as activations, or an error would leave open which of thousands of files to
    mend. Where rows begin is remembered: in a file that was exchanged under a running job other bytes lie there."""
    store, rows = make_store(tmp_path)
    if read_before:
        assert torch.equal(store.take(range(50), 0), rows[0])
    damage(tmp_path / shard_name(2), store.metadata["shards"][2]["bytes"])
    good = [0, 6, 38, 49]  # of the other shards, which are as good as before
    assert torch.equal(store.take(good, 0), rows[0][good])
    with pytest.raises(StoreError, match=r"shard-00002\.safetensors is damaged \(.+\): extract the activations again"):
        store.take([0, 9], 0)


# Memory


def at_random(store):
    dice = torch.Generator().manual_seed(0)
    for _ in range(200):
        yield store.take(torch.randint(len(store), (512,), generator=dice))


def in_order(store):
    yield from store.iter_batches(4096)


def training_statistics(store):
    yield activation_statistics(rows_of(store), torch.arange(len(store)))


@pytest.mark.parametrize("read", [at_random, in_order, training_statistics])
def test_resident_memory_does_not_grow_with_the_store(tmp_path, read):
    """And few files are open. A mapped page that was read counts as the job's memory: schedulers and containers kill a job at its limit, although the
    store would fit on the disk many times over."""
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is measured through /proc, which this system does not have")
    rows, hidden, shards = 4096, 512, 32
    tensors = {"layer_2": torch.randn(rows, hidden), "image_index": torch.arange(rows)}
    write_shard(tmp_path, 0, tensors, {})
    for number in range(1, shards):
        os.link(tmp_path / shard_name(0), tmp_path / shard_name(number))
    store = finish_store(tmp_path, [rows] * shards, hidden, [2])
    assert sum(shard["bytes"] for shard in store.metadata["shards"]) > 268e6
    store.take(range(4096))  # what the first call alone needs
    before, files = resident_memory(), len(os.listdir("/proc/self/fd"))
    most = before
    for _ in read(store):
        most = max(most, resident_memory())
    assert most - before < 60e6 and len(os.listdir("/proc/self/fd")) - files < 5
    assert len(pickle.dumps(store)) < 20_000  # no rows travel to a worker process


def resident_memory():
    """Bytes of this process in memory, mapped files included."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def test_only_the_rows_asked_for_are_read(tmp_path):
    """A random batch from a cold disk would cost whole shards."""
    if not Path("/proc/self/io").exists():
        pytest.skip("bytes read are counted through /proc, which this system does not have")
    store, rows = make_store(tmp_path, rows_per_shard=(2000,) * 3, hidden=256, layers=(0,))
    wanted = torch.tensor([5999, 3, 2500, 4])
    before = bytes_read()
    assert torch.equal(store.take(wanted), rows[0][wanted])
    assert 4 * 256 * 4 <= bytes_read() - before < 4 * 256 * 4 + 10_000


def bytes_read():
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def test_labels_in_narrow_integers_are_whole_numbers():
    """Data sets keep labels in a byte: 255 is a class, and -1 is unknown, in any width."""
    assert checked_labels(torch.tensor([255, 0], dtype=torch.uint8), 2).tolist() == [255, 0]
    assert checked_labels(torch.tensor([127, -1], dtype=torch.int8), 2, lowest=-1).tolist() == [127, -1]
    with pytest.raises(ValueError, match="label 200 of row 1 is out of range"):
        checked_labels(torch.tensor([1, 200], dtype=torch.uint8), 2, num_classes=200)
