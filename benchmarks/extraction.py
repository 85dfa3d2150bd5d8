"""Images a second of `extract_activations` and of a plain loop over the vision tower on ready pixels.

    python benchmarks/extraction.py
    python benchmarks/extraction.py --num_images 256 --num_photographs 60 --rounds 2    # shorter

A random CLIP of true size. Two data sets: 32 x 32 pixel PNGs as bytes in Arrow, as CIFAR's are (the real ones where
`HF_VS2_SHARED_DATA`/cifar10 holds them, noise else), and photographs as files (those of `HF_VS2_SHARED_DATA`/photos again and
again; where there are none, JPEGs of like size are made). Each extraction goes into a fresh folder and counts everything from the
call to the finished store: the hashes of weights and images too, whose seconds are printed beside. The loop takes the same number of
images at the same batch size and keeps the CLS rows.
"""

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import SIZES, clip_model, finish, make_parser, parse, ratio, seconds_in_turn
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from pipeline_throughput import SHARED_DATA, photographs
from transformers import CLIPImageProcessorPil, CLIPModel

from hf_vs2 import extract_activations
from hf_vs2.data.stores.fingerprint import dataset_fingerprint
from hf_vs2.encoders.fingerprints import model_fingerprint


FEATURES = Features({"image": ImageFeature()})


def small_images(number: int, cache: str) -> Dataset:
    """PNGs of 32 x 32 pixels, embedded."""
    folder = SHARED_DATA / "cifar10" / "data"
    if folder.is_dir():
        dataset = Dataset.from_parquet(str(next(folder.glob("test-*.parquet"))), cache_dir=cache)
        column = next(name for name, kind in dataset.features.items() if isinstance(kind, ImageFeature))
        dataset = dataset.select_columns(column)
        return (dataset if column == "image" else dataset.rename_column(column, "image")).select(range(number))
    pixels = np.random.default_rng(0).integers(0, 256, (number, 32, 32, 3), dtype=np.uint8)
    rows = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    return Dataset.from_dict({"image": rows}, features=FEATURES)


def compare(name: str, dataset: Dataset, model: CLIPModel, args: argparse.Namespace) -> dict[str, Any]:
    processor = CLIPImageProcessorPil()
    some = [image.convert("RGB") for image in dataset[: min(len(dataset), 4 * args.batch_size)]["image"]]
    ready = processor(some, return_tensors="pt")["pixel_values"].to(args.device)
    sizes = [min(args.batch_size, len(dataset) - start) for start in range(0, len(dataset), args.batch_size)]

    @torch.inference_mode()
    def loop() -> torch.Tensor:
        rows = []
        for number, size in enumerate(sizes):
            start = number * args.batch_size % len(ready)
            pixels = ready[start : start + size]
            rows.append(model.vision_model(pixel_values=pixels).last_hidden_state[:, 0].cpu())
        return torch.cat(rows)

    def extract() -> None:
        with tempfile.TemporaryDirectory() as folder:
            store = extract_activations(
                model,
                dataset,
                folder,
                image_processor=processor,
                batch_size=args.batch_size,
                num_workers=args.num_workers,
                progress=False,
            )
            assert len(store) == len(dataset)

    with torch.inference_mode():
        model.vision_model(pixel_values=ready[: args.batch_size])  # the first pass of a process is slower
    seconds = seconds_in_turn({"loop": loop, "extract": extract}, args.rounds, args.device, warm_up=0)
    start = time.perf_counter()
    model_fingerprint(model.vision_model)
    middle = time.perf_counter()
    dataset_fingerprint(dataset.cast_column("image", ImageFeature(decode=False)), "image", None)
    return {
        "dataset": name,
        "num_images": len(dataset),
        "images_per_s": {side: round(len(dataset) / statistics.median(found), 2) for side, found in seconds.items()},
        "extract_over_loop": ratio(seconds["loop"], seconds["extract"]),
        "hash_seconds": {"model": round(middle - start, 2), "images": round(time.perf_counter() - middle, 2)},
    }


def main() -> None:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--size", choices=SIZES, default="ViT-B/32")
    parser.add_argument("--images", type=Path, default=SHARED_DATA / "photos", help="Folder of photographs.")
    parser.add_argument("--num_images", type=int, default=2000, help="How many of 32 x 32 pixels; 0 leaves them out.")
    parser.add_argument("--num_photographs", type=int, default=240, help="0 leaves them out.")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument(
        "--num_workers", type=int, help="By default what `extract_activations` chooses; 0: reading in turn."
    )
    args = parse(parser)
    model = clip_model(args.size, args.device)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = photographs(args.images, args.num_photographs, folder)
        for name, number, dataset in (
            ("32 x 32 pixels", args.num_images, lambda: small_images(args.num_images, folder)),
            ("photographs", args.num_photographs, lambda: Dataset.from_dict({"image": paths}, features=FEATURES)),
        ):
            if number:
                rows.append(compare(name, dataset(), model, args))
    print(f"{args.size}, batch size {args.batch_size}, images/s:")
    for row in rows:
        speed, found, hashes = row["images_per_s"], row["extract_over_loop"], row["hash_seconds"]
        print(
            f"  {row['num_images']} {row['dataset']}: loop {speed['loop']}, extract {speed['extract']}; extract over loop "
            f"{found['median']} (quartiles {found['low']} to {found['high']}); "
            f"hashes {hashes['model']} s (model) and {hashes['images']} s (images)"
        )
    finish(args, __doc__, rows)


if __name__ == "__main__":
    main()
