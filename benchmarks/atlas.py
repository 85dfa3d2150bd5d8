"""How long an atlas takes to build, and how much room it and its making need, on made-up rows and images.

    python benchmarks/atlas.py --latents 3072 --images 50000

The rows, the SAE and the images are random, so nearly every image is among the strongest of some latent: more thumbnails than a real
data set of that size has. The CLIP is the demo's. Prints the seconds, the peak of the process's memory, and files and bytes of the folder.
"""

import argparse
import io
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import CLIPModel

from hf_vs2 import SAEConfig, SAEModel, VS2CLIPForZeroShot, build_atlas
from hf_vs2.demo.data import DIGIT_NAMES
from hf_vs2.encoders.processing import load_processing


def made_up_images(number: int) -> Iterator[dict]:
    """64-pixel JPEGs of noise on one colour."""
    generator = np.random.default_rng(0)
    for _ in range(number):
        pixels = generator.integers(0, 256, 3) + generator.integers(-40, 40, (64, 64, 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG")
        yield {"image": {"bytes": buffer.getvalue(), "path": None}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=3072)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--output", type=Path, help="keep the atlas in this folder")
    args = parser.parse_args()
    assets = str(files("hf_vs2") / "demo_assets")
    clip = CLIPModel.from_pretrained(assets, dtype=torch.float32).eval()
    tokenizer, _ = load_processing(assets)
    torch.manual_seed(0)
    rows = 1 + torch.randn(args.images, clip.config.vision_config.hidden_size)
    sae = SAEModel(SAEConfig(hidden_size=rows.shape[1], num_latents=args.latents, top_k=32)).eval()
    sae.set_statistics(rows.mean(0), (rows - rows.mean(0)).square().sum(-1).mean().item())
    labels = torch.randint(0, len(DIGIT_NAMES), (args.images,))
    with tempfile.TemporaryDirectory() as folder:
        features = datasets.Features({"image": datasets.Image()})
        images = datasets.Dataset.from_generator(
            made_up_images, features=features, gen_kwargs={"number": args.images}, cache_dir=folder
        )
        output = args.output or Path(folder) / "atlas"
        model = VS2CLIPForZeroShot(clip, sae)
        start = time.perf_counter()
        page = build_atlas(model, tokenizer, rows, images, output, labels=labels, class_names=DIGIT_NAMES)
        seconds = time.perf_counter() - start
        sizes = [path.stat().st_size for path in page.parent.rglob("*") if path.is_file()]
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    print(
        f"{args.latents} latents, {args.images} images, {torch.get_num_threads()} threads: {seconds:.1f} s, ", end=""
    )
    print(f"peak memory {peak:.0f} MiB, {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
