"""What the processes of one extraction tell each other through the store's folder, which all of them see."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...files.progress import progress_bar
from .parts import shard_files
from .store_format import read_shard_header


class Claims:
    """Who makes which shard: a process takes a shard by making a file, which the file system lets only one do."""

    def __init__(self, store: Path):
        self.folder = store / ".claims"

    def begin(self) -> None:
        """Forgets what was taken by processes that have died since."""
        self.end()
        self.folder.mkdir()

    def end(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def take(self, number: int) -> bool:
        """Whether this process is to make the shard: nobody else has taken it, and none has failed."""
        if (self.folder / "failed").exists():
            return False
        try:
            (self.folder / str(number)).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    @contextlib.contextmanager
    def given_up_on_error(self) -> Iterator[None]:
        """An error is told once all processes are through: no process takes another shard from then on."""
        try:
            yield
        except Exception:
            (self.folder / "failed").touch()
            raise


class WholeJob:
    """The main process's bar, of what all processes make: its own batches, and the shards of the others."""

    def __init__(self, store: Path, total: int | None, *, shown: bool):
        self.store, self.total = store, total
        self.bar = progress_bar(shown=shown, total=total, unit=" images", desc="CLS activations")
        self.images = dict.fromkeys(self._shards(), 0)  # of each shard, made by this run

    def __enter__(self) -> WholeJob:
        return self

    def __exit__(self, error: Any, *_: Any) -> None:
        if error is None and self.total is not None:
            self.bar.update(self.total - self.bar.n)
        self.bar.close()

    def _shards(self) -> Iterator[Path]:
        return iter(()) if self.bar.disable else shard_files(self.store)

    def add(self, num_images: int) -> None:
        """This process has made so many."""
        self.bar.update(num_images)

    def count(self) -> None:
        """Counts the images of all shards that are there by now."""
        for path in self._shards():
            if path not in self.images and (header := read_shard_header(path.parent, int(path.stem[6:]))):
                self.images[path] = header["stop"] - header["start"]
        self.bar.update(max(0, sum(self.images.values()) - self.bar.n))
