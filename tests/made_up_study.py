"""Results of studies that nobody ran, to read in their document what was put in."""

from pathlib import Path
from typing import Any

import torch

from hf_vs2.study.results.cells import Cell, CellResult, Outputs, StudyResult, save_cell


B32 = "openai/clip-vit-base-patch32"
B16 = "openai/clip-vit-base-patch16"
N = 400
LABELS = torch.arange(N) % 4


def made_up(datasets: dict[str, dict[str, Any]], cells: list[CellResult], encoder_id: str = B32) -> StudyResult:
    facts = {"title": "A set", "class_names": ["tractor", "bus", "owl", "cat"], "metric": "accuracy", "n": N}
    labels = {"vs2": ("VS2", ""), "vs2++oracle": ("VS2++, oracle", "training"), "clip": ("plain CLIP", "")}
    meta = {
        "name": "made up",
        "datasets": {name: facts | {"registry": None} | about for name, about in datasets.items()},
        "encoders": {"enc": {"id": encoder_id}},
        "methods": {name: {"label": label, "uses_labels": uses} for name, (label, uses) in labels.items()},
        "seeds": [0, 1],
        "defaults": {"gamma": 1.5, "lambda": 2.1, "gate": 0.99, "top_k": 16, "expansion_factor": 4},
    }
    return StudyResult(meta, cells)


def cell(
    method: str,
    top1: float,
    gain: float = 0.0,
    dataset: str = "set",
    seed: int | None = None,
    prompts: str = "single",
    sections: tuple[str, ...] = ("table",),
    params: dict[str, Any] | None = None,
    **figures: Any,
) -> CellResult:
    figures = {"top1": top1, "gain": gain, "n": N, "mean_per_class": top1, "coverage": 1.0} | figures
    return CellResult(Cell("enc", dataset, method, prompts, seed, params or {}), figures, list(sections))


def with_outcomes(folder: Path, method: str, right: int, offset: int = 0, seed: int | None = None) -> CellResult:
    """A cell with the first `right` images after `offset` judged rightly, all others taken for the next class."""
    good = torch.zeros(N, dtype=torch.bool)
    good[offset : offset + right] = True
    outputs = Outputs(LABELS, torch.where(good, LABELS, (LABELS + 1) % 4))
    top1 = 100 * right / N
    saved = save_cell(
        folder, Cell("enc", "set", method, "single", seed), {"top1": top1, "gain": top1 - 50, "n": N}, outputs
    )
    saved.sections = ["table"]
    return saved


def rows(document: str, start: str) -> list[list[str]]:
    """The fields of every table row whose first field starts so."""
    found = [line.strip("| ").split(" | ") for line in document.splitlines() if line.startswith("|")]
    return [[field.strip() for field in row] for row in found if row[0].startswith(start)]


def description(clip: Path, images: Path, folder: Path) -> dict:
    """A study of everything there is, on a CLIP and images of a few kilobytes."""
    return {
        "output_dir": str(folder),
        "encoders": [{"id": "tiny/clip", "path": str(clip)}],
        "datasets": [
            {"name": "colours", "path": str(images)},
            {"name": "half", "path": str(images), "train_split": "train[:60]", "templates": ["a {} thing"]},
        ],
        "seeds": [0, 1],
        "prompts": ["single", "published"],
        "sae": {"top_k": 4, "expansion_factor": 2, "max_steps": 20, "per_device_train_batch_size": 32},
        "steering": {"gamma": 2.0, "lambda": 0.9, "gate": 0.9},
        "retrieval": {"num_neighbors": 5},
        "inner_layers": {"train_limit": 50, "test_limit": 20},
        "views": 1,
        "ablations": {
            "top_k": [2, 4],
            "expansion_factor": [2],
            "share": [0.5, 1],
            "num_neighbors": [3],
            "pass_weight": [0.8],
        },
        "grid": {"gamma": [1.5, 2.0], "lambda": [0.0, 0.9, 1.8]},
        "gate_shift": {"trained_on": ["colours", "half"], "quantiles": [0.5]},
        "cost": False,
    }
