"""Images a second of our zero-shot pipeline, of transformers' own, and of the vision tower alone.

    python benchmarks/pipeline_throughput.py
    python benchmarks/pipeline_throughput.py --num_images 64 --stock_batch_sizes 16 --rounds 3    # shorter

A random CLIP of true size, CIFAR-100's class names as labels, photographs as file paths (`HF_VS2_SHARED_DATA`/photos, beside the
checkout by default; where there are none, JPEGs of like size are made), again and again up to --num_images. The sides:

- tower B: `get_image_features` on ready pixels in batches of B, as people would write it to be fast;
- stock: `classifier(images, candidate_labels=labels)`, which takes one image at a time, on the first --num_single images;
- stock B: the same with `batch_size=B`;
- ours: `classifier(images, candidate_labels=labels)`, which takes 16 at a time, labels encoded anew;
- ours later: the same with labels it has seen;
- ours VS2: with steering by a random SAE (--num_latents, --top_k) at the last layer, labels encoded anew.

No tokenizer of a real CLIP is needed: one of its kind is trained on the prompts, after which each common word is one token, as it is
for CLIP's own (seen: 9 to 10 tokens a prompt with both). Prints images a second, the ratios of ours to the stock pipeline as people
call it, to the stock pipeline at its best batch size and to the tower at its best, and the largest difference of scores.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import SIZES, clip_model, finish, make_parser, parse, ratio, seconds_in_turn
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, pipeline

import hf_vs2
from hf_vs2 import SAEConfig, SAEModel, VS2CLIPForZeroShot
from hf_vs2.data import IMAGE_EXTENSIONS
from hf_vs2.encoders.base_model import describe_base_model


TASK = "zero-shot-image-classification"
SHARED_DATA = Path(os.environ.get("HF_VS2_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
DEMO_ASSETS = Path(hf_vs2.__file__).parent / "demo_assets"
LABELS = list(hf_vs2.dataset_info("cifar100").classes.values())


def photographs(folder: Path, number: int, made_in: str) -> list[str]:
    """Paths of `number` photographs, those of `folder` again and again; made ones where it does not exist."""
    if folder.is_dir():
        files = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in IMAGE_EXTENSIONS)
    else:
        files = [str(Path(made_in, f"{index}.jpg")) for index in range(60)]
        random = np.random.default_rng(0)
        for index, file in enumerate(files):
            size = (500, 375) if index % 4 else (375, 500)
            coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
            noise = random.normal(0, 12, (size[1], size[0], 3))
            pixels = (np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(file, quality=90)
    return [files[index % len(files)] for index in range(number)]


def tokenizer_for(model: CLIPModel, prompts: list[str]) -> CLIPTokenizer:
    """A tokenizer of CLIP's kind that knows the words of `prompts`, and the model set to its end token."""
    demo = CLIPTokenizer.from_pretrained(DEMO_ASSETS)
    tokenizer = demo.train_new_from_iterator(prompts, model.config.text_config.vocab_size)
    tokenizer.model_max_length = model.config.text_config.max_position_embeddings
    model.text_model.eos_token_id = model.config.text_config.eos_token_id = tokenizer.eos_token_id
    return tokenizer


def steered(model: CLIPModel, num_latents: int, top_k: int) -> VS2CLIPForZeroShot:
    """The model with a random SAE, every image steered."""
    hidden_size = model.config.vision_config.hidden_size
    torch.manual_seed(1)
    config = SAEConfig(
        hidden_size=hidden_size, num_latents=num_latents, top_k=top_k, gate=None, **describe_base_model(model)
    )
    return VS2CLIPForZeroShot(model, SAEModel(config)).to(model.device).eval()


def called_first(classifier: Any, images: list[str]) -> Callable[[], list[Any]]:
    """A call that has to encode its labels."""

    def call() -> list[Any]:
        classifier.clear_cache()
        return classifier(images, candidate_labels=LABELS)

    return call


