"""What a plain ReLU SAE costs as a top-k with all latents: milliseconds a row of encode and decode, beside a dense product.

OMP_NUM_THREADS=1 python benchmarks/relu_sae.py
"""

import time
from collections.abc import Callable

import torch

from hf_vs2 import SAEConfig, SAEModel


ROWS, WIDTH = 256, 768


def milliseconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Of one row, the best of several runs."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1000 * min(times) / ROWS


@torch.no_grad()
def main() -> None:
    print("| latents | top_k | encode | decode | dense decode | bytes a row |\n|---:|---:|---:|---:|---:|---:|")
    rows = torch.randn(ROWS, WIDTH)
    for latents in (3072, 12288):
        for top_k in (64, latents):
            sae = SAEModel(SAEConfig(hidden_size=WIDTH, num_latents=latents, top_k=top_k)).eval()
            values, indices = sae.encode(rows)
            code = torch.zeros(ROWS, latents).scatter_(1, indices, values)
            encode = milliseconds(lambda sae=sae: sae.encode(rows))
            decode = milliseconds(lambda sae=sae, values=values, indices=indices: sae.decode(values, indices))
            dense = milliseconds(lambda sae=sae, code=code: code @ sae.W_dec + sae.b_pre)
            size = (values.nbytes + indices.nbytes) // ROWS
            print(f"| {latents:,} | {top_k:,} | {encode:.3f} | {decode:.3f} | {dense:.3f} | {size:,} |")


if __name__ == "__main__":
    main()
