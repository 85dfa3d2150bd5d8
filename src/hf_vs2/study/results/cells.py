"""What a study measured, cell by cell: JSON for the figures, safetensors for the outcome of every image.

A cell is one encoder, data set, method, prompt set and seed, with the settings it was run with. It is written whole or
not at all, as `cells/<name>.json` with `cells/<name>.safetensors` beside it, under a name that holds a hash of
everything that decides its figures: an interrupted study goes on with the cells that are missing, and a changed
setting makes other cells.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ...files.digests import file_digest, json_digest
from ...files.json_files import read_json, write_json
from ...files.weight_files import read_tensors, write_tensors


logger = logging.get_logger(__name__)

FORMAT = "hf_vs2.study"
FORMAT_VERSION = 1
CELLS = "cells"
RESULTS_NAME = "results.json"
SPELLED = {
    "rec_f": "reconstruct",
    "rec_f_gamma": "amplify",
    "vs2_gate": "vs2+gate",
    "vs2pp_majority": "vs2++",
    "vs2pp_query": "vs2++query",
    "vs2pp_oracle": "vs2++oracle",
    "vs2_dn": "vs2+distribution_norm",
    "corrected_dn": "corrected+distribution_norm",
    "distribution_norm_gate": "full_distribution_norm+gate",
    "prototypes_gate": "prototypes+gate",
    "prototypes_pca": "prototypes+pca",
    "prototypes_sae": "prototypes+sae",
    "prototypes_random": "prototypes+random",
    "prototypes_pca_sae": "prototypes+pca+sae",
}
"""How studies before 0.2 spelled methods: their files, cells and results go on being read."""


@dataclass(frozen=True)
class Cell:
    """
    One thing to measure.

    Args:
        encoder (`str`), dataset (`str`): their names in the study.
        method (`str`): see [`hf_vs2.study.results.catalog`], or `"grid"`, `"cost"` and `"steering_cosine"`, which are
            no rows of a table.
        prompts (`str`): name of the prompt set; `""` where there is none.
        seed (`int`, *optional*): of the SAE; `None` for a method without one.
        params (`dict`): settings that differ from cell to cell: `gamma`, `lambda`, `gate`, `top_k`,
            `expansion_factor`, `share`, `trained_on`, `num_neighbors`, `pass_weight`, `layers`, ...
        origin (`dict`): what else decides the figures (encoder, data, templates, training); part of the hash, not of
            the tables.
    """

    encoder: str
    dataset: str
    method: str
    prompts: str = ""
    seed: int | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells cells of one study apart, as plain JSON."""
        names = ("encoder", "dataset", "method", "prompts", "seed")
        return {name: getattr(self, name) for name in names} | {"params": dict(self.params)}

    @property
    def name(self) -> str:
        """File name without suffix: readable, and unique by the hash at its end."""
        text = json.dumps(self.identity | {"origin": self.origin}, sort_keys=True)
        seed = "" if self.seed is None else f"seed{self.seed}"
        words = [self.encoder, self.dataset, self.method, self.prompts, seed]
        readable = "-".join("".join(c if c.isalnum() or c in "._+" else "_" for c in word) for word in words if word)
        return f"{readable}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def __hash__(self) -> int:
        return hash(self.name)


@dataclass
class Outputs:
    """What a method decided for each evaluated image; each tensor is `(n,)`, on the CPU, in the order of the test
    split."""

    labels: torch.Tensor
    """int64: the true class."""
    predictions: torch.Tensor
    """int64: the class chosen."""
    fvu: torch.Tensor | None = None
    """float32: per-sample FVU; `None` for a method that does not ask an SAE."""
    steered: torch.Tensor | None = None
    """bool: whether the method touched the image; `None` where that has no meaning."""
    images: torch.Tensor | None = None
    """int64: which images of the test split these are, ascending; `None`: all of them."""

    @property
    def right(self) -> torch.Tensor:
        """bool `(n,)`."""
        return self.predictions == self.labels

    def at(self, images: torch.Tensor | None) -> Outputs:
        """The outcomes of these images of the test split; outcomes of all are needed to choose from."""
        if images is None or (self.images is not None and torch.equal(images, self.images)):
            return self
        if self.images is not None:
            raise ValueError("These outcomes are of some images only: others can't be chosen from them.")
        fvu, steered = (None if value is None else value[images] for value in (self.fvu, self.steered))
        return Outputs(self.labels[images], self.predictions[images], fvu, steered, images)


@dataclass(eq=False)
class CellResult:
    """A measured cell.

    Args:
        cell (`Cell`): what was measured; read from a file, its `origin` is empty.
        figures (`dict`): `top1`, `top5` (%, `None` for five classes or fewer), `mean_per_class` (%), `gain` over plain
            CLIP with the same prompts on the same images (points) with `gain_ci` (95 % paired bootstrap over images),
            `fixed`, `broken`, `coverage` (share of images touched), `mean_fvu`, `n`, `seconds`; or what a cell without
            rows has measured.
        sections (`list[str]`): the parts of the study that show it.
        outputs_path (`Path`, *optional*): the outcome of every image.
    """

    cell: Cell
    figures: dict[str, Any]
    sections: list[str] = field(default_factory=list)
    outputs_path: Path | None = None

    def outputs(self) -> Outputs:
        """The outcome of every image.

        Raises:
            FileNotFoundError: the cell has none, or its file is gone.
        """
        if self.outputs_path is None or not self.outputs_path.is_file():
            raise FileNotFoundError(f"The cell {self.cell.name} has no file of outcomes ({self.outputs_path}).")
        return Outputs(**read_tensors(self.outputs_path)[0])


