"""Running a study: cell after cell, each kept as soon as it is measured; then the tables and figures."""

from __future__ import annotations

import platform
import time
from collections.abc import Collection
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers

from ..data.registry import available
from ..encoders.families import FAMILIES
from ..encoders.loading import clip_config
from ..files.atomic import replace_text
from ..files.digests import json_digest
from ..files.json_files import write_json
from ..files.progress import progress_bar
from ..version import __version__
from .bench import Bench
from .config import StudyConfig
from .documents.reports import REPORTS_NAME, reports
from .documents.tables import study_markdown
from .measure import measure
from .plan import plan
from .results.catalog import STEERED_LAYERS, study_methods
from .results.cells import CELLS, RESULTS_NAME, Cell, CellResult, StudyResult, load_cell, save_cell


TABLE_NAME = "table.md"


def run_study(config: StudyConfig, *, datasets: Collection[str] = (), progress: bool = True) -> StudyResult:
    """
    Measure every cell that is not there yet (or whose encoder or images have changed since), and write `results.json`,
    `reports.json` and `table.md` into the study's folder.

    Args:
        config (`StudyConfig`): the study.
        datasets: only these data sets of it, to share the work between machines with one file system. Cells of the
            others stay in the results as they are there; the last call, without this, finds all cells measured.
        progress (`bool`): show a progress bar.

    Returns:
        [`StudyResult`]: the cells of the study in the order of its plan.

    Raises:
        ValueError: an unknown data set, images without labels, or what cannot be extracted or trained; cells measured
            before stay.
    """
    known = [one.name for one in config.datasets]
    for name in datasets:
        if name not in known:
            raise ValueError(f"The study has no data set {name!r}: it has {', '.join(known)}.")
    cells = {cell: where for cell, where in plan(config).items() if not datasets or cell.dataset in datasets}
    bench, folder = Bench(config, progress), Path(config.output_dir)
    _check_material(bench, cells)
    _check_labels(bench, cells)
    measured: dict[Cell, CellResult] = {}
    with progress_bar(shown=progress, total=len(cells), unit=" cells") as bar:
        for planned, sections in cells.items():
            cell = bench.identified(planned)
            bar.set_description(" ".join(filter(None, (cell.dataset, cell.method, cell.prompts))))
            result = load_cell(folder / CELLS, cell)
            if result is None:
                figures, outputs = measure(bench, cell, _plain(measured, cell))
                result = save_cell(folder / CELLS, cell, figures, outputs)
            result.sections = sections
            measured[cell] = result
            bar.update()
        bar.set_description("study")
    results = list(measured.values())
    study = _with_others(StudyResult(_meta(config, bench, results), results), folder / RESULTS_NAME, config)
    study.to_json(folder / RESULTS_NAME)
    write_json(folder / REPORTS_NAME, reports(study))
    replace_text(folder / TABLE_NAME, study_markdown(study))
    return study


def _with_others(study: StudyResult, path: Path, config: StudyConfig) -> StudyResult:
    """The result with the cells that `path` has of other data sets of the same study."""
    asked = {one.cell.dataset for one in study}
    if len(asked) == len(config.datasets) or not path.is_file():
        return study
    earlier, planned = StudyResult.from_json(path), [cell.identity for cell in plan(config)]
    others = [one for one in earlier if one.cell.dataset not in asked and one.cell.identity in planned]
    about = {one.cell.dataset: earlier.meta["datasets"].get(one.cell.dataset) for one in others}
    order = [one.name for one in config.datasets]
    datasets = study.meta["datasets"] | {name: one for name, one in about.items() if one is not None}
    study.meta["datasets"] = {name: datasets[name] for name in order if name in datasets}
    places = {json_digest(identity): number for number, identity in enumerate(planned)}
    cells = sorted([*study, *others], key=lambda one: places[json_digest(one.cell.identity)])
    return StudyResult(study.meta, cells)


def _check_material(bench: Bench, cells: Collection[Cell]) -> None:
    """Encoders that are not there or too small for the study, and images whose classes have no names, or names that an
    encoder can't tell apart: said before anything long begins."""
    methods = {cell.method for cell in cells}
    for entry in bench.config.encoders:
        config = clip_config(entry.source, {"revision": entry.revision})
        if not FAMILIES[config.model_type].has_texts:
            raise ValueError(f"{entry.name} is a {config.model_type!r}, which reads no labels: a study needs a CLIP.")
        vision: Any = config.vision_config
        bench.config.check_sizes(entry, vision.hidden_size)
        deepest = max((layers for method, layers in STEERED_LAYERS.items() if method in methods), default=0)
        if deepest > vision.num_hidden_layers:
            raise ValueError(f"{entry.name} has {vision.num_hidden_layers} layers: {deepest} can't be steered.")
    for name in dict.fromkeys(cell.dataset for cell in cells):
        for entry, prompts in product(bench.config.encoders, bench.config.prompts):
            bench.check_prompts(entry.name, name, prompts)


def _check_labels(bench: Bench, cells: Collection[Cell]) -> None:
    """Training images need no labels, except for some methods: said before anything long begins."""
    for name in dict.fromkeys(cell.dataset for cell in cells):
        asked = {cell.method for cell in cells if cell.dataset == name}
        needy = {method for method, about in study_methods().items() if about.uses_labels} & asked
        column = bench.config.dataset(name).label_column
        if needy and column not in bench.images(name, "train").column_names:
            raise ValueError(
                f"{name}: the training images have no column {column!r}, which these methods use: "
                f"{', '.join(sorted(needy))}. List the others under `methods` (and no ablations.pass_weight), or set "
                "label_column."
            )


def _plain(measured: dict[Cell, CellResult], cell: Cell) -> Any:
    """Plain CLIP's outcomes on the cell's images, which the plan measures before."""
    if cell.method == "clip" or cell.method not in study_methods():
        return None
    for other, result in measured.items():
        if other.method == "clip" and all(
            getattr(other, name) == getattr(cell, name) for name in ("encoder", "dataset", "prompts")
        ):
            return result.outputs()
    raise KeyError(f"plain CLIP was not measured before {cell.name}")


def _meta(config: StudyConfig, bench: Bench, results: list[CellResult]) -> dict[str, Any]:
    sizes = {one.cell.dataset: one.figures["n"] for one in results if one.cell.method == "clip"}
    return {
        "name": Path(config.output_dir).name,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {
            "hf_vs2": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "datasets": {
            name: {
                "title": config.dataset(name).title,
                "registry": name if name in available() else None,
                "source": config.dataset(name).source_id,
                "splits": [config.dataset(name).train_split, config.dataset(name).test_split],
                "class_names": bench.class_names(name),
                "metric": config.dataset(name).metric,
                "n": n,
                "n_train": len(bench.images(name, "train")),
            }
            for name, n in sizes.items()
        },
        "encoders": {
            one.name: {"id": one.id, "revision": one.revision, "source": one.path or one.id} for one in config.encoders
        },
        "seeds": list(config.seeds),
        "prompts": list(config.prompts),
        "methods": {
            name: {"label": one.label, "uses_labels": one.uses_labels} for name, one in study_methods().items()
        },
        "defaults": {
            "gamma": config.steering.gamma,
            "lambda": config.steering.lambda_,
            "gate": config.steering.gate,
            "top_k": config.sae.top_k,
            "expansion_factor": config.sae.expansion_factor,
            "training": dict(config.sae.training),
            "num_neighbors": config.retrieval.num_neighbors,
            "rag_weight": config.retrieval.rag_weight,
            "pass_weight": config.pass_weight,
            "inner_layers": asdict(config.inner_layers),
            "views": config.views,
        },
    }
