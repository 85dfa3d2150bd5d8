"""Classes, confusions, agreement of seeds and of steering vectors, as the document shows them."""

from pathlib import Path

from made_up_study import made_up, rows, with_outcomes

from hf_vs2.study.documents.tables import study_markdown
from hf_vs2.study.results.cells import Cell, CellResult


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
