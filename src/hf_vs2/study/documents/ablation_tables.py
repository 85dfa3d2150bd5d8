"""Tables beside the main one: the gate under shift (table 3), one setting varied at a time, and how well the SAEs
reconstruct."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from ...training.domain import SKETCH_ROWS
from ..results.cells import CellResult
from ..results.view import distinct
from . import published
from .markdown import mean, spread, table
from .result_view import ResultView, common_seeds, gate_as_asked, gate_note, seeds_note


Note = Callable[[str | None, Collection[str | None], str], str]
"""What the paper has to say beside a table, of the encoder's Hub id, the registry's names of the data sets, and the
prompts."""


def gate_shift(view: ResultView) -> Iterator[str]:
    """One SAE for several data sets on each of its own and on others, with and without the gate."""
    groups: dict[tuple[str, str, tuple[str, ...]], list[CellResult]] = {}
    for one in view.result.select("gate_shift"):
        if one.cell.method in ("vs2", "vs2+gate"):
            group = (one.cell.encoder, one.cell.prompts, tuple(one.cell.params["trained_on"]))
            groups.setdefault(group, []).append(one)
    for (encoder, prompts, union), cells in groups.items():
        quantiles = sorted({one.cell.params["gate"] for one in cells if one.cell.method == "vs2+gate"})
        datasets = distinct(one.cell.dataset for one in cells)
        ungated = {name: [one for one in cells if _is(one, name, "vs2")] for name in datasets}
        gated = {
            (name, quantile): [one for one in cells if _is(one, name, "vs2+gate", gate=quantile)]
            for name in datasets
            for quantile in quantiles
        }
        seeds = common_seeds([*ungated.values(), *gated.values()])
        rows = []
        for dataset in datasets:
            plain = view.result.plain(encoder, dataset, prompts)
            trained_on = {view.registry(name) for name in union}
            theirs = published.shift(view.encoder_id(encoder), view.registry(dataset), prompts, trained_on)
            row = [view.title(dataset) + (" (in the union)" if dataset in union else "")]
            row.append("" if plain is None else view.field([plain]))
            row.append(view.field(ungated[dataset], seeds, bracket=theirs.get("ungated", "")))
            for quantile in quantiles:
                here = gated[dataset, quantile]
                bracket = theirs.get(quantile, "") if all(map(gate_as_asked, here)) else ""
                row.append(view.field(here, seeds, bracket=bracket) + (gate_note(here) if here else ""))
            rows.append(row)
        names = " + ".join(view.title(name) for name in union)
        head = ["applied to", "CLIP", "VS2, no gate", *(f"gate q {quantile:g}" for quantile in quantiles)]
        yield (
            f"## Gate under shift: one SAE trained on {names}, {view.heading(encoder, prompts)}\n\n{seeds_note(seeds)}"
            f"{table(head, rows)}\n\nThe gate is the q-quantile of FVU on held-out rows of the SAE's own data. Images "
            'above it are not steered and keep plain CLIP\'s result. "At q ..." after a share steered says that the '
            "held-out rows were too few for the quantile asked for."
        )


def ablations(view: ResultView) -> Iterator[str]:
    """One setting varied around the table's."""
    width, trade_off = published.width_note, published.pass_note
    defaults = view.meta["defaults"]
    yield from _ablation(view, "top_k", "top_k", defaults.get("top_k"), "SAE sparsity k", "k", width)
    yield from _ablation(
        view, "expansion", "expansion_factor", defaults.get("expansion_factor"), "SAE width", "expansion", width
    )
    yield from _ablation(view, "share", "share", 1.0, "Share of the unlabelled training images used", "share")
    yield from _ablation(
        view, "pass", "pass_weight", defaults.get("pass_weight"), "PASS trade-off", "w_aux", trade_off
    )
    yield from _ablation(
        view, "neighbors", "num_neighbors", defaults.get("num_neighbors"), "Neighbours retrieved", "N"
    )
    yield from _ablation(
        view, "sketch", "sketch_rows", SKETCH_ROWS, "Unlabelled rows that prototypes are fitted to", "rows"
    )


