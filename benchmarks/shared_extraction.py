"""What it brings that processes take the next missing shard of an extraction, instead of a fixed share each.

    python benchmarks/shared_extraction.py
    python benchmarks/shared_extraction.py --num_images 256 --wait_ms 5 5 20 --rounds 1

Real processes, one for each value of `--wait_ms`, extract one store together (`torchrun`); the tower of each is a wait of so
many milliseconds an image, as GPUs that are unlike, or shared with others. The other side: the same processes at the same time,
each with an equal part of the images and a store of its own. The seconds are those of the slowest process, without start-up.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import PartialState
from common import finish, make_parser, parse, ratio
from feeding import photographs, seconds, waiting_clip
from transformers import CLIPImageProcessorPil

from hf_vs2 import extract_activations


def extract(folder: Path, wait_ms: list[float], num_images: int, batch_size: int, part: int | None) -> None:
    """One process: all images together with the others, or its part of them alone. Prints its seconds and its images."""
    rank = PartialState(cpu=True).process_index if part is None else part
    torch.manual_seed(0)
    model, dataset = waiting_clip(), photographs(num_images, size=(64, 48))
    model.vision_model.encoder.layers[0].seconds_an_image = wait_ms[rank] / 1000
    made = []
    model.vision_model.encoder.layers[0].register_forward_pre_hook(lambda _, inputs: made.append(len(inputs[0])))
    if part is not None:
        dataset, folder = dataset.shard(len(wait_ms), part, contiguous=True), folder / str(part)
    taken = seconds(
        lambda: extract_activations(
            model,
            dataset,
            folder,
            image_processor=CLIPImageProcessorPil(),
            batch_size=batch_size,
            progress=False,
            dataset_fingerprint=f"noise {part}",
        )
    )
    (folder / f"process-{rank}.json").write_text(json.dumps({"seconds": taken, "images": sum(made)}))


def processes(args: argparse.Namespace, shared: bool) -> list[dict[str, float]]:
    """What each process took and made."""
    with tempfile.TemporaryDirectory() as folder:
        given = ["--num_images", str(args.num_images), "--batch_size", str(args.batch_size), "--process", folder]
        command = [__file__, *given, "--wait_ms", *map(str, args.wait_ms)]
        count = len(args.wait_ms)
        if shared:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
            started = [subprocess.Popen([sys.executable, *torchrun, *command])]
        else:
            started = [subprocess.Popen([sys.executable, *command, "--part", str(part)]) for part in range(count)]
        statuses = [process.wait() for process in started]
        if any(statuses):
            raise SystemExit("a process has failed")
        return [json.loads(path.read_text()) for path in sorted(Path(folder).rglob("process-*.json"))]


def main() -> None:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--num_images", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--wait_ms", type=float, nargs="+", default=[20, 60], help="Of each process, for an image.")
    parser.add_argument("--process", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    args = parse(parser)
    if args.process is not None:
        extract(args.process, args.wait_ms, args.num_images, args.batch_size, args.part)
        return
    fixed, shared, images = [], [], []
    for _ in range(args.rounds):
        fixed.append(max(one["seconds"] for one in processes(args, shared=False)))
        together = processes(args, shared=True)
        shared.append(max(one["seconds"] for one in together))
        images.append([one["images"] for one in together])
    rows = [
        {"side": "a fixed share each", "seconds": round(statistics.median(fixed), 1)},
        {"side": "the next missing shard", "seconds": round(statistics.median(shared), 1), "images": images[-1]},
        {"side": "fixed over shared", **ratio(fixed, shared)},
        {
            "side": "were nothing lost",
            "seconds": round(args.num_images / sum(1000 / wait for wait in args.wait_ms), 1),
        },
    ]
    finish(args, __doc__, rows)


if __name__ == "__main__":
    main()
