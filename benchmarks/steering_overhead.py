"""What steering adds to a batch of images: wall time and FLOPs of CLIP's image side with VS2 in it, over the same CLIP without.

    python benchmarks/steering_overhead.py
    python benchmarks/steering_overhead.py --size ViT-B/16 --batch_size 8 --rounds 9

CLIPs of the true sizes with random weights, which the wrapper shares; pixels ready; `get_image_features` on both sides. The time is
estimated twice, without and with a gate:

- whole: the wrapper's call over the CLIP's own, in turn. "again" is the CLIP's own call once more: the noise, which on a CPU is larger
  than what is looked for.
- added: both calls with the vision tower's output put in its place, so that only what the wrapper adds is left (its own code, steering,
  `post_layernorm` once more); the difference, over the median of the CLIP's whole call. This is the figure to read.

FLOPs are those of `hf_vs2.study.cost.count_flops`: torch's own counter, the sparse sums added by formula. A gate adds none.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from common import SIZES, clip_model, finish, make_parser, parse, ratio, seconds_in_turn

from hf_vs2 import SAEConfig, SAEModel, VS2CLIPForZeroShot
from hf_vs2.study.cost import count_flops


TOP_K = {"ViT-B/32": 64, "ViT-B/16": 256, "ViT-L/14": 256}
"""The paper's for the first two."""


@torch.no_grad()
def measure(size: str, args: argparse.Namespace) -> dict[str, Any]:
    clip = clip_model(size, args.device, getattr(torch, args.dtype))
    config = SAEConfig(hidden_size=clip.config.vision_config.hidden_size, expansion_factor=4, top_k=TOP_K[size])
    sae = SAEModel(config).to(args.device).eval()
    pixels = torch.randn(args.batch_size, 3, 224, 224).to(args.device, clip.dtype)
    gate = VS2CLIPForZeroShot(clip, sae).image_features(pixels).fvu.median().item()  # half of the images are steered
    models = {
        "plain": clip,
        "again": clip,
        "steered": VS2CLIPForZeroShot(clip, sae),
        "gated": VS2CLIPForZeroShot(clip, sae, fvu_threshold=gate),
    }
    calls: dict[str, Callable[[], Any]] = {
        name: lambda model=model: model.get_image_features(pixel_values=pixels) for name, model in models.items()
    }
    whole = seconds_in_turn(calls, args.rounds, args.device)
    output = clip.vision_model(pixel_values=pixels)
    with patch.object(clip.vision_model, "forward", lambda *_, **__: copy.copy(output)):
        rest = seconds_in_turn(calls, args.short_rounds, args.device, warm_up=10)
    plain = statistics.median(whole["plain"])
    added = {
        name: [one - base for one, base in zip(rest[name], rest["plain"], strict=True)]
        for name in ("steered", "gated")
    }
    return {
        "size": size,
        "top_k": TOP_K[size],
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "plain_ms": round(1e3 * plain, 2),
        "whole_over_plain": {name: ratio(whole[name], whole["plain"]) for name in ("steered", "gated", "again")},
        "added_ms": {name: round(1e3 * statistics.median(seconds), 3) for name, seconds in added.items()},
        "added_percent": {
            name: dict(zip(("low", "median", "high"), percent(seconds, plain), strict=True))
            for name, seconds in added.items()
        },
        "added_flops_percent": round(count_flops(clip, sae)["added_percent"], 4),
    }


def percent(seconds: list[float], plain: float) -> list[float]:
    """Quartiles."""
    return [round(100 * quartile / plain, 4) for quartile in statistics.quantiles(seconds, n=4)]


def main() -> None:
    parser = make_parser(__doc__, rounds=9)
    parser.add_argument("--size", choices=SIZES, nargs="+", default=["ViT-B/32", "ViT-B/16"])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--short_rounds", type=int, default=300, help="Rounds without the vision tower.")
    parser.add_argument("--dtype", default="float32")
    args = parse(parser)
    rows = []
    for size in args.size:
        row = measure(size, args)
        rows.append(row)
        print(f"\n{size}, batch {args.batch_size}, k {row['top_k']}, {args.dtype}: plain CLIP {row['plain_ms']} ms")
        for name, found in row["whole_over_plain"].items():
            print(f"  whole {name:8} over plain {found['median']} (quartiles {found['low']} to {found['high']})")
        for name, found in row["added_percent"].items():
            quartiles = f"(quartiles {found['low']} to {found['high']})"
            print(f"  added {name:8} {row['added_ms'][name]} ms = {found['median']} % {quartiles}")
        print(f"  added FLOPs    {row['added_flops_percent']} %")
    finish(args, __doc__, rows)


if __name__ == "__main__":
    main()
