"""Seconds to find the neighbours of VS2++, by blocks and by faiss, in one process, in turn.

    python benchmarks/neighbor_search.py
    python benchmarks/neighbor_search.py --rows 1281167 --features 512 --queries 64

Random unit rows; the corpus is prepared once, as a model does it. Without faiss (`pip install faiss-cpu`) the blocks alone are timed.
Prints the median seconds and the ratio for many queries and for one, checks that both find the same, then one line of JSON.
"""

import argparse
import json
import statistics
import time
from unittest.mock import patch

import torch
from torch.nn.functional import normalize

from hf_vs2.functional import neighbors


def timed(index, queries, k):
    start = time.perf_counter()
    found = index.search(queries, k)
    return time.perf_counter() - start, found


def compare(indexes, queries, k, repeats):
    """Seconds of each index, taken in turn, and whether they agree."""
    seconds = {name: [] for name in indexes}
    for _ in range(repeats):
        found = {}
        for name, index in indexes.items():
            taken, found[name] = timed(index, queries, k)
            seconds[name].append(taken)
        first, *others = found.values()
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    return {name: statistics.median(values) for name, values in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--num_neighbors", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    corpus = normalize(torch.randn(args.rows, args.features), dim=-1)
    queries = normalize(torch.randn(args.queries, args.features), dim=-1)
    with patch.object(neighbors, "_use_faiss", lambda device: False):
        indexes = {"blocks": neighbors.NeighborIndex(corpus)}
    if neighbors._use_faiss(corpus.device):
        indexes["faiss"] = neighbors.NeighborIndex(corpus)
    results = {}
    for name, batch in ((f"{args.queries} queries", queries), ("1 query", queries[:1])):
        results[name] = compare(indexes, batch, args.num_neighbors, args.repeats)
        figures = ", ".join(f"{index} {seconds:.3f} s" for index, seconds in results[name].items())
        ratio = (
            f", blocks over faiss {results[name]['blocks'] / results[name]['faiss']:.1f}" if "faiss" in indexes else ""
        )
        print(f"{name}: {figures}{ratio}")
    print(json.dumps({"threads": torch.get_num_threads(), **vars(args), "seconds": results}))


if __name__ == "__main__":
    main()