@dataclass
class StudyResult:
    """All measured cells of a study, and what is needed to read them."""

    meta: dict[str, Any]
    cells: list[CellResult]

    def select(self, section: str | None = None, **wanted: Any) -> list[CellResult]:
        """The cells of a section with these properties: `encoder=`, `dataset=`, `method=`, `prompts=`, `seed=`, or one
        of `params`."""
        return [
            one
            for one in self.cells
            if (section is None or section in one.sections)
            and all(_property(one.cell, name) == value for name, value in wanted.items())
        ]

    def plain(self, encoder: str, dataset: str, prompts: str) -> CellResult | None:
        """Plain CLIP's cell there: what gains are measured against."""
        found = self.select(encoder=encoder, dataset=dataset, prompts=prompts, method="clip")
        return found[0] if found else None

    def __iter__(self) -> Iterator[CellResult]:
        return iter(self.cells)

    def to_json(self, path: str | Path) -> Path:
        """Write the result file, whole or not at all; the outcomes of images stay where they are."""
        path = Path(path)
        cells = [
            one.cell.identity
            | {"sections": one.sections, "figures": one.figures}
            | ({} if one.outputs_path is None else {"outputs": os.path.relpath(one.outputs_path, path.parent)})
            for one in self.cells
        ]
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, "meta": self.meta, "cells": cells}
        write_json(path, content)
        return path

    @classmethod
    def from_json(cls, path: str | Path) -> StudyResult:
        """Read a result file.

        Raises:
            ValueError: it is not one. OSError: it cannot be read.
        """
        path = Path(path)
        try:
            content = read_json(path)
            if content["format"] != FORMAT or content["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format {content['format']!r} version {content['format_version']!r}")
            cells = [
                CellResult(
                    _cell(one),
                    one["figures"],
                    one["sections"],
                    path.parent / one["outputs"] if "outputs" in one else None,
                )
                for one in content["cells"]
            ]
            about = content["meta"].get("methods", {})
            meta = content["meta"] | {"methods": {SPELLED.get(name, name): one for name, one in about.items()}}
            return cls(meta, cells)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not the result file of a study: JSON of format {FORMAT!r} version {FORMAT_VERSION} was "
                "expected."
            ) from error


def _cell(content: Mapping[str, Any]) -> Cell:
    method = SPELLED.get(content["method"], content["method"])
    return Cell(content["encoder"], content["dataset"], method, content["prompts"], content["seed"], content["params"])


def _property(cell: Cell, name: str) -> Any:
    return (
        getattr(cell, name) if name in ("encoder", "dataset", "method", "prompts", "seed") else cell.params.get(name)
    )


# One cell on disk


def save_cell(folder: Path, cell: Cell, figures: dict[str, Any], outputs: Outputs | None) -> CellResult:
    """Write a measured cell; the JSON goes last, so that a cell with one is whole."""
    target = folder / f"{cell.name}.json"
    content = cell.identity | {"figures": figures, "outputs": None, "outputs_digest": None}
    path = None
    if outputs is not None:
        path = target.with_suffix(".safetensors")
        write_tensors(path, {name: value for name, value in vars(outputs).items() if value is not None})
        content |= {"outputs": path.name, "outputs_digest": file_digest(path)}
    write_json(target, content | {"digest": json_digest(content)})
    return CellResult(cell, figures, outputs_path=path)


def load_cell(folder: Path, cell: Cell) -> CellResult | None:
    """The cell as it was measured before; `None` when it was not, or, with a warning, when its files are damaged or
    another cell's."""
    target = folder / f"{cell.name}.json"
    if not target.is_file():
        earlier = [replace(cell, method=old) for old, new in SPELLED.items() if new == cell.method]
        found = next(filter(None, (load_cell(folder, one) for one in earlier)), None)
        return None if found is None else replace(found, cell=cell)
    path = None
    try:
        content = read_json(target)
        digest = content.pop("digest", None)  # earlier versions wrote none
        own = {name: content[name] for name in cell.identity}
        if digest not in (None, json_digest(content)) or json_digest(own) != json_digest(cell.identity):
            raise ValueError("it is damaged, or another cell's")
        result = CellResult(cell, content["figures"])
        if content["outputs"] is not None:
            path = result.outputs_path = target.with_suffix(".safetensors")
            if content.get("outputs_digest") not in (None, file_digest(path)):
                raise ValueError("it is damaged, or another cell's")
            result.outputs()
        return result
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning(f"{path or target} can't be used ({error}): {cell.name} is measured again.")
        return None
