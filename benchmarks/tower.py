"""The vision tower on ready pixels: attention written out ("eager"), attention of PyTorch ("sdpa", what transformers loads by
default), the latter compiled for batches of any size, and in half precision.

    python benchmarks/tower.py
    python benchmarks/tower.py --device cuda --batch_size 256 --rounds 9

Prints images per second (with `--threads 1` on a CPU, per second of the processor, which other work does not disturb), the
speed over "sdpa", and by how much CLS rows differ from its, over their norm.
"""

import statistics
import time

import torch
from common import SIZES, clip_model, finish, make_parser, parse, ratio, seconds_in_turn


def main() -> None:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--size", choices=SIZES, default="ViT-B/32")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--sides", nargs="+", default=["sdpa", "eager", "compiled", "bfloat16"])
    args = parse(parser)
    pixels = torch.randn(args.batch_size, 3, 224, 224, device=args.device)
    towers = {}
    for side in args.sides:
        dtype = torch.bfloat16 if side == "bfloat16" else torch.float32
        tower = clip_model(args.size, args.device, dtype).vision_model
        tower.set_attn_implementation("eager" if side == "eager" else "sdpa")
        towers[side] = torch.compile(tower, dynamic=True) if side == "compiled" else tower

    @torch.no_grad()
    def rows(side: str) -> torch.Tensor:
        return towers[side](pixels.to(torch.bfloat16 if side == "bfloat16" else torch.float32)).pooler_output.float()

    sides = {side: lambda side=side: rows(side) for side in args.sides}
    clock = time.process_time if args.device == "cpu" and args.threads == 1 else time.perf_counter
    seconds = seconds_in_turn(sides, args.rounds, args.device, clock=clock)
    first, *_ = args.sides
    expected, result = rows(first), []
    for side in args.sides:
        moved = ((rows(side) - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
        speed = round(args.batch_size / statistics.median(seconds[side]), 1)
        row = {"side": side, "images/s": speed, f"over {first}": ratio(seconds[first], seconds[side]), "moved": moved}
        result.append(row)
        print(row)
    finish(args, __doc__, result)


if __name__ == "__main__":
    main()
