"""What the two gates keep of images that a checkpoint is not for: `python scripts/gate_under_shift.py`, after the study.

Each data set's SAE (seed 0) and statistics of its training rows are applied to the test images of every data set, one prompt, no gate and the gate at
quantile 0.99: by FVU for VS2, by distance for distribution norm. Printed as Markdown: gain over plain CLIP in points, and the share of images
that the gate lets through.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from hf_vs2.study import StudyConfig
from hf_vs2.study.bench import Bench
from hf_vs2.study.plan import plan
from hf_vs2.study.results.cells import Cell


GATE = 0.99
METHODS = {"vs2": "VS2", "full_distribution_norm": "distribution norm"}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", type=Path, default=Path("examples/studies/vit_tiny_lit.yaml"))
    parser.add_argument("--output_dir", help="Of the study, where it is not the file's own.")
    args = parser.parse_args()
    config = StudyConfig.from_yaml(args.study, args.output_dir)
    bench, encoder = Bench(config, progress=False), config.encoders[0].name
    names = [info.name for info in config.datasets]
    wanted = encoder, "vs2+distribution_norm", config.prompts[0], config.seeds[0]
    cells = {one.dataset: one for one in plan(config) if (one.encoder, one.method, one.prompts, one.seed) == wanted}
    print("| statistics and SAE of | method |", " | ".join(names), "|\n|---|---|" + "---|" * len(names))
    for source in names:
        cell = cells[source]
        model = bench.adapted_model(cell)
        known = sorted(map(float, model.sae.config.fvu_quantiles or {}))
        for method, label in METHODS.items():
            fields = []
            for target in names:
                plain = _right(bench, model, cell, target, {"enabled": False})[0]
                ungated = _right(bench, model, cell, target, {"method": method, "gate": None})[0]
                gate = {"method": method, "gate": min(GATE, known[-1])}
                gated, share = _right(bench, model, cell, target, gate)
                fields.append(f"{ungated - plain:+.1f}, gated {gated - plain:+.1f} ({share:.0%} pass)")
            print(f"| {source} | {label} |", " | ".join(fields), "|")


def _right(bench: Bench, model: Any, cell: Cell, target: str, settings: dict[str, Any]) -> tuple[float, float]:
    """Accuracy in %, and the share of images that the method touched."""
    classes = bench.class_matrix(cell.encoder, target, cell.prompts)
    labels = bench.labels(cell.encoder, target)
    with model.steering(**settings):
        images = model.image_features_from_cls(bench.rows(cell.encoder, target, "test").tensor(-1))
        right = model.class_logits(images, classes).argmax(-1).cpu() == labels
    return 100 * right.double().mean().item(), images.steered.double().mean().item()


if __name__ == "__main__":
    main()
