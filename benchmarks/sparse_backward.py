"""Backward of an SAE step, sparse against dense, at many shares of active latents: does the switch take the faster one?

    python benchmarks/sparse_backward.py
    python benchmarks/sparse_backward.py --num_latents 12288 --hidden_size 768
    python benchmarks/sparse_backward.py --precision high       # on a GPU: dense products in TF32
    python benchmarks/sparse_backward.py --dtype bfloat16

Both sides compute the same gradients of encoder and decoder for the same code. Prints the milliseconds of both, their ratio (above 1:
sparse is faster), what `hf_vs2.functional.sparse_ops.sparse_limit` chooses, and how much slower that is than the faster side.
"""

import statistics
from unittest.mock import patch

import torch
from common import finish, make_parser, parse, ratio, seconds_in_turn

from hf_vs2.functional import sparse_ops


SHARES = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08)


def backward(limit, *tensors):
    with patch.object(sparse_ops, "sparse_limit", lambda weight: limit):
        x, center, encoder, bias, decoder, indices, values, target = tensors
        active = sparse_ops.linear_at(x, center, encoder, bias, indices, values)
        torch.autograd.grad(sparse_ops.sparse_decode(active, indices, decoder), (encoder, bias, decoder), target)


def recorded(side):
    """`side` ten times as one CUDA graph: the GPU's work without the time that Python takes to ask for it."""
    side()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            side()
    return graph.replay


def compare(share, args):
    batch, hidden, latents, device = args.batch_size, args.hidden_size, args.num_latents, args.device
    top_k = max(1, round(share * latents))
    torch.manual_seed(0)
    indices = torch.rand(batch, latents, device=device).topk(top_k, sorted=False).indices
    like = {"device": device, "dtype": getattr(torch, args.dtype)}
    encoder, decoder = (torch.randn(latents, hidden, requires_grad=True, **like) for _ in range(2))
    bias = torch.zeros(latents, requires_grad=True, **like)
    x, target = torch.randn(2, batch, hidden, **like)
    values = torch.rand(batch, top_k, **like)
    tensors = (x, torch.zeros(hidden, **like), encoder, bias, decoder, indices, values, target)
    sides = {"sparse": lambda: backward(1.0, *tensors), "dense": lambda: backward(0.0, *tensors)}
    if device.startswith("cuda"):
        sides = {name: recorded(side) for name, side in sides.items()}
    timed = seconds_in_turn(sides, args.rounds, device, warm_up=3)
    chosen = "sparse" if top_k <= sparse_ops.sparse_limit(decoder) * latents else "dense"
    row = {"top_k": top_k, "share": top_k / latents, "chosen": chosen}
    row |= {
        f"{side}_ms": round(1e3 * statistics.median(seconds) / (10 if device.startswith("cuda") else 1), 3)
        for side, seconds in timed.items()
    }
    row["dense_over_sparse"] = ratio(timed["dense"], timed["sparse"])
    median = row["dense_over_sparse"]["median"]
    faster = "sparse" if median > 1 else "dense"
    row["lost"] = 0.0 if chosen == faster else round(max(median, 1 / median) - 1, 3)
    return row


def main():
    parser = make_parser(__doc__, rounds=9)
    parser.add_argument("--hidden_size", type=int, default=768)
    parser.add_argument("--num_latents", type=int, default=3072)
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--precision", default="highest", choices=("highest", "high"), help="Of float32 products on a GPU."
    )
    args = parse(parser)
    torch.set_float32_matmul_precision(args.precision)
    print(f"{args.hidden_size} -> {args.num_latents} latents, batch {args.batch_size}")
    print("top_k   share | sparse ms  dense ms  dense/sparse (quartiles) | chosen, slower than the faster one by")
    rows = []
    for share in SHARES:
        row = compare(share, args)
        found = row["dense_over_sparse"]
        print(
            f"{row['top_k']:5} {row['share']:7.2%} | {row['sparse_ms']:9.2f} {row['dense_ms']:9.2f} "
            f"{found['median']:8.2f} ({found['low']:.2f} to {found['high']:.2f}) | {row['chosen']}, {row['lost']:.0%}"
        )
        rows.append(row)
    finish(args, __doc__, rows)


if __name__ == "__main__":
    main()
