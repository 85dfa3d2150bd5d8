"""How long one SAE training step takes with the sparse and the dense backward, in one process, in turn.

    python benchmarks/sae_train_step.py
    python benchmarks/sae_train_step.py --hidden_size 768 --num_latents 3072 --top_k 64 --batch_size 1024

Prints, for each setting, the median milliseconds of both sides and the median of their ratios taken pair by pair (above 1: the
sparse side is faster), then the same as one line of JSON. The crossover is `hf_vs2.sparse_ops.SPARSE_LIMIT`.
"""

import argparse
import json
import statistics
import time

import torch

from hf_vs2 import SAEConfig, SAEModel, sparse_ops


SETTINGS = [  # hidden_size, num_latents, top_k, batch_size
    (768, 3072, 32, 1024),
    (768, 3072, 64, 1024),  # the paper's ViT-B/32
    (768, 3072, 256, 1024),  # the paper's ViT-B/16
    (1024, 10240, 128, 1024),  # the paper's ViT-L/14
    (192, 768, 16, 512),
]


def step(sae, optimizer, x):
    sae(x).loss.backward()
    sae.remove_parallel_decoder_gradient()
    optimizer.step()
    optimizer.zero_grad()
    sae.normalize_decoder()


def timed(limit, *args):
    sparse_ops.SPARSE_LIMIT = limit
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def compare(hidden_size, num_latents, top_k, batch_size, pairs, device):
    torch.manual_seed(0)
    config = SAEConfig(
        hidden_size=hidden_size, num_latents=num_latents, top_k=top_k, total_variance=float(hidden_size)
    )
    sae = SAEModel(config).to(device)
    optimizer = torch.optim.Adam(sae.parameters(), fused=True)
    x = torch.randn(batch_size, hidden_size, device=device)
    for limit in (1.0, 0.0):  # warm up both
        timed(limit, sae, optimizer, x)
    sparse, dense = zip(
        *[(timed(1.0, sae, optimizer, x), timed(0.0, sae, optimizer, x)) for _ in range(pairs)], strict=True
    )
    return {
        "hidden_size": hidden_size,
        "num_latents": num_latents,
        "top_k": top_k,
        "batch_size": batch_size,
        "sparse_ms": round(statistics.median(sparse), 2),
        "dense_ms": round(statistics.median(dense), 2),
        "dense_over_sparse": round(statistics.median(d / s for s, d in zip(sparse, dense, strict=True)), 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("hidden_size", "num_latents", "top_k", "batch_size"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    one = (args.hidden_size, args.num_latents, args.top_k, args.batch_size)
    if any(one) and not all(one):
        parser.error("give hidden_size, num_latents, top_k and batch_size together, or none of them")
    rows = [compare(*setting, args.pairs, args.device) for setting in ([one] if all(one) else SETTINGS)]
    print("hidden latents top_k    k/L batch | sparse ms  dense ms  dense/sparse")
    for row in rows:
        share = row["top_k"] / row["num_latents"]
        print(
            f"{row['hidden_size']:6} {row['num_latents']:7} {row['top_k']:5} {share:6.1%} {row['batch_size']:5} | "
            f"{row['sparse_ms']:9.1f} {row['dense_ms']:9.1f} {row['dense_over_sparse']:13.2f}"
        )
    print(
        json.dumps(
            {"device": args.device, "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}
        )
    )


if __name__ == "__main__":
    main()
