"""How much of reading is hidden behind the tower, and how reading follows the processors. No GPU is needed.

    python benchmarks/feeding.py
    python benchmarks/feeding.py --num_images 192 --rounds 3    # shorter

The vision tower is replaced by a wait, as a GPU is for the processor that feeds it; images are JPEGs of 500 x 375 pixels in
memory. Each round first measures what reading a batch takes (the call without a wait, less that of one batch alone), then waits
as long for each batch. Overlap is the share of the wait that is hidden, of what could be: all batches but one. A process that is
started for reading (`num_workers=2`) stands beside, and reading in turn (0). Before, the same for reading that only waits, which
a busy machine does not disturb. Then reading alone with so many processors of those
that there are (`--processors`), and its speed over that of one.
"""

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import finish, make_parser, parse, ratio
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from hf_vs2 import extract_activations
from hf_vs2.data.ahead import map_ahead, num_processors
from hf_vs2.steering.retrieval import embed_images


def photographs(number: int, size: tuple[int, int] = (500, 375)) -> Dataset:
    """JPEGs of smooth noise, embedded."""
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(number):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(size).save(file, "JPEG")
        rows.append({"bytes": file.getvalue(), "path": None})
    return Dataset.from_dict({"image": rows}, features=Features({"image": ImageFeature()}))


class Waiting(nn.Module):
    """A tower's layer that takes its time, and no processor."""

    seconds_an_image = 0.0

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        time.sleep(self.seconds_an_image * len(hidden_states))
        return hidden_states


def waiting_clip() -> CLIPModel:
    tower = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "patch_size": 112,
    }
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = CLIPModel(CLIPConfig(vision_config=tower, text_config=text, projection_dim=8)).eval()
    model.vision_model.encoder.layers[0] = Waiting()
    return model


def sides(model: CLIPModel, dataset: Dataset, batch_size: int) -> dict[str, Callable[[int | None], Any]]:
    processor = CLIPImageProcessorPil()

    def extract(num_workers: int | None) -> None:
        options = {
            "batch_size": batch_size,
            "num_workers": num_workers,
            "progress": False,
            "dataset_fingerprint": "noise",
        }
        with tempfile.TemporaryDirectory() as folder:
            extract_activations(model, dataset, folder, image_processor=processor, **options)

    def embed(num_workers: int | None) -> None:
        embed_images(model, dataset, image_processor=processor, batch_size=batch_size, num_workers=num_workers)

    return {"extract": extract, "embed_images": embed}


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def overlap(model: CLIPModel, dataset: Dataset, args: argparse.Namespace) -> list[dict[str, Any]]:
    layer, rows = model.vision_model.encoder.layers[0], []
    batches = len(dataset) // args.batch_size
    one_batch = sides(model, dataset.select(range(args.batch_size)), args.batch_size)
    for name, run in sides(model, dataset, args.batch_size).items():
        for num_workers in (None, 0, 2):
            hidden, possible, speed = [], [], []
            for number in range(-1, args.rounds):
                layer.seconds_an_image = 0.0
                first = seconds(lambda name=name, workers=num_workers: one_batch[name](workers))
                reading = seconds(lambda run=run, workers=num_workers: run(workers))
                a_batch = max(1e-9, (reading - first) / (batches - 1))
                layer.seconds_an_image = a_batch / args.batch_size
                both = seconds(lambda run=run, workers=num_workers: run(workers))
                if number >= 0:
                    hidden.append(reading + batches * a_batch - both)
                    possible.append((batches - 1) * a_batch)
                    speed.append(args.batch_size / a_batch)
            row = {"side": name, "num_workers": num_workers, "images_per_s_read": round(statistics.median(speed), 1)}
            rows.append(row | {"overlap": ratio(hidden, possible)})
            print(
                f"{name}, num_workers={num_workers}: {row['images_per_s_read']} images/s read, overlap {rows[-1]['overlap']}"
            )
    layer.seconds_an_image = 0.0
    return rows


def scaling(model: CLIPModel, dataset: Dataset, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Reading with the first n of the processors that there are."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    all_of_them, taken = sorted(os.sched_getaffinity(0)), {}
    run = sides(model, dataset, args.batch_size)["extract"]
    numbers = [number for number in args.processors if number <= len(all_of_them)]
    try:
        for number in range(-1, args.rounds):
            for processors in numbers:
                os.sched_setaffinity(0, all_of_them[:processors])
                took = seconds(lambda: run(None))
                if number >= 0:
                    taken.setdefault(processors, []).append(took)
    finally:
        os.sched_setaffinity(0, all_of_them)
    rows = []
    for processors, took in taken.items():
        speed = round(len(dataset) / statistics.median(took), 1)
        rows.append({"processors": processors, "images_per_s": speed, "over_one": ratio(taken[numbers[0]], took)})
        print(f"{processors} processors: {speed} images/s, {rows[-1]['over_one']} times {numbers[0]}")
    return rows


def waits(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Reading that waits, too: 4 ms an image, 16 batches of 32; what the threads can hide where processors are not short."""
    taken: dict[int, list[list[float]]] = {number: [] for number in (1, 2, 4)}

    def run(num_threads: int, wait: float) -> None:
        groups = [range(32)] * 16
        read = map_ahead(lambda _: time.sleep(0.004), groups, lambda *_: None, num_threads=num_threads)
        for _ in read:
            time.sleep(wait)

    for _ in range(args.rounds):
        for number, found in taken.items():
            reading = seconds(lambda number=number: run(number, 0.0))
            found.append([reading, seconds(lambda number=number, wait=reading / 16: run(number, wait))])
    rows = []
    for number, found in taken.items():
        reading = [alone for alone, _ in found]
        hidden = [2 * alone - together for alone, together in found]
        row = {"side": "waits", "threads": number, "overlap": ratio(hidden, [15 / 16 * alone for alone in reading])}
        rows.append(row | {"over_one": ratio([one[0] for one in taken[1]], reading)})
        print(
            f"reading that waits, {number} threads: overlap {row['overlap']}, {rows[-1]['over_one']} times one thread"
        )
    return rows


def main() -> None:
    parser = make_parser(__doc__, rounds=7)
    parser.add_argument("--num_images", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--processors", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    args = parse(parser)
    model, dataset = waiting_clip(), photographs(args.num_images)
    print(f"{num_processors()} processors to have")
    finish(args, __doc__, [*waits(args), *overlap(model, dataset, args), *scaling(model, dataset, args)])


if __name__ == "__main__":
    main()
