"""How many images a second transformers' zero-shot pipeline and ours classify, in one process, in turn.

    python benchmarks/pipeline_throughput.py
    python benchmarks/pipeline_throughput.py --model openai/clip-vit-base-patch32 --num_labels 1000 --batch_size 32

The model is a plain CLIP or a VS2 checkpoint, by id or path; `HF_VS2_BENCHMARK_MODEL` names another default than the
demonstration's CLIP. Both pipelines get the same random photos in memory and the same labels. Prints the median images a second of
both and the median of the ratios taken pair by pair (above 1: ours is faster) for our first call with these labels and for a
later one, then the same as one line of JSON. On a machine that does other work too, give --clock cpu: seconds of this process.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

import hf_vs2


DEMO_MODEL = Path(hf_vs2.__file__).parent / "demo_assets"


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(clock, classifier, images, labels, batch_size):
    """Seconds until the last answer; an answer is Python numbers, so nothing is left running on a device."""
    start = clock()
    # A short prompt: the demonstration's text tower has few positions, and the stock pipeline does not cut.
    answers = classifier(images, candidate_labels=labels, batch_size=batch_size, hypothesis_template="a {}.")
    seconds = clock() - start
    assert len(answers) == len(images)
    return seconds, answers


def largest_difference(left, right):
    return max(
        abs(one["score"] - {other["label"]: other["score"] for other in b}[one["label"]])
        for a, b in zip(left, right, strict=True)
        for one in a
    )


def compare(clock, stock, ours, images, labels, batch_size, pairs):
    timed(clock, stock, images[:batch_size], labels, batch_size)  # warm up both
    timed(clock, ours, images[:batch_size], labels, batch_size)
    rows = []
    for _ in range(pairs):
        stock_seconds, expected = timed(clock, stock, images, labels, batch_size)
        ours.clear_cache()
        first_seconds, found = timed(clock, ours, images, labels, batch_size)
        later_seconds, _ = timed(clock, ours, images, labels, batch_size)
        rows.append((stock_seconds, first_seconds, later_seconds))
    stock_s, first_s, later_s = (statistics.median(column) for column in zip(*rows, strict=True))
    return {
        "num_images": len(images),
        "num_labels": len(labels),
        "batch_size": batch_size,
        "stock_images_per_s": round(len(images) / stock_s, 1),
        "ours_first_images_per_s": round(len(images) / first_s, 1),
        "ours_later_images_per_s": round(len(images) / later_s, 1),
        "first_ratio": round(statistics.median(times[0] / times[1] for times in rows), 2),
        "later_ratio": round(statistics.median(times[0] / times[2] for times in rows), 2),
        "score_difference": largest_difference(expected, found),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("HF_VS2_BENCHMARK_MODEL", str(DEMO_MODEL)))
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--num_labels", type=int, default=100)
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()

    settings = {"model": args.model, "device": args.device, "dtype": args.dtype}
    stock = transformers.pipeline("zero-shot-image-classification", **settings)
    ours = transformers.pipeline("vs2-zero-shot-image-classification", **settings)
    random = np.random.default_rng(0)
    shape = (args.num_images, args.image_size, args.image_size, 3)
    images = [Image.fromarray(pixels) for pixels in random.integers(0, 256, shape, dtype=np.uint8)]
    labels = [f"kind {number}" for number in range(args.num_labels)]

    clock = CLOCKS[args.clock]
    rows = [compare(clock, stock, ours, images, labels, batch_size, args.pairs) for batch_size in args.batch_size]
    print("images labels batch | stock/s  ours/s (first)  ours/s (later) | first  later (ours over stock)")
    for row in rows:
        print(
            f"{row['num_images']:6} {row['num_labels']:6} {row['batch_size']:5} | {row['stock_images_per_s']:7.1f} "
            f"{row['ours_first_images_per_s']:15.1f} {row['ours_later_images_per_s']:15.1f} | "
            f"{row['first_ratio']:5.2f} {row['later_ratio']:6.2f}"
        )
    print(
        json.dumps(
            {
                "model": Path(args.model).name,
                "device": args.device,
                "dtype": args.dtype,
                "clock": args.clock,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
