"""The study's document from a made-up result: each figure in its place, and rows where a reader looks for them."""

import re
from pathlib import Path
from typing import Any

import pytest
from made_up_study import B16, B32, cell, made_up, rows, with_outcomes

from hf_vs2.study.documents.published import published
from hf_vs2.study.documents.tables import study_markdown
from hf_vs2.study.results.cells import Cell, CellResult


def test_a_field_is_mean_deviation_gain_and_seeds() -> None:
    """The figures people quote: over seeds, with n - 1, and the oracle marked as a bound."""
    cells = [
        cell("vs2++oracle", 80.0, 20.0, seed=0),
        cell("clip", 60.0),
        cell("vs2", 61.0, 1.0, seed=0),
        cell("vs2", 64.0, 4.0, seed=1),
    ]
    document = study_markdown(made_up({"set": {}}, cells))
    assert rows(document, "plain CLIP")[0] == ["plain CLIP", "60.00"]
    assert rows(document, "VS2")[0] == ["VS2", "62.50 ± 2.12 (+2.50), n 2"]
    assert rows(document, "VS2++")[0] == ["VS2++, oracle (uses labels: training)", "80.00 (+20.00), n 1"]
    # The paper's order of rows, not that of the cells.
    assert document.index("| plain CLIP |") < document.index("| VS2 |") < document.index("| VS2++, oracle")
    assert "A set: 400" in document and "[" not in rows(document, "VS2")[0][1]


def test_number_of_seeds_stands_once_if_it_is_one_number() -> None:
    """n in every field hides the figures; n above a table whose rows differ would be false."""
    cells = [
        cell("clip", 60.0),
        *(cell(name, 61.0, 1.0, seed=seed) for name in ("vs2", "reconstruct") for seed in (0, 1)),
    ]
    document = study_markdown(made_up({"set": {}}, cells))
    assert document.count("n = 2 SAE seeds.") == 1 and ", n 2" not in document
    document = study_markdown(made_up({"set": {}}, cells[:-1]))
    assert "n = " not in document
    assert (
        rows(document, "VS2")[0][1] == "61.00 ± 0.00 (+1.00), n 2"
        and rows(document, "reconstruct")[0][1] == "61.00 (+1.00), n 1"
    )


def test_rows_are_grouped_and_those_with_labels_last() -> None:
    """A bound that used labels must not stand among the methods that it bounds, nor a control among the paper's rows or under an SAE."""
    names = ["vs2++oracle", "vs2_random", "zero_out", "centroid", "vs2", "clip"]
    cells = [
        cell(name, 60.0, seed=None if name in ("clip", "centroid") else 0, prompts=prompts)
        for prompts in ("single", "ensemble")
        for name in names
    ]
    document = study_markdown(made_up({"set": {}}, cells))
    assert document.count("## Accuracy: ") == 1
    for prompts in ("single", "ensemble"):
        table = document.split(f'### Prompts "{prompts}"')[1].split("\n#")[0]
        assert [row[0] for row in rows(table, "")[2:]] == [
            "**The paper's rows**",
            "plain CLIP",
            "VS2",
            "**Without an SAE**",
            "centroid, no SAE",
            "**With an SAE**",
            "zero-out (gamma 0, lambda 1)",
            "**The SAE replaced**",
            "VS2, random directions",
            "**With labels**",
            "VS2++, oracle (uses labels: training)",
        ]


def test_mean_per_class_has_its_own_column() -> None:
    """Where CLIP's paper averages over classes both figures are due, each with its own gain."""
    cells = [
        cell("clip", 60.0, mean_per_class=50.0),
        cell("vs2", 61.0, 1.0, seed=0, mean_per_class=53.5),
    ]
    document = study_markdown(made_up({"set": {"metric": "mean_per_class"}}, cells))
    assert rows(document, "method")[0] == ["method", "A set", "A set, mean per class"]
    assert rows(document, "VS2")[0] == ["VS2", "61.00 (+1.00)", "53.50 (+3.50)"]


@pytest.mark.parametrize(
    ("encoder", "number", "bracket"),
    [("facebook/dinov2-base", 50, " [77.11]"), (None, 50, ""), ("facebook/dinov2-base", 20, "")],
)
def test_neighbours_found_otherwise_than_in_the_paper_get_no_bracket(encoder, number, bracket) -> None:
    """VS2++ with CLIP's own neighbours is another row than the paper's: beside its figure it would look like a failure to repeat it."""
    params = {"num_neighbors": number, "retrieval_encoder": encoder}
    cells = [cell("clip", 60.0), cell("vs2++", 61.0, 1.0, seed=0, params=params)]
    document = study_markdown(made_up({"set": {"registry": "cifar100"}}, cells))
    assert rows(document, "plain CLIP")[0][1] == "60.00 [61.07]"
    assert rows(document, "VS2++")[0][1] == f"61.00 (+1.00){bracket}"


