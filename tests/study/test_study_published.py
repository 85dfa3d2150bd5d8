"""The paper's figures: whole, and beside nothing that they are not about."""

import re
from typing import Any

import pytest
from made_up_study import B16, B32, cell, made_up, rows

from hf_vs2.study.documents.published import published
from hf_vs2.study.documents.tables import study_markdown


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
