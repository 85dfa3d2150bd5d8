"""What methods that score by a label set cost: an image more than plain CLIP, and a label set once.

    python benchmarks/label_free.py
    python benchmarks/label_free.py --num_labels 100 --rounds 9

A CLIP of ViT-B/32's size with random weights, an SAE of the paper's, statistics of random rows with a sketch of 4,096.

- whole: image features and logits of a batch of pixels over plain CLIP's, in turn. "again" is plain CLIP once more: the noise.
- label set: seconds to fit a label set that was not seen before.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import clip_model, finish, make_parser, parse, ratio, seconds_in_turn
from torch.nn.functional import normalize

from hf_vs2 import SAEConfig, SAEModel, VS2CLIPForZeroShot, measure_statistics


METHODS = (
    *("vs2", "distribution_norm", "balanced_norm", "balanced_prototypes", "prototypes", "prototypes+pca"),
    "prototypes+sae",
)


def build(device: str) -> VS2CLIPForZeroShot:
    clip = clip_model("ViT-B/32", device)
    sae = SAEModel(SAEConfig(hidden_size=768, expansion_factor=4, top_k=64)).to(device).eval()
    sae.set_domain_statistics(measure_statistics(sae, torch.randn(8192, 768)))
    return VS2CLIPForZeroShot(clip, sae).eval()


def classes_of(model: VS2CLIPForZeroShot, number: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randn(number, model.clip.config.projection_dim, generator=generator)
    return normalize(classes, dim=-1).to(model.device)


@torch.no_grad()
def logits(model: VS2CLIPForZeroShot, pixels: torch.Tensor, classes: torch.Tensor, method: str) -> torch.Tensor:
    with model.steering(method=method):
        return model.class_logits(model.image_features(pixels), classes)


def measure(model: VS2CLIPForZeroShot, num_labels: int, args: argparse.Namespace) -> dict[str, Any]:
    pixels = torch.randn(args.batch_size, 3, 224, 224).to(args.device)
    classes = classes_of(model, num_labels, 0)
    sides: dict[str, Callable[[], Any]] = {
        name: partial(logits, model, pixels, classes, method)
        for name, method in [("plain", "none"), ("again", "none"), *((method, method) for method in METHODS)]
    }
    seconds = seconds_in_turn(sides, args.rounds, args.device)
    fits = {}
    for method in METHODS[1:]:
        taken = []
        for seed in range(1, 4):
            unseen = classes_of(model, num_labels, seed)
            with model.steering(method=method), torch.no_grad():
                start = time.perf_counter()
                model.fit_classes(unseen)
                taken.append(time.perf_counter() - start)
        fits[method] = round(statistics.median(taken), 3)  # the first also embeds the sketch
    over = {name: ratio(seconds[name], seconds["plain"]) for name in sides if name != "plain"}
    return {"num_labels": num_labels, "whole_over_plain": over, "fit_seconds": fits}


def main() -> None:
    parser = make_parser(__doc__, rounds=9)
    parser.add_argument("--num_labels", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--batch_size", type=int, default=32)
    args = parse(parser)
    model, rows = build(args.device), []
    for num_labels in args.num_labels:
        row = measure(model, num_labels, args)
        rows.append(row)
        print(f"\n{num_labels} labels, batch {args.batch_size}")
        for name, found in row["whole_over_plain"].items():
            fit = f", a label set {row['fit_seconds'][name]} s" if name in row["fit_seconds"] else ""
            print(f"  {name:18} over plain {found['median']} (quartiles {found['low']} to {found['high']}){fit}")
    finish(args, __doc__, rows)


if __name__ == "__main__":
    main()