def test_cost_stands_beside_the_papers() -> None:
    """The claim of almost no cost, in both countings."""
    figures = {
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "batch_size": 1,
        "image_size": 224,
        "num_classes": 100,
        "flops": {
            "plain": 8_817_725_440,
            "steered": 8_822_640_640,
            "added": 4_915_200,
            "added_percent": 0.05574,
            "added_by_formula": 196_608,
            "attention": 92_160_000,
        },
        "parameters": {"clip": 151_277_313, "image_side": 87_849_216, "sae": 4_722_432, "added_percent": 5.4},
        "training": {"per_sample": 5_130_240.0, "added_by_formula": 393_216.0, "dense_encoder": 14_155_776},
        "time": {"plain_ms": 97.0, "steered_ms": 98.0, "ratio": 1.009, "ratio_iqr": [0.995, 1.04], "pairs": 20},
        "memory": None,
    }
    one = CellResult(Cell("enc", "set", "cost"), figures, ["cost"])
    document = study_markdown(made_up({"set": {}}, [one]))
    assert rows(document, "GFLOPs an image")[0][1:] == [
        "8.8177 [8.7295]",
        "8.8226 [8.7342]",
        "+0.056 % [+0.054 %]",
    ]
    assert rows(document, "parameters")[0][3] == "+4.72 [+4.72]"
    assert rows(document, "GFLOPs a sample")[0][2] == "0.0051 [0.0142]"
    assert not re.search(r"\[\d", study_markdown(made_up({"set": {}}, [one], "another/clip")))


def test_names_cannot_break_a_table(tmp_path: Path) -> None:
    """A class called "a|b" must not shift the figures of its row to other columns."""
    runs = [with_outcomes(tmp_path, "clip", 200), with_outcomes(tmp_path, "vs2", 240, seed=0)]
    document = study_markdown(made_up({"set": {"class_names": ["a|b", "c", "d", "e"], "title": "x|y"}}, runs))
    for line in document.splitlines():
        if line.startswith("|"):
            assert len(re.split(r"(?<!\\)\|", line)) == len(re.split(r"(?<!\\)\|", _head_of(document, line)))
    assert "a&#124;b" in document and "x&#124;y" in document


def _head_of(document: str, line: str) -> str:
    lines = document.splitlines()
    start = lines.index(line)
    while start > 0 and lines[start - 1].startswith("|"):
        start -= 1
    return lines[start]


# Classes, confusions, and agreement of seeds and of steering vectors


def test_images_of_all_seeds_in_classes_confusions_and_agreement(tmp_path: Path) -> None:
    """The audit of classes must be that of all SAEs, and name CLIP's mistake, not the method's."""
    runs = [
        with_outcomes(tmp_path, "clip", 200),
        with_outcomes(tmp_path, "vs2", 240, seed=0),
        with_outcomes(tmp_path, "vs2", 220, seed=1),
    ]
    document = study_markdown(made_up({"set": {"registry": "cifar100"}}, runs))
    # Per class of 100: plain 50, seeds 60 and 55; the paper's gain stands beside the classes that it names.
    assert rows(document, "tractor") == [["tractor", "50.0", "57.5", "+7.5 [+25]"]]
    assert rows(document, "owl") == [["owl", "50.0", "57.5", "+7.5"]]
    assert ["fixed", "tractor", "bus", "7.5"] in rows(document, "fixed")
    (row,) = rows(document, "enc, single")
    assert row[2:] == ["95.0", "95.0", "50.0", "50.0"]


def test_cosines_are_a_matrix_with_its_names() -> None:
    """Which two SAEs a cosine is about is all that it says."""
    figures = {"names": ["seed 0", "k 8", "centroid"], "cosine": [[1.0, 0.5, 0.9], [0.5, 1.0, 0.7], [0.9, 0.7, 1.0]]}
    one = CellResult(Cell("enc", "set", "steering_cosine"), figures, ["agreement"])
    document = study_markdown(made_up({"set": {}}, [one]))
    assert rows(document, "k 8") == [["k 8", "0.500", "1.000", "0.700"]]


# The paper's figures: whole, and beside nothing that they are not about


@pytest.mark.parametrize(
    ("change", "bracket"),
    [
        ({}, " [64.52]"),
        ({"registry": "food101"}, " [81.20]"),
        ({"prompts": "ensemble"}, " [65.48]"),
        ({"method": "reconstruct"}, " [58.22]"),
        ({"encoder": "openai/clip-vit-large-patch14"}, " [74.12]"),
        ({"registry": None}, ""),
        ({"prompts": "published"}, ""),
        ({"encoder": "a/clip"}, ""),
        ({"method": "centroid"}, ""),
    ],
)
def test_published_figures_stand_only_where_the_cell_is_the_same(change: dict[str, Any], bracket: str) -> None:
    """A published figure beside another encoder, data set, method or prompt set would be a false comparison."""
    about = {"registry": "cifar100"} | {key: value for key, value in change.items() if key == "registry"}
    one = cell(change.get("method", "vs2"), 64.0, 3.0, seed=0, prompts=change.get("prompts", "single"))
    document = study_markdown(made_up({"set": about}, [one], change.get("encoder", B32)))
    assert rows(document, change.get("method", "vs2").replace("vs2", "VS2"))[0][1] == f"64.00 (+3.00){bracket}"
    # Beside a published figure of an SAE with other settings, the difference is told.
    assert bool(re.search(r"here k 16.*so they are not quite the same", " ".join(document.split()))) == bool(bracket)


def test_published_file_has_a_figure_for_every_column() -> None:
    """A row one figure short would shift the paper's figures to other data sets."""
    figures = published()
    for entry in figures["accuracy"]:
        for methods in entry["figures"].values():
            assert all(len(row) == len(entry["datasets"]) and min(row) > 10 for row in methods.values())
    for part in ("fvu", "gate_shift"):
        for found in figures[part]["figures"].values():
            for row in found.values() if isinstance(found, dict) else [found]:
                assert len(row) == len(figures[part]["datasets"])
    table = figures["accuracy"][0]["figures"]
    # Three of table 1's figures, as printed.
    assert table[B32]["vs2"][0] == 64.52 and table[B16]["vs2++oracle"][2] == 81.55
    assert table[B32]["rec_a"][2] == 30.56
