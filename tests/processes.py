"""Processes that are forked from one that has imported torch; they import nothing of the suite but this."""

import multiprocessing
from pathlib import Path

import torch


CONTEXT = multiprocessing.get_context("forkserver")


def reported(job, error_file: Path, *arguments) -> None:
    torch.set_num_threads(1)  # the number of threads can change the last bit
    try:
        job(*arguments)
    except Exception as error:
        error_file.write_text(f"{type(error).__name__}: {error}")
        raise


def start(error_file: Path, job, *arguments):
    process = CONTEXT.Process(target=reported, args=(job, error_file, *arguments))
    process.start()
    return process


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