def largest_difference(left: list[Any], right: list[Any]) -> float:
    return max(
        abs(one["score"] - {other["label"]: other["score"] for other in b}[one["label"]])
        for a, b in zip(left, right, strict=True)
        for one in a
    )


def compare(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    images = photographs(args.images, args.num_images, folder)
    single = images[: args.num_single]
    model = clip_model(args.size, args.device)
    processor = CLIPImageProcessorPil()
    tokenizer = tokenizer_for(model, [f"This is a photo of {label}." for label in LABELS])
    parts = {"tokenizer": tokenizer, "image_processor": processor, "device": args.device}
    stock = pipeline(TASK, model=model, **parts)
    ours = hf_vs2.zero_shot_classifier(model, **parts)
    vs2 = hf_vs2.zero_shot_classifier(steered(model, args.num_latents, args.top_k), **parts)
    ready = processor([Image.open(path) for path in images], return_tensors="pt")["pixel_values"].to(args.device)

    @torch.inference_mode()
    def tower(batch_size: int) -> None:
        for batch in ready.split(batch_size):
            model.get_image_features(pixel_values=batch)

    def stock_batches(batch_size: int) -> list[Any]:
        return stock(images, candidate_labels=LABELS, batch_size=batch_size)

    sides: dict[str, Callable[[], Any]] = {}
    sides |= {f"tower {size}": lambda size=size: tower(size) for size in args.tower_batch_sizes}
    sides["stock"] = lambda: stock(single, candidate_labels=LABELS)
    sides |= {f"stock {size}": lambda size=size: stock_batches(size) for size in args.stock_batch_sizes}
    sides["ours"] = called_first(ours, images)
    sides["ours later"] = lambda: ours(images, candidate_labels=LABELS)
    sides["ours VS2"] = called_first(vs2, images)

    # Warms up on few images, since a round over all of them takes minutes.
    difference = largest_difference(stock(images[:4], candidate_labels=LABELS), ours(images[:4], LABELS))
    vs2(images[:4], LABELS)
    tower(args.num_images)
    seconds = seconds_in_turn(sides, args.rounds, args.device, warm_up=0)

    number = {name: len(single) if name == "stock" else len(images) for name in sides}
    per_image = {name: [one / number[name] for one in found] for name, found in seconds.items()}
    median = {name: statistics.median(found) for name, found in per_image.items()}
    best_stock = min((f"stock {size}" for size in args.stock_batch_sizes), key=median.__getitem__)
    best_tower = min((f"tower {size}" for size in args.tower_batch_sizes), key=median.__getitem__)
    against = {"stock": "stock as people call it", best_stock: "best stock", best_tower: "best tower"}
    return {
        "images_per_s": {name: round(1 / value, 2) for name, value in median.items()},
        "speedup": {
            f"{name} over {title} ({other})": ratio(per_image[other], per_image[name])
            for other, title in against.items()
            for name in ("ours", "ours later", "ours VS2")
        },
        "score_difference": difference,
    }


def main() -> None:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--size", choices=SIZES, default="ViT-B/32")
    parser.add_argument("--images", type=Path, default=SHARED_DATA / "photos", help="Folder of photographs.")
    parser.add_argument("--num_images", type=int, default=256)
    parser.add_argument("--num_single", type=int, default=24, help="Images of the side that takes one at a time.")
    parser.add_argument("--stock_batch_sizes", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--tower_batch_sizes", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--num_latents", type=int, default=3072)
    parser.add_argument("--top_k", type=int, default=64)
    args = parse(parser)
    with tempfile.TemporaryDirectory() as folder:
        row = compare(args, folder)
    print(f"{args.size}, {args.num_images} photographs, {len(LABELS)} labels, images/s:")
    for name, value in row["images_per_s"].items():
        print(f"  {name:12} {value:8.2f}")
    for name, found in row["speedup"].items():
        print(f"{name}: {found['median']} (quartiles {found['low']} to {found['high']})")
    print(f"largest difference of scores, stock and ours: {row['score_difference']:.1e}")
    finish(args, __doc__, [row])


if __name__ == "__main__":
    main()
