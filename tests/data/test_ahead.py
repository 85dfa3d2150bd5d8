"""Reading ahead: what is read while the tower or the training step computes."""

import contextlib
import os
import signal
import sys
import threading
import time

import pytest
import torch

from hf_vs2.data.ahead import THREAD_NAME, map_ahead, num_processors


def readers():
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


def as_it_is(group, results):
    return results


def test_the_next_batch_is_read_during_the_step_and_no_more():
    """Reading a batch from a store of a million rows took 6 % of a step. One batch ahead, no more: memory stays what it was."""
    begun, at_work = [], [threading.Event() for _ in range(5)]
    processors = torch.get_num_threads()

    def read(number):
        begun.append(number)
        at_work[number].set()
        return number**2

    groups = ([number] for number in range(5))
    with contextlib.closing(map_ahead(read, groups, as_it_is, num_threads=1, ahead=1)) as batches:
        for number in range(5):
            assert next(batches) == [number**2]
            if number < 4:
                assert at_work[number + 1].wait(10), "the next is not read before this one is done with"
            time.sleep(0.01)
            assert begun == list(range(min(number + 2, 5)))
        assert list(batches) == [] == readers()
    assert list(map_ahead(read, [], as_it_is, num_threads=2)) == []
    assert torch.get_num_threads() == processors


def test_images_are_read_at_once_in_order_and_errors_come_where_they_were_due():
    """Decoding one after another leaves processors and tower idle; but batches before a broken image must be computed, the first
    of several broken ones be named, and nothing go on after an error."""
    meeting = threading.Barrier(3)

    def read(number):
        if number < 3:
            meeting.wait(timeout=10)  # fails unless three are read at once
        time.sleep(0.002 * (number % 3))
        if number in broken:
            raise ValueError(f"image {number}")
        return -number

    groups = [[0, 1], [2, 3, 4], [], [5], [6, 7]]
    for broken, whole, error in (((), 5, None), ((7, 4, 3), 1, "image 3"), ((6,), 4, "image 6")):  # noqa: B007
        found = []
        with pytest.raises(ValueError, match=error) if error else contextlib.nullcontext():
            for results in map_ahead(read, iter(groups), as_it_is, num_threads=3):
                found.append(results)
        assert found == [[-number for number in group] for group in groups[:whole]]
        assert not readers()

    def rows():
        yield from ([10], [11])
        raise OSError("the stream broke off")

    for num_threads in (0, 2):
        batches = map_ahead(lambda number: number, rows(), as_it_is, num_threads=num_threads)
        assert [next(batches), next(batches)] == [[10], [11]]
        with pytest.raises(OSError, match="broke off"):
            next(batches)
        assert not readers()


@pytest.mark.parametrize("end", ["close", "drop", "Ctrl-C"])
def test_who_stops_half_way_waits_for_the_images_at_work_and_for_no_more(end):
    """Ctrl-C or `break` with hundreds of photographs to come; a thread left would keep memory and, in a notebook, go on for ever."""
    read = []
    groups = [range(1), range(1000)]
    batches = map_ahead(lambda number: time.sleep(0.02) or read.append(number), groups, as_it_is, num_threads=2)
    assert next(batches) == [None]
    if end == "close":
        batches.close()
    elif end == "drop":
        del batches
    else:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
        threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        try:
            with pytest.raises(KeyboardInterrupt):
                next(batches)
        finally:
            signal.signal(signal.SIGINT, before)
    assert not readers()
    assert len(read) < 50


@pytest.mark.parametrize(
    ("cgroup", "files", "local_world_size", "processors"),
    [
        ("", {}, None, 8),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, None, 3),
        ("0::/", {"cpu.max": "50000 100000"}, None, 1),
        ("0::/", {"cpu.max": "1600000 100000"}, None, 8),
        ("4:cpu,cpuacct:/a\n0::/", {"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "100000"}, None, 2),
        ("4:cpu:/\n3:cpuset:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, 8),
        ("0::/", {"cpu.max": "600000 100000"}, "4", 1),
        ("", {}, "2", 4),
        ("", {}, "100", 1),
        ("0::/gone", {"cpu.max": "damaged"}, "", 8),
    ],
)
def test_processors_are_those_that_this_process_may_keep_busy(
    tmp_path, monkeypatch, cgroup, files, local_world_size, processors
):
    """In a container, under `taskset` and beside the other processes of a launch, one thread for each processor of the machine
    would be many too many."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local_world_size is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world_size)
    for name, text in {
        "proc/self/cgroup": cgroup,
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert num_processors(tmp_path) == processors


@pytest.mark.parametrize("place", ["torch.set_num_threads", "hf_vs2.data.ahead._settle"])
def test_a_thread_without_memory_is_an_error_and_no_endless_wait(monkeypatch, place):
    """Where memory is short a thread may end outside the reading of an image: nobody would ever read that one."""
    module, _, name = place.rpartition(".")
    real = getattr(sys.modules[module], name)

    def full(*arguments):
        if threading.current_thread().name == THREAD_NAME:
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(place, full)
    with pytest.raises(MemoryError, match="could not go on"):
        list(map_ahead(abs, [[1, 2]], as_it_is, num_threads=2))
    assert not readers()
