"""Resident memory and speed of the pipeline over many images and label sets, tenth by tenth.

    python benchmarks/soak.py                                             # 20,000 images, 200 label sets
    python benchmarks/soak.py --num_images 2000 --num_label_sets 40       # shorter

The bundled tiny CLIP with a random SAE; each call has new images and new labels. Reads /proc, so Linux only.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import finish, make_parser, parse
from PIL import Image
from transformers import CLIPModel

import hf_vs2
from hf_vs2 import SAEConfig, SAEModel, VS2CLIPForZeroShot
from hf_vs2.encoders.base_model import describe_base_model


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def soak(args: argparse.Namespace) -> list[dict[str, Any]]:
    clip = CLIPModel.from_pretrained(Path(hf_vs2.__file__).parent / "demo_assets", dtype=torch.float32).eval()
    torch.manual_seed(0)
    sae = SAEModel(SAEConfig(hidden_size=96, top_k=8, gate=None, **describe_base_model(clip))).eval()
    classifier = hf_vs2.zero_shot_classifier(VS2CLIPForZeroShot(clip, sae), device=args.device, batch_size=64)
    random = np.random.default_rng(0)
    per_call = args.num_images // args.num_label_sets
    rows = []
    start = time.perf_counter()
    for number in range(args.num_label_sets):
        pixels = random.integers(0, 256, (per_call, 28, 28, 3), dtype=np.uint8)
        labels = [f"set {number} digit {index}" for index in range(args.num_labels)]
        classifier([Image.fromarray(one) for one in pixels], labels)
        if (number + 1) * 10 // args.num_label_sets > len(rows):
            seconds, start = time.perf_counter() - start, time.perf_counter()
            images = args.num_images / 10
            rows.append({"images_per_s": round(images / seconds, 1), "resident_mb": round(resident_mb(), 1)})
            print(f"tenth {len(rows):2}: {rows[-1]['images_per_s']:8.1f} images/s {rows[-1]['resident_mb']:8.1f} MB")
    return rows


def main() -> None:
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("--num_images", type=int, default=20_000)
    parser.add_argument("--num_label_sets", type=int, default=200)
    parser.add_argument("--num_labels", type=int, default=10)
    args = parse(parser)
    finish(args, __doc__, soak(args))


if __name__ == "__main__":
    main()
