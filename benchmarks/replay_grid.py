"""A grid of gamma and lambda over cached rows: seconds and memory, and a cell's cost against replaying the tail for it.

    python benchmarks/replay_grid.py
    python benchmarks/replay_grid.py --num_rows 50000 --num_classes 1000

`steering_grid` on random rows, classes and weights of the true sizes (ViT-B/32 unless --size says otherwise; an SAE of 3,072 latents,
k 64), and in turn the same cells one at a time: rows encoded once, then steer, `post_layernorm`, projection and class matrix for
--replayed_cells of them. Prints the seconds of the whole grid, encoding included; the ratio of the seconds a cell, encoding left
out on both sides (above 1: the grid is cheaper); the largest difference of accuracy; and how far the grid raises the resident memory
of a fresh process that holds the model and the rows.
"""

import argparse
import json
import statistics
import subprocess
import sys

import torch
from common import SIZES, clip_model, finish, make_parser, parse, ratio, seconds_in_turn
from torch.nn.functional import normalize

from hf_vs2 import SAEConfig, SAEModel, VS2CLIPForZeroShot
from hf_vs2.evaluation.grid import steering_grid
from hf_vs2.functional import steer
from hf_vs2.functional.sparse_ops import sparse_decode


BATCH_SIZE = 1024


def material(args: argparse.Namespace) -> tuple[VS2CLIPForZeroShot, torch.Tensor, torch.Tensor]:
    """The model, rows with a mean and a few strong directions, and unit class embeddings."""
    width, *_, projection = SIZES[args.size]
    clip = clip_model(args.size, args.device)
    sae = SAEModel(SAEConfig(hidden_size=width, num_latents=args.num_latents, top_k=args.top_k)).to(args.device).eval()
    rows = torch.randn(args.num_rows, 64) @ torch.randn(64, width) / 8
    rows.add_(torch.randn(width)).add_(0.3 * torch.randn(width))
    for block in rows.split(BATCH_SIZE):
        block.add_(torch.randn(block.shape), alpha=0.3)
    sae.set_statistics(rows.mean(0), 1.0)
    return VS2CLIPForZeroShot(clip, sae), rows, normalize(torch.randn(args.num_classes, projection), dim=-1)


