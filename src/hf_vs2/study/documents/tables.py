"""A study's results as Markdown: the paper's table 1 with its figures beside ours, the ablations, and whether its
order holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...files.markdown import escaped
from ..results.catalog import GROUPS, group_of
from ..results.cells import CellResult, StudyResult
from ..results.view import distinct
from . import published
from .ablation_tables import ablations, gate_shift, reconstruction
from .class_report import classes, cosines, seeds
from .cost_table import cost
from .markdown import table, wrapped
from .order import order
from .result_view import ResultView, common_seeds, seeds_note


PAPER_ROWS = (
    "clip",
    "rec_a",
    "reconstruct",
    "amplify",
    "vs2",
    "vs2_pass",
    "vs2++",
    "vs2++oracle",
    "rag_oracle",
    "clip_steering_pseudo",
    "vs2_ens_aug",
    "vs2_last2",
    "vs2_last3",
)
"""Rows of the paper's tables in its order; a study's other methods follow in the study's."""

SETTINGS = {
    "gamma": "gamma",
    "lambda": "lambda",
    "gate": "gate q",
    "top_k": "k",
    "expansion_factor": "expansion",
    "num_neighbors": "neighbours",
    "rag_weight": "RAG weight",
    "pass_weight": "PASS weight",
    "views": "augmented views",
}


def study_markdown(result: StudyResult) -> str:
    """
    Everything a study measured, as one Markdown document.

    A published figure stands in brackets where the cell is the same: the encoder's Hub id, a data set of the registry
    used as published, the method and the prompts. Sections without cells are left out; so are those of single images
    (classes, confusions, agreement of seeds, intervals) when the files of outcomes are gone.
    """
    view = ResultView(result)
    parts = [
        _head(view),
        *_accuracy(view),
        order(view),
        *gate_shift(view),
        *ablations(view),
        *reconstruction(view),
        *classes(view),
        *seeds(view),
        *cosines(view),
        *cost(view),
    ]
    return wrapped("\n\n".join(part for part in parts if part)) + "\n"


def _head(view: ResultView) -> str:
    meta, defaults = view.meta, view.meta["defaults"]
    settings = [f"{label} {defaults[key]}" for key, label in SETTINGS.items() if defaults.get(key) is not None]
    training = ", ".join(f"{name} {value}" for name, value in defaults.get("training", {}).items())
    sizes = [f"{view.title(name)}: {facts['n']}" for name, facts in meta["datasets"].items()]
    lines = [
        f"- Settings: {', '.join(settings)}; they come from the study's file, and nothing here picks one by accuracy.",
        f"- SAE training: {training or 'the defaults'}; seeds {', '.join(map(str, meta['seeds']))}.",
        f"- Test images: {'; '.join(sizes)}.",
    ]
    if "versions" in meta:
        lines.append(
            "- Versions: " + ", ".join(f"{name} {version}" for name, version in meta["versions"].items()) + "."
        )
    explained = (
        "Accuracy is top-1 in %: the mean over SAE seeds ± their standard deviation (n "
        "- 1), and in parentheses the gain over plain CLIP with the same prompts on the same images, in points. n, "
        "the number of seeds, stands above the table, or in each field where it differs; nothing without an SAE "
        "depends on a seed, unless it draws a share of the training images. A number of images in a field says that "
        f"the row was measured on that many. [Brackets] hold the figure that {published.PAPER} publishes for the same "
        "encoder, data set, method and prompts (it lists no prompts: its Ens rows are taken for ensemble, all others "
        "for single; its neighbours are DINOv2's); no brackets, no such figure. Rows that say so use labels for more "
        "than scoring: those of training images, or those of test images, which makes a bound that nobody can "
        "deploy."
    )
    encoders = ", ".join(escaped(name) for name in meta["encoders"])
    title = f"# Study of {encoders}: {'; '.join(view.title(name) for name in meta['datasets'])}"
    return "\n\n".join([title, explained, "\n".join(lines)])


def _accuracy(view: ResultView) -> Iterator[str]:
    """A section for each encoder, in it a table for each prompt set."""
    for encoder in distinct(one.cell.encoder for one in view.table_cells):
        of_encoder = [one for one in view.table_cells if one.cell.encoder == encoder]
        tables = []
        for prompts in distinct(one.cell.prompts for one in of_encoder):
            cells = [one for one in of_encoder if one.cell.prompts == prompts]
            tables.append(f'### Prompts "{prompts}"\n\n{_accuracy_table(view, cells)}')
        note = published.settings_note(view.encoder_id(encoder), view.meta["defaults"])
        shown = [f"## Accuracy: {view.heading(encoder)}", *tables]
        if note and any("[" in part for part in tables):
            shown.append(note)
        yield "\n\n".join(shown)


def _accuracy_table(view: ResultView, cells: Sequence[CellResult]) -> str:
    columns: list[tuple[str, str]] = []
    for dataset in distinct(one.cell.dataset for one in cells):
        columns.append((dataset, "top1"))
        if view.meta["datasets"][dataset].get("metric") == "mean_per_class":
            columns.append((dataset, "mean_per_class"))
    fields: dict[tuple[str, str], list[CellResult]] = {}
    for one in cells:
        fields.setdefault((one.cell.method, one.cell.dataset), []).append(one)
    number = common_seeds(fields.values())
    groups = _groups(view, cells)
    rows = []
    for title, methods in groups:
        if len(groups) > 1:
            rows.append([f"**{title}**", *[""] * len(columns)])
        for method in methods:
            shown = [view.field(fields.get((method, dataset), []), number, figure) for dataset, figure in columns]
            rows.append([view.label(method), *shown])
    head = ["method"] + [
        view.title(dataset) + (", mean per class" if figure == "mean_per_class" else "") for dataset, figure in columns
    ]
    return seeds_note(number) + table(head, rows)


def _groups(view: ResultView, cells: Sequence[CellResult]) -> list[tuple[str, list[str]]]:
    """The methods of a table, each in the first group that has room for it; empty groups are left out."""
    seeded = {one.cell.method: one.cell.seed is not None for one in cells}
    paper = [name for name in PAPER_ROWS if name in seeded]
    methods = [*paper, *(name for name in seeded if name not in paper)]
    groups: dict[str, list[str]] = {"The paper's rows": [], **{group: [] for group in GROUPS}}
    for name in methods:
        is_paper = name in paper and not view.uses_labels(name)
        groups["The paper's rows" if is_paper else GROUPS[-1] if view.uses_labels(name) else group_of(name)].append(
            name
        )
    return [(title[0].upper() + title[1:], names) for title, names in groups.items() if names]
