"""The cells of a study, in the order in which they are cheapest to measure, and the sections of the report that show
them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from ..training.domain import SKETCH_ROWS
from .config import StudyConfig
from .results.catalog import study_methods
from .results.cells import Cell


GRID, COST, COSINE = "grid", "cost", "steering_cosine"
"""Cells that are no rows of a table."""


def plan(config: StudyConfig) -> dict[Cell, list[str]]:
    """Each cell once, with its sections. Plain CLIP comes first on each data set: gains are measured against it."""
    cells: dict[Cell, list[str]] = {}
    for section, cell in _Planner(config).all():
        sections = cells.setdefault(cell, [])
        if section not in sections:
            sections.append(section)
    return cells


class _Planner:
    def __init__(self, config: StudyConfig):
        self.config, self.methods = config, study_methods()

    def all(self) -> Iterator[tuple[str, Cell]]:
        for encoder in self.config.encoders:
            for dataset in self.config.datasets:
                yield from self.table(encoder.name, dataset.name)
                yield from self.ablations(encoder.name, dataset.name)
                yield from self.others(encoder.name, dataset.name)
            if self.config.gate_shift is not None:
                yield from self.gate_shift(encoder.name)
            if self.config.cost:
                first = self.config.datasets[0].name
                yield (
                    "cost",
                    self.cell(encoder.name, first, COST, "", self.config.seeds[0], ("sae", "gamma", "lambda")),
                )

    def table(self, encoder: str, dataset: str) -> Iterator[tuple[str, Cell]]:
        """Methods without a seed once; then all of one seed together, which share its SAE."""
        methods = ["clip", *(name for name in self.config.methods if name != "clip")]
        for prompts in self.config.prompts:
            for method in methods:
                if not self.methods[method].seeded:
                    yield "table", self.row(encoder, dataset, method, prompts)
        for seed in self.config.seeds:
            for method in methods:
                if self.methods[method].seeded:
                    for prompts in self.config.prompts:
                        yield "table", self.row(encoder, dataset, method, prompts, seed)

    def ablations(self, encoder: str, dataset: str) -> Iterator[tuple[str, Cell]]:
        """One setting varied around the table's, with the first prompts."""
        chosen, prompts = self.config.ablations, self.config.prompts[0]
        for seed in self.config.seeds:
            for top_k in chosen.top_k:
                yield "top_k", self.row(encoder, dataset, "vs2", prompts, seed, top_k=top_k)
            for factor in chosen.expansion_factor:
                yield "expansion", self.row(encoder, dataset, "vs2", prompts, seed, expansion_factor=factor)
            for share in chosen.share:
                part = {} if share == 1 else {"share": share}
                yield "share", self.row(encoder, dataset, "vs2", prompts, seed, **part)
                yield "share", self.row(encoder, dataset, "vs2+gate", prompts, seed, **part)
                yield "share", self.row(encoder, dataset, "centroid", prompts, seed if part else None, **part)
            for number in chosen.num_neighbors:
                yield "neighbors", self.row(encoder, dataset, "vs2++", prompts, seed, num_neighbors=number)
            for weight in chosen.pass_weight:
                yield "pass", self.row(encoder, dataset, "vs2_pass", prompts, seed, pass_weight=weight)

        for number in chosen.sketch_rows:
            for method in ("prototypes", "prototypes+pca"):
                yield "sketch", self.row(encoder, dataset, method, prompts, sketch_rows=number)

    def others(self, encoder: str, dataset: str) -> Iterator[tuple[str, Cell]]:
        grid = self.config.grid
        if grid is not None:
            axes = {"gammas": list(grid.gamma), "lambdas": list(grid.lambda_)}
            for seed in self.config.seeds:
                yield "grid", self.cell(encoder, dataset, GRID, self.config.prompts[0], seed, ("sae",), **axes)
        if self.config.agreement and len(self.config.seeds) > 1:
            others = {"seeds": list(self.config.seeds), "top_ks": list(self.config.ablations.top_k)}
            yield "agreement", self.cell(encoder, dataset, COSINE, "", None, ("sae",), **others)

    def gate_shift(self, encoder: str) -> Iterator[tuple[str, Cell]]:
        """Table 3: one SAE for several data sets, with and without the gate, on its own data sets and on others."""
        shift, prompts = self.config.gate_shift, self.config.prompts[0]
        assert shift is not None
        union: dict[str, Any] = {"trained_on": list(shift.trained_on)}
        for dataset in shift.apply_to or [one.name for one in self.config.datasets]:
            yield "gate_shift", self.row(encoder, dataset, "clip", prompts)
            for seed in self.config.seeds:
                yield "gate_shift", self.row(encoder, dataset, "vs2", prompts, seed, **union)
                for quantile in shift.quantiles:
                    yield "gate_shift", self.row(encoder, dataset, "vs2+gate", prompts, seed, **union, gate=quantile)

    def row(
        self, encoder: str, dataset: str, method: str, prompts: str, seed: int | None = None, **varied: Any
    ) -> Cell:
        return self.cell(encoder, dataset, method, prompts, seed, self.methods[method].settings, **varied)

    def cell(
        self,
        encoder: str,
        dataset: str,
        method: str,
        prompts: str,
        seed: int | None,
        settings: tuple[str, ...],
        **varied: Any,
    ) -> Cell:
        """A cell with the settings that its method depends on, as the study has them unless varied."""
        config, origin = self.config, self._origin(encoder, [dataset, *varied.get("trained_on", ())])
        params: dict[str, Any] = {}
        for name, values in self._settings().items():
            if name in settings:
                params |= values
        if "sae" in settings:
            origin["sae"] = {"activation": config.sae.activation, "training": dict(config.sae.training)}
        if method in (COST, COSINE):
            origin.pop("templates", None)
        return Cell(encoder, dataset, method, prompts, seed, params | varied, origin)

    def _settings(self) -> dict[str, dict[str, Any]]:
        config = self.config
        steering, retrieval, inner = config.steering, config.retrieval, config.inner_layers
        return {
            "sae": {"top_k": config.sae.top_k, "expansion_factor": config.sae.expansion_factor},
            "gamma": {"gamma": steering.gamma},
            "lambda": {"lambda": steering.lambda_},
            "gate": {"gate": steering.gate},
            "retrieval": {"num_neighbors": retrieval.num_neighbors, "retrieval_encoder": retrieval.source},
            "rag_weight": {"rag_weight": retrieval.rag_weight},
            "pass_weight": {"pass_weight": config.pass_weight},
            "views": {"views": config.views},
            "sketch": {"sketch_rows": SKETCH_ROWS},
            "inner": {"train_limit": inner.train_limit, "test_limit": inner.test_limit},
        }

    def _origin(self, encoder: str, datasets: list[str]) -> dict[str, Any]:
        entry = asdict(self.config.encoder(encoder))
        return {"encoder": entry, "datasets": [_description(self.config.dataset(name)) for name in datasets]}


def _description(info: Any) -> Mapping[str, Any]:
    """What of a data set's entry decides figures."""
    names = ("source_id", "config_name", "revision", "train_split", "test_split", "image_column", "label_column")
    described = {name: getattr(info, name) for name in names}
    classes = None if info.classes is None else dict(info.classes)
    return described | {"classes": classes, "templates": list(info.templates)}
