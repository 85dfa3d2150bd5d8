"""Methods on images that are mostly of one label: `python scripts/imbalance.py`, after the study, whose activations it reads.

4,096 unlabelled rows (as many of CUB, some twice) and 2,000 test images are drawn so that one class, drawn at random too, has the given share of both; everything is
fitted to these rows, the SAE included (1,500 steps, k 16). Test images are of the held-out half of each test set: the constants of
`balanced_prototypes` were chosen on the other one. Printed as Markdown: mean gain over plain CLIP in points over the draws, and the worst one.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from draws import drawn, shares_with, trained

from hf_vs2.study import StudyConfig
from hf_vs2.study.bench import Bench


METHODS = ("vs2", "centroid", "distribution_norm", "prototypes", "balanced_norm", "balanced_prototypes")
SHARES = (None, 0.3, 0.5, 0.8, 0.95)
ROWS, IMAGES = 4096, 2000


def gains(
    bench: Bench, encoder: str, dataset: str, share: float | None, seed: int, folder: str, even_rows: bool
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    train, test = bench.labels(encoder, dataset, "train"), bench.labels(encoder, dataset)
    num_classes = int(train.max()) + 1
    held_out = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[len(test) // 2 :]
    top = int(test[held_out][torch.randint(len(held_out), (1,), generator=generator)])
    uneven = shares_with(num_classes, share, top)
    wanted = shares_with(num_classes, None, top) if even_rows else uneven
    rows = bench.rows(encoder, dataset, "train").tensor(-1)[drawn(train, wanted, ROWS, generator)]
    chosen = held_out[drawn(test[held_out], uneven, IMAGES, generator)]
    images, labels = bench.rows(encoder, dataset, "test").tensor(-1)[chosen], test[chosen]
    model = trained(bench.encoder(encoder).clip, rows, folder, seed=seed)
    classes = bench.class_matrix(encoder, dataset, "single")

    def accuracy(method: str) -> float:
        with torch.no_grad(), model.steering(method=method, gate=None):
            found = model.class_logits(model.image_features_from_cls(images), classes).argmax(-1)
        return 100 * (found == labels).double().mean().item()

    plain = accuracy("none")
    return {"plain": plain} | {method: accuracy(method) - plain for method in METHODS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", type=Path, default=Path("examples/studies/vit_tiny_lit.yaml"))
    parser.add_argument("--output_dir", help="Of the study, where it is not the file's own.")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument(
        "--even_rows", action="store_true", help="The unlabelled rows are even, only the test images are not."
    )
    parser.add_argument("--output", type=Path, default=Path("examples/results/imbalance.json"))
    args = parser.parse_args()
    config = StudyConfig.from_yaml(args.study, args.output_dir)
    bench, encoder = Bench(config, progress=False), config.encoders[0].name
    results = []
    print(
        "| data set | share of one class | plain CLIP |",
        " | ".join(METHODS),
        "|\n|---|---:|---:|" + "---:|" * len(METHODS),
    )
    for info in config.datasets:
        for share in SHARES[-2:] if args.even_rows else SHARES:
            with tempfile.TemporaryDirectory() as folder:
                found = [
                    gains(bench, encoder, info.name, share, seed, f"{folder}/{seed}", args.even_rows)
                    for seed in range(args.draws)
                ]
            results.append({"dataset": info.name, "share": share, "draws": found})
            fields = []
            for method in METHODS:
                of_method = [one[method] for one in found]
                fields.append(f"{sum(of_method) / len(found):+.1f} ({min(of_method):+.1f})")
            plain = sum(one["plain"] for one in found) / len(found)
            print(f"| {info.name} | {share or 'even'} | {plain:.1f} |", " | ".join(fields), "|", flush=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
