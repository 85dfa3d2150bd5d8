"""What a machine or a network does to a command ends in one line that says what happened, what helps and what is kept."""

import gzip
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from commands import complaint, source
from safetensors import SafetensorError
from torch.utils.data import DataLoader

from hf_vs2.cli import main


def of_a_worker(kill):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            return np.empty(2**58)

    return list(DataLoader(Rows(), num_workers=1))


def of_a_pool():
    with ProcessPoolExecutor(1) as pool:
        pool.submit(os._exit, 9).result()


def to_a_full_disk():
    with open("/dev/full", "w") as file:
        file.write("x" * 10_000)


def safetensors_to_a_full_disk():
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def through_a_library():
    try:
        to_a_full_disk()
    except OSError as error:
        raise ValueError("the cache can't be used, it is damaged: download it again") from error


def from_nowhere():
    import httpx

    httpx.get("http://127.0.0.1:1/model.safetensors")


def without_permission():
    raise PermissionError(13, "Permission denied", "/nobody/activations/index.json")


FAULTS = {
    "a worker is killed": (lambda: of_a_worker(True), "a worker process was killed", "--num_workers"),
    "a worker has no memory": (lambda: of_a_worker(False), "out of memory", "--batch_size"),
    "a process of a pool ends": (of_a_pool, "a worker process was killed", "--num_workers"),
    "torch has no memory": (lambda: torch.empty(2**58), "out of memory", "--batch_size"),
    "numpy has no memory": (lambda: np.empty(2**58), "out of memory", "--batch_size"),
    "Python has no memory": (lambda: [0] * 2**58, "out of memory", "--batch_size"),
    "the disk is full": (to_a_full_disk, "the disk is full", "--output_dir"),
    "torch meets a full disk": (
        lambda: torch.save(torch.zeros(10**5), "/dev/full"),
        "the disk is full",
        "--output_dir",
    ),
    "safetensors meets a full disk": (safetensors_to_a_full_disk, "the disk is full", "--output_dir"),
    "a library hides a full disk": (through_a_library, "the disk is full", "--output_dir"),
    "nobody answers": (from_nowhere, "the network or the server broke off", "again"),
    "a file of gzip is cut": (lambda: gzip.decompress(gzip.compress(b"x" * 99)[:-4]), "ends too early", "download"),
    "compressed bytes are damaged": (lambda: zlib.decompress(b"no"), "ends too early or is damaged", "download"),
    "an archive is damaged": (
        lambda: tarfile.TarFile(fileobj=io.BytesIO(b"x" * 999)),
        "ends too early or is damaged",
        "download",
    ),
    "no permission to write": (
        without_permission,
        "/nobody/activations/index.json can't be written to",
        "--output_dir",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_with_what_helps_and_what_is_kept(name, tmp_path, monkeypatch, capsys):
    """A traceback hides from a user that the disk is full; "it is damaged, download it again" would fill it once more."""
    harm, said, helps = FAULTS[name]
    monkeypatch.setattr("hf_vs2.cli.commands.extract.run", lambda args: harm())
    assert main(["extract", "--model", "m", "--dataset", "d", "--output_dir", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert said in message and helps in message and "kept in" in message
    assert len(message.splitlines()) == 1 and "Traceback" not in message


@pytest.mark.parametrize(("port", "reason"), [(1, "ConnectError"), (65536, "OverflowError: .*port must be 0-65535")])
def test_an_image_of_the_web_that_does_not_come_is_named_alone(port, reason, checkpoint, capsys):
    """No files have arrived that "are not sent twice"."""
    url = f"http://127.0.0.1:{port}/a.png"
    message = complaint(capsys, "classify", url, "--checkpoint", checkpoint, "--labels", "a")
    assert re.match(rf"the image \({url}\) cannot be read \({reason}", message)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), KeyError("labels"), AssertionError(), ZeroDivisionError()]
)
def test_a_bug_is_none_of_them(error, tmp_path, monkeypatch):
    def fail(args):
        raise error

    monkeypatch.setattr("hf_vs2.cli.commands.extract.run", fail)
    with pytest.raises(type(error)):
        main(["extract", "--model", "m", "--dataset", "d", "--output_dir", str(tmp_path)])


@pytest.mark.slow
def test_extraction_survives_a_killed_worker(clip_path, images_path, tmp_path):
    """For real: the system kills a worker; the next run ends as if nothing had happened."""
    command = [sys.executable, "-m", "hf_vs2.cli", "extract", *source(clip_path, images_path), "--disable_tqdm"]
    command += ["--batch_size", "1", "--output_dir", str(tmp_path / "store"), "--num_workers", "1"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    children = f"/proc/{running.pid}/task/{running.pid}/children"
    while running.poll() is None:
        with open(children) as file:
            workers = [int(one) for one in file.read().split()]
        if workers:
            os.kill(workers[-1], signal.SIGKILL)
            break
        time.sleep(0.001)
    message = running.communicate()[1]
    assert (running.returncode, len(message.splitlines())) == (2, 1) and "a worker process was killed" in message
    assert subprocess.run(command).returncode == 0
