"""What comes next is made by threads while the caller works on what there is. Pillow's decoders, its resizing and
copies of tensors let other threads run meanwhile."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch


T = TypeVar("T")
R = TypeVar("R")
B = TypeVar("B")

THREAD_NAME = "hf_vs2-reader"
_PATIENCE = 5.0  # seconds that an interrupted caller waits for its threads, one of which may hang at a web server


def num_processors(root: Path = Path("/")) -> int:
    """
    How many processors this process may keep busy: those of its affinity mask, no more than the quota of its control
    group (`cpus=` of a container), shared with the other processes that a launcher started on this machine
    (`LOCAL_WORLD_SIZE`); at least 1.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    number = len(affinity(0)) if affinity else os.cpu_count() or 1
    number = min([number, *(max(1, round(quota)) for quota in _quotas(root))])
    together = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, number // int(together)) if together.isdecimal() and int(together) else number


def _quotas(root: Path) -> Iterator[float]:
    """Processors that this process's control group and those above it may use, where any says so."""
    with contextlib.suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        for _, controllers, group in (line.split(":", 2) for line in lines):
            second = not controllers  # version 2 has one tree for all
            if not second and "cpu" not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / ("" if second else "cpu")
            folder = top / group.lstrip("/")
            for place in (folder, *folder.parents):
                with contextlib.suppress(OSError, ValueError):
                    if second:
                        quota, period = (place / "cpu.max").read_text().split()
                    else:
                        quota, period = ((place / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                    if float(quota) > 0:  # "max" in version 2 and -1 in version 1 say: as much as there is
                        yield float(quota) / float(period)
                if place == top:
                    break


def map_ahead(
    function: Callable[[T], R],
    groups: Iterable[Sequence[T]],
    gather: Callable[[Sequence[T], list[R]], B],
    *,
    num_threads: int,
    ahead: int = 2,
) -> Generator[B, None, None]:
    """
    `gather(group, [function(item) for item in group])` of each group, in order. While the caller works on one, threads
    make the next.

    What is raised for a group is raised where it was due, and of several items by the first; a thread that ran out of
    memory is a `MemoryError`. Close the iterator (`contextlib.closing`) to end the threads, which finish the items
    that they are at.

    Args:
        function: called by several threads at once, as is `gather`; both have one processor for tensors.
        groups: taken one after another, by one thread.
        num_threads (`int`): 0 makes everything in the caller's thread, when it is asked for.
        ahead (`int`): how many groups are made beyond the caller's.
    """
    if num_threads == 0:
        for items in groups:
            yield gather(items, [function(item) for item in items])
        return
    room, stopped = threading.Semaphore(ahead), threading.Event()
    begun: SimpleQueue[_Group[T, R, B] | BaseException | None] = SimpleQueue()
    tasks: SimpleQueue[tuple[_Group[T, R, B], int] | None] = SimpleQueue()
    all_there = threading.Barrier(num_threads + 1)
    lost: list[BaseException] = []  # what ended a thread beside the errors of its items

    def work() -> None:
        try:
            # A team of processors of its own would get in the way of the caller's. The setting is a thread's own, but
            # threads to come begin with the last one made.
            torch.set_num_threads(1)
            with contextlib.suppress(threading.BrokenBarrierError):
                all_there.wait()
            while (task := tasks.get()) is not None:
                if not stopped.is_set():
                    task[0].make(function, task[1])
                del task  # a thread that waits holds no image
        except BaseException as error:
            lost.append(error)
            all_there.abort()

    def feed() -> None:
        upcoming = iter(groups)
        try:
            while room.acquire() and not stopped.is_set():
                group = _Group(next(upcoming), gather)
                begun.put(group)
                for place in range(len(group.items)):
                    tasks.put((group, place))
                del group
        except StopIteration:
            begun.put(None)
        except BaseException as error:
            begun.put(error)

    threads = [threading.Thread(target=work, name=THREAD_NAME, daemon=True) for _ in range(num_threads)]
    threads.append(threading.Thread(target=feed, name=THREAD_NAME, daemon=True))
    processors = torch.get_num_threads()
    try:
        for thread in threads[:-1]:
            thread.start()
        with contextlib.suppress(threading.BrokenBarrierError):
            all_there.wait()
        torch.set_num_threads(processors)
        threads[-1].start()
        while (group := begun.get()) is not None:
            if isinstance(group, BaseException):
                raise group
            while not wait([group.future], timeout=0.2).done:
                if lost:  # nobody else would make what it was at
                    raise MemoryError("a thread that reads ahead could not go on") from lost[0]
            batch = group.future.result()
            room.release()
            del group
            yield batch
    finally:
        stopped.set()
        all_there.abort()
        room.release()
        for _ in range(num_threads):
            tasks.put(None)
        until = time.monotonic() + _PATIENCE
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, until - time.monotonic()))


class _Group(Generic[T, R, B]):
    """Items that become one batch, once the last of them is made."""

    def __init__(self, items: Sequence[T], gather: Callable[[Sequence[T], list[R]], B]):
        self.items = items
        self.gather = gather
        self.made: list[Future[R]] = [Future() for _ in items]
        self.left = len(items)
        self.lock = threading.Lock()
        self.future: Future[B] = Future()
        if not items:
            self._finish()

    def make(self, function: Callable[[T], R], place: int) -> None:
        _settle(self.made[place], lambda: function(self.items[place]))
        with self.lock:
            self.left -= 1
            is_last = not self.left
        if is_last:
            self._finish()

    def _finish(self) -> None:
        _settle(self.future, lambda: self.gather(self.items, [future.result() for future in self.made]))
        self.made.clear()


def _settle(future: Future[R], make: Callable[[], R]) -> None:
    """Puts into `future` what `make` gives or raises."""
    try:
        future.set_result(make())
    except BaseException as error:
        future.set_exception(error)
