"""What the benchmarks share: models of the true sizes, sides timed in turn, and a record of the machine.

Every comparison takes its sides in turn within one process and quotes the median of the ratios taken round by round, with their
quartiles: a machine whose speed drifts slows both sides of a round alike. Weights are random; they do not change the speed.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CLIPConfig, CLIPModel

import hf_vs2


# Hidden size, layers, heads and patch of the vision tower; width and heads of the text tower; width of the shared space. OpenAI's.
SIZES = {
    "ViT-B/32": (768, 12, 12, 32, 512, 8, 512),
    "ViT-B/16": (768, 12, 12, 16, 512, 8, 512),
    "ViT-L/14": (1024, 24, 16, 14, 768, 12, 768),
}


def clip_model(size: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> CLIPModel:
    """A CLIP of one of [`SIZES`] with random weights, in eval mode."""
    width, layers, heads, patch, text_width, text_heads, projection = SIZES[size]
    config = CLIPConfig(
        vision_config={
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "patch_size": patch,
        },
        text_config={
            "hidden_size": text_width,
            "intermediate_size": 4 * text_width,
            "num_hidden_layers": 12,
            "num_attention_heads": text_heads,
        },
        projection_dim=projection,
    )
    torch.manual_seed(0)
    return CLIPModel(config).to(device, dtype).eval()


def make_parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="Times that every side is taken, in turn.")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="Write the result to this JSON file too.")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with the number of threads set."""
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def seconds_in_turn(
    sides: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: str = "cpu",
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each side in each round, by `clock`. The order of the sides turns round by round, so that none always comes first."""
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warm_up, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            _wait(device)
            start = clock()
            sides[name]()
            _wait(device)
            if number >= 0:
                seconds[name].append(clock() - start)
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios taken round by round."""
    ratios = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": round(statistics.median(ratios), 3), "low": round(low, 3), "high": round(high, 3)}


def finish(args: argparse.Namespace, doc: str | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line of JSON: what ran, where, when, and the rows."""
    result = {
        "benchmark": (doc or "").strip().splitlines()[0],
        "arguments": {name: value for name, value in vars(args).items() if name != "output"},
        "machine": machine(args.device),
        "rows": list(rows),
    }
    text = json.dumps(result, default=str)
    print(text)
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
        print(f"wrote {args.output}")


def machine(device: str = "cpu") -> dict[str, Any]:
    """Where and when a figure was measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_vs2": hf_vs2.__version__,
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