def _ablation(
    view: ResultView,
    section: str,
    param: str,
    standard: float | None,
    title: str,
    column: str,
    note: Note | None = None,
) -> Iterator[str]:
    """A cell that does not name the setting has the `standard` one: it is a cell of the main table."""
    cells = view.result.select(section)
    for encoder, prompts in distinct((one.cell.encoder, one.cell.prompts) for one in cells):
        here = [one for one in cells if (one.cell.encoder, one.cell.prompts) == (encoder, prompts)]
        datasets, methods = (distinct(getattr(one.cell, name) for one in here) for name in ("dataset", "method"))
        fields: dict[tuple[str, float], dict[str, list[CellResult]]] = {}
        for one in here:
            of_row = fields.setdefault((one.cell.method, one.cell.params.get(param, standard)), {})
            of_row.setdefault(one.cell.dataset, []).append(one)
        seeds = common_seeds(field for of_row in fields.values() for field in of_row.values())
        rows = []
        for method, value in sorted(fields, key=lambda row: (methods.index(row[0]), row[1])):
            of_row = fields[method, value]
            shown = [_field(view, of_row.get(dataset, []), seeds, section) for dataset in datasets]
            start = [f"{value:g}" + (" (as in the tables)" if value == standard else "")]
            rows.append([*([view.label(method)] if len(methods) > 1 else []), *start, *shown])
        head = [*(["method"] if len(methods) > 1 else []), column, *map(view.title, datasets)]
        what = title if len(methods) > 1 else f"{title} ({view.label(methods[0], mark=False)})"
        text = f"## {what}: {view.heading(encoder, prompts)}\n\n{seeds_note(seeds)}{table(head, rows)}"
        beside = "" if note is None else note(view.encoder_id(encoder), [*map(view.registry, datasets)], prompts)
        yield f"{text}\n\n{beside}" if beside else text


def _field(view: ResultView, cells: Sequence[CellResult], seeds: int | None, section: str) -> str:
    """Accuracy, and what explains it: the share steered of a gated model, else FVU where the SAEs of a table
    differ."""
    field = view.field(cells, seeds, bracket="")
    if cells and cells[0].cell.method == "vs2+gate":
        return field + gate_note(cells)
    fvu = [one.figures["held_out_fvu"] for one in cells if one.figures.get("held_out_fvu") is not None]
    return f"{field}; FVU {mean(fvu):.3f}" if fvu and section != "neighbors" else field


def reconstruction(view: ResultView) -> Iterator[str]:
    """FVU of the SAEs behind the table."""
    found: dict[tuple[str, str], dict[int | None, CellResult]] = {}
    for one in view.table_cells:
        if one.cell.method == "vs2" and one.figures.get("held_out_fvu") is not None:
            found.setdefault((one.cell.encoder, one.cell.dataset), {})[one.cell.seed] = one
    seeds = common_seeds(list(of_seeds.values()) for of_seeds in found.values())
    rows = []
    for (encoder, dataset), of_seeds in found.items():
        text = spread([one.figures["held_out_fvu"] for one in of_seeds.values()], 4)
        theirs = published.fvu(view.encoder_id(encoder), view.registry(dataset))
        text += f", n {len(of_seeds)}" if len(of_seeds) != seeds else ""
        rows.append([encoder, view.title(dataset), text + (f" [{theirs:.4f}]" if theirs is not None else "")])
    if rows:
        note = " [The paper's] is over a batch." if any("[" in row[-1] for row in rows) else ""
        yield (
            "## Reconstruction\n\nVariance that the SAE leaves unexplained (FVU) on training rows held out from its "
            f"training.{note}\n\n{seeds_note(seeds)}{table(['encoder', 'data set', 'FVU'], rows)}"
        )


def _is(one: CellResult, dataset: str, method: str, **params: object) -> bool:
    same = one.cell.dataset == dataset and one.cell.method == method
    return same and all(one.cell.params.get(name) == value for name, value in params.items())