def axes(args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Spaced so that few cells have equal steps `lambda (gamma - 1)`, which are worked out once."""
    return torch.linspace(1, 3, args.side).tolist(), torch.linspace(0.1, 4, args.side).tolist()


@torch.no_grad()
def replay(
    model: VS2CLIPForZeroShot, rows: torch.Tensor, classes: torch.Tensor, steps: list[float]
) -> dict[float, torch.Tensor]:
    """Predictions of each step, the tail replayed for it; the rows are encoded once."""
    clip, sae, classes = model.clip, model.sae, classes.to(model.clip.device)
    found: dict[float, list[torch.Tensor]] = {step: [] for step in steps}
    for block in rows.split(BATCH_SIZE):
        x = block.to(clip.device)
        direction = sparse_decode(*sae.encode(x), sae.W_dec)
        for step in steps:
            pooled = clip.vision_model.post_layernorm(steer(x, direction, step))
            scores = normalize(clip.visual_projection(pooled), dim=-1) @ classes.T
            found[step].append(scores.argmax(-1).cpu())
    return {step: torch.cat(predictions) for step, predictions in found.items()}


def measure(args: argparse.Namespace) -> dict[str, object]:
    model, rows, classes = material(args)
    gammas, lambdas = axes(args)
    cells = {
        round(lambda_ * (gamma - 1), 9): (i, j) for i, gamma in enumerate(gammas) for j, lambda_ in enumerate(lambdas)
    }
    spread = torch.linspace(1, len(cells) - 1, args.replayed_cells).long().tolist()
    chosen = [sorted(cells)[number] for number in spread]
    labels = replay(model, rows, classes, chosen[:1])[chosen[0]]  # predictions of a cell, so that the others differ

    def grid() -> torch.Tensor:
        return steering_grid(model, rows, labels, classes, gammas, lambdas, batch_size=BATCH_SIZE).top1

    found = grid()
    replayed = replay(model, rows, classes, chosen)
    accuracy = {step: 100 * (replayed[step] == labels).double().mean().item() for step in chosen}
    sides = {
        "grid": grid,
        "replay": lambda: replay(model, rows, classes, chosen),
        "encode": lambda: replay(model, rows, classes, []),
    }
    seconds = seconds_in_turn(sides, args.rounds, args.device)
    per_cell = {
        name: [(whole - encode) / count for whole, encode in zip(seconds[name], seconds["encode"], strict=True)]
        for name, count in (("grid", len(cells)), ("replay", len(chosen)))
    }
    row = {
        "cells": len(gammas) * len(lambdas),
        "different_steps": len(cells),
        "grid_s": round(statistics.median(seconds["grid"]), 3),
        "of_which_encoding_s": round(statistics.median(seconds["encode"]), 3),
        "replayed_cell_ms": round(1e3 * statistics.median(per_cell["replay"]), 2),
        "grid_cell_ms": round(1e3 * statistics.median(per_cell["grid"]), 3),
        "replay_over_grid_per_cell": ratio(per_cell["replay"], per_cell["grid"]),
        "accuracies": [round(accuracy[step], 4) for step in chosen],
        "largest_accuracy_difference": max(abs(accuracy[step] - found[cells[step]].item()) for step in chosen),
    }
    if not args.device.startswith("cuda"):
        row |= memory_mb(args)
    return row


def memory_mb(args: argparse.Namespace) -> dict[str, int]:
    command = [sys.executable, __file__, "--measure_memory"]
    for name in ("size", "num_rows", "num_classes", "num_latents", "top_k", "side", "threads", "device"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(args: argparse.Namespace) -> dict[str, int]:
    model, rows, classes = material(args)
    labels = torch.zeros(len(rows), dtype=torch.int64)
    start = _status_kb("VmRSS")
    steering_grid(model, rows, labels, classes, *axes(args), batch_size=BATCH_SIZE)
    peak = _status_kb("VmHWM")
    return {"grid_mb": round((peak - start) / 1e3), "process_mb": round(peak / 1e3)}


def _status_kb(name: str) -> int:
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))


def main() -> None:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--size", choices=SIZES, default="ViT-B/32")
    parser.add_argument("--num_rows", type=int, default=10_000)
    parser.add_argument("--num_classes", type=int, default=100)
    parser.add_argument("--num_latents", type=int, default=3072)
    parser.add_argument("--top_k", type=int, default=64)
    parser.add_argument("--side", type=int, default=21, help="Values of gamma, and of lambda.")
    parser.add_argument("--replayed_cells", type=int, default=5)
    parser.add_argument("--measure_memory", action="store_true", help=argparse.SUPPRESS)
    args = parse(parser)
    if args.measure_memory:
        print(json.dumps(measure_memory(args)))
        return
    row = measure(args)
    print(
        f"{args.num_rows} rows, {args.num_classes} classes, {args.side} x {args.side} cells ({row['different_steps']} steps)"
    )
    print(f"  whole grid {row['grid_s']} s, of which encoding {row['of_which_encoding_s']} s")
    found = row["replay_over_grid_per_cell"]
    print(f"  a cell: replayed {row['replayed_cell_ms']} ms, in the grid {row['grid_cell_ms']} ms, ", end="")
    print(f"ratio {found['median']} (quartiles {found['low']} to {found['high']})")
    print(f"  largest difference of accuracy {row['largest_accuracy_difference']:.4f} points over {row['accuracies']}")
    if "grid_mb" in row:
        print(f"  memory: {row['grid_mb']} MB above model and rows; the whole process {row['process_mb']} MB")
    finish(args, __doc__, [row])


if __name__ == "__main__":
    main()
