"""Training on stores of more and more rows: peak memory, seconds a step, and microseconds to read a random batch.

    python benchmarks/million_rows.py
    python benchmarks/million_rows.py --rows 10000 1000000 --folder /data/scratch

Writes stores of random float32 rows (3 GB for 1,000,000 rows of 768; removed at the end), trains an SAE on each in a process of its
own, in turn, and reads random batches of all of them in this process, in turn. A step is the time from one optimizer step to the
next: reading the batch, forward, backward, Adam. The peak is of the whole training, its pass over all rows for the mean and its
calibration included. Ratios are to the first number of rows.
"""

import argparse
import contextlib
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import finish, make_parser, parse, ratio, seconds_in_turn
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_vs2 import ActivationStore, SAEConfig, SAETrainer, SAETrainingArguments
from hf_vs2.data.stores.store_format import FORMAT, FORMAT_VERSION, read_shard_header, write_index, write_shard


SHARD_ROWS = 4096
WARM_UP = 3
"""Steps that are not timed."""
READS = 20
"""Batches read in one round, so that a round is long enough to be timed."""


def write_store(folder, num_rows, hidden_size):
    """A store as extraction leaves it, shard by shard."""
    generator = torch.Generator().manual_seed(0)
    mean, shards = torch.randn(hidden_size, generator=generator), []
    for number, start in enumerate(range(0, num_rows, SHARD_ROWS)):
        image_index = torch.arange(start, min(start + SHARD_ROWS, num_rows))
        rows = mean + torch.randn(len(image_index), hidden_size, generator=generator)
        write_shard(folder, number, {"layer_11": rows, "image_index": image_index}, {})
        header = read_shard_header(folder, number)
        shards.append({"rows": header["rows"], "bytes": header["bytes"]})
    index = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": {"id": "random/rows", "revision": None, "fingerprint": "random", "dtype": "float32"},
        "base_model_fingerprint": [0.0],
        "layers": [11],
        "site": "cls",
        "preprocessing": {},
        "dataset": {"fingerprint": str(num_rows), "split": "train"},
        "columns": {"image": "image", "label": None},
        "dtype": "float32",
        "dataset_id": "random/rows",
        "class_names": None,
        "hidden_size": hidden_size,
        "num_layers": 12,
        "num_images": num_rows,
        "num_rows": num_rows,
        "skipped": [],
        "shards": shards,
        "shard_size": SHARD_ROWS,
        "complete": True,
    }
    write_index(folder, index)


def train(args):
    """What the process of its own does; its last line of output is the result."""
    store = ActivationStore.open(args.train)
    config = SAEConfig(hidden_size=store.hidden_size, num_latents=args.num_latents, top_k=args.top_k)
    steps = []
    register_optimizer_step_post_hook(lambda *_: steps.append(time.perf_counter()))
    with tempfile.TemporaryDirectory(dir=args.train.parent) as output, contextlib.redirect_stdout(sys.stderr):
        arguments = SAETrainingArguments(
            output_dir=output,
            per_device_train_batch_size=args.batch_size,
            max_steps=args.max_steps,
            save_steps=0,
            disable_tqdm=True,
        )
        start = time.perf_counter()
        SAETrainer(config, arguments, store).train()
        seconds = time.perf_counter() - start
    step = (steps[-1] - steps[WARM_UP]) / (len(steps) - 1 - WARM_UP)
    print(json.dumps({"peak_mb": peak_memory() / 1e6, "step": step, "seconds": seconds}))


def peak_memory():
    """Bytes of memory that this process has held at most."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the parent held when it started this process, too
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def train_in_turn(folders, args):
    """What [`train`] measured, round by round, for each store."""
    results = {num_rows: [] for num_rows in folders}
    options = ("batch_size", "num_latents", "top_k", "max_steps", "threads", "device")
    for _ in range(args.rounds):
        for num_rows, folder in folders.items():
            command = [sys.executable, __file__, "--train", str(folder)]
            command += [text for name in options for text in (f"--{name}", str(getattr(args, name)))]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results[num_rows].append(json.loads(done.stdout.splitlines()[-1]))
    return results


def read(store, batch_size, generator):
    for _ in range(READS):
        store.take(torch.randint(len(store), (batch_size,), generator=generator))


def main():
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument(
        "--folder", type=Path, help="Where the stores are written; the folder for temporary files if not given."
    )
    parser.add_argument("--hidden_size", type=int, default=768)
    parser.add_argument("--num_latents", type=int, default=3072)
    parser.add_argument("--top_k", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--max_steps", type=int, default=300)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    args = parse(parser)
    if args.train is not None:
        train(args)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folders = {num_rows: Path(scratch) / str(num_rows) for num_rows in args.rows}
        for num_rows, folder in folders.items():
            write_store(folder, num_rows, args.hidden_size)
        generator = torch.Generator().manual_seed(0)
        stores = {num_rows: ActivationStore.open(folder) for num_rows, folder in folders.items()}
        sides = {n: functools.partial(read, store, args.batch_size, generator) for n, store in stores.items()}
        reading = seconds_in_turn(sides, 20)
        training = train_in_turn(folders, args)
    rows = []
    print("     rows   store MB | peak MB | ms/step  to the first (quartiles) | train() s | random batch us")
    for num_rows in args.rows:
        steps = [one["step"] for one in training[num_rows]]
        row = {
            "num_rows": num_rows,
            "store_mb": round(4e-6 * num_rows * args.hidden_size),
            "peak_mb": round(max(one["peak_mb"] for one in training[num_rows])),
            "step_ms": round(1e3 * statistics.median(steps), 1),
            "step_ratio": ratio(steps, [one["step"] for one in training[args.rows[0]]]),
            "train_seconds": round(statistics.median(one["seconds"] for one in training[num_rows]), 1),
            "read_us": round(1e6 * statistics.median(reading[num_rows]) / READS),
            "read_ratio": ratio(reading[num_rows], reading[args.rows[0]]),
        }
        found = row["step_ratio"]
        print(
            f"{num_rows:9} {row['store_mb']:10} | {row['peak_mb']:7} | {row['step_ms']:7.1f} {found['median']:9.3f} "
            f"({found['low']:.3f} to {found['high']:.3f}) | {row['train_seconds']:9.1f} | {row['read_us']}"
        )
        rows.append(row)
    finish(args, __doc__, rows)


if __name__ == "__main__":
    main()
