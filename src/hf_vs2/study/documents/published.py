"""The paper's figures, and when a cell is the same as one of theirs: the Hub id of the encoder, a data set of the
registry used as published (`None` when it is not), the prompts and the method."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from importlib import resources
from typing import Any

import yaml


PAPER = "Chatzoudis et al., arXiv 2506.01247"
SETTINGS = {"top_k": "k", "expansion_factor": "expansion", "gamma": "gamma"}


@cache
def published() -> dict[str, Any]:
    """All of them, see `published.yaml`."""
    return yaml.safe_load((resources.files(__package__) / "published.yaml").read_text(encoding="utf-8"))


def accuracy(encoder: str | None, dataset: str | None, prompts: str, method: str) -> float | None:
    """Top-1 accuracy (%) of a row that steers or scores with what the data set itself gave; not of a union's SAE."""
    for entry in published()["accuracy"]:
        if prompts == entry["prompts"] and dataset in entry["datasets"]:
            row = entry["figures"].get(encoder, {}).get(method)
            if row is not None:
                return row[entry["datasets"].index(dataset)]
    return None


def same_retrieval(params: Mapping[str, Any]) -> bool:
    """Whether a cell's neighbours are found as the paper's were; true of one without neighbours."""
    if "num_neighbors" not in params:
        return True
    theirs = published()["retrieval"]
    return theirs["encoder"] in str(params.get("retrieval_encoder")).lower() and (
        params["num_neighbors"] == theirs["num_neighbors"]
    )


def settings_note(encoder: str | None, defaults: Mapping[str, Any]) -> str:
    """Whether the paper's rows for this encoder had the settings of this study."""
    theirs = published()["settings"].get(encoder)
    if theirs is None:
        return ""
    listed = ", ".join(f"{SETTINGS[name]} {value:g}" for name, value in theirs.items())
    different = {name: defaults.get(name) for name in theirs if defaults.get(name) != theirs[name]}
    if not different:
        return f"The paper's rows with an SAE for this encoder: {listed}, as here."
    ours = ", ".join(f"{SETTINGS[name]} {value}" for name, value in different.items())
    return f"The paper's rows with an SAE for this encoder: {listed}; here {ours}, so they are not quite the same."


def shift(
    encoder: str | None, dataset: str | None, prompts: str, trained_on: Collection[str | None]
) -> dict[Any, str]:
    """Table 3's figures of a data set: `"ungated"`, and under the gate's quantile, accuracy and coverage."""
    entry = published()["gate_shift"]
    figures = entry["figures"].get(encoder)
    if figures is None or prompts != entry["prompts"] or set(trained_on) != set(entry["trained_on"]):
        return {}
    if dataset not in entry["datasets"]:
        return {}
    ungated, gated, coverage = (
        figures[name][entry["datasets"].index(dataset)] for name in ("ungated", "gated", "coverage")
    )
    return {"ungated": f"{ungated:.2f}", entry["gate"]: f"{gated:.2f}; {coverage:g} % steered"}


def fvu(encoder: str | None, dataset: str | None) -> float | None:
    entry = published()["fvu"]
    row = entry["figures"].get(encoder)
    return None if row is None or dataset not in entry["datasets"] else row[entry["datasets"].index(dataset)]


def class_gains(encoder: str | None, dataset: str | None, prompts: str) -> dict[str, float]:
    """Points that a class gains, under its name as [`class_key`] spells it."""
    entry = published()["per_class"]
    return entry["gain"] if _same(entry, encoder, [dataset], prompts) else {}


def class_key(name: str) -> str:
    """A class name as the published figures spell it."""
    return name.replace(" ", "_").lower()


def width_note(encoder: str | None, datasets: Collection[str | None], prompts: str) -> str:
    """What the paper says on width and sparsity, if it is about one of these data sets."""
    entry = published()["width_and_sparsity"]
    if not _same(entry, encoder, datasets, prompts):
        return ""
    (low, high), (low5, high5) = entry["top1"], entry["top5"]
    return f"The paper on {entry['dataset']}, {entry['source']}: [{low:.2f} to {high:.2f}], top-5 [{low5} to {high5}]."


def pass_note(encoder: str | None, datasets: Collection[str | None], prompts: str) -> str:
    """The paper's trade-off curve of PASS, if it is about one of these data sets."""
    entry = published()["pass"]
    if not _same(entry, encoder, datasets, prompts):
        return ""
    points = zip(entry["weight"], entry["top1"], entry["fvu"], strict=True)
    listed = "; ".join(f"w_aux {weight:g} [{top1:.2f}, FVU {fvu:.4f}]" for weight, top1, fvu in points)
    return f"The paper on {entry['dataset']} with k {entry['top_k']} ({entry['source']}): {listed}."


def compute(encoder: str | None) -> dict[str, float] | None:
    entry = published()["compute"]
    return entry if encoder == entry["encoder"] else None


def _same(entry: Mapping[str, Any], encoder: str | None, datasets: Collection[str | None], prompts: str) -> bool:
    """Whether an entry of one encoder and data set is about these."""
    return encoder == entry["encoder"] and prompts == entry["prompts"] and entry["dataset"] in datasets
