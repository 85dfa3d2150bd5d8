"""Where the paper's order of methods holds: told in both directions, from the same images, failures first."""

from pathlib import Path

import pytest
from made_up_study import N, cell, made_up, rows, with_outcomes

from hf_vs2.study.documents.order import ORDER
from hf_vs2.study.documents.published import published
from hf_vs2.study.documents.tables import study_markdown


@pytest.mark.parametrize(
    ("vs2", "verdict"), [(260, "holds"), (140, "does not hold"), (202, "within noise")], ids=["up", "down", "open"]
)
def test_order_is_told_in_both_directions(tmp_path: Path, vs2: int, verdict: str) -> None:
    """The study must say plainly where the paper's order fails, and not call noise either way."""
    plain = with_outcomes(tmp_path, "clip", 200)
    # Other images right than plain CLIP's, so that two more of 400 is noise.
    runs = [with_outcomes(tmp_path, "vs2", vs2, offset=N - vs2, seed=seed) for seed in (0, 1)]
    document = study_markdown(made_up({"set": {}}, [plain, *runs]))
    assert f"**VS2 > plain CLIP**: {verdict} in 1 of 1." in document
    shown = rows(document, "VS2 > plain CLIP")
    if verdict == "holds":
        assert not shown  # the table is for what needs a look
        return
    (row,) = shown
    assert row[-1] == verdict
    difference = 100 * (vs2 - 200) / N
    assert float(row[4]) == pytest.approx(difference)
    low, high = map(float, row[5].split(" to "))
    overlap = max(0, 200 + vs2 - N)
    changed = (200 - overlap) + (vs2 - overlap)
    half = 196 * ((changed / N - (difference / 100) ** 2) / N) ** 0.5
    assert (low, high) == pytest.approx((difference - half, difference + half), abs=0.006)


def test_order_without_files_of_outcomes_goes_by_sign(tmp_path: Path) -> None:
    """A result file that was sent alone must still give the tables, without what only single images can tell."""
    runs = [with_outcomes(tmp_path, "clip", 200), with_outcomes(tmp_path, "vs2", 198, seed=0)]
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    document = study_markdown(made_up({"set": {}}, runs))
    (row,) = rows(document, "VS2 > plain CLIP")
    assert row[4:] == ["-0.50", "", "does not hold"]
    assert "Classes that VS2" not in document and "Agreement" not in document


def test_the_table_lists_failures_first_and_counts_stay_whole() -> None:
    """Of thousands of cells a reader must find the ones where the paper is wrong, and still see how many there were."""
    cells = []
    for dataset, gain in (("up", 3.0), ("down", -2.0), ("even", 1.0)):
        cells += [cell("clip", 60.0, dataset=dataset), cell("vs2", 60.0 + gain, gain, dataset, seed=0)]
        cells += [
            cell("reconstruct", 62.0 if dataset == "even" else 50.0, 2.0 if dataset == "even" else -10.0, dataset, 0)
        ]
    document = study_markdown(made_up({name: {"title": name.upper()} for name in ("up", "down", "even")}, cells))
    assert "**VS2 > plain CLIP**: holds in 2, does not hold in 1 of 3." in document
    found = [row for row in rows(document, "") if row[-1] in ("holds", "does not hold", "within noise")]
    assert [row[:2] + row[4:5] for row in found] == [
        ["VS2 > plain CLIP", 'DOWN, "single"', "-2.00"],
        ["plain CLIP > reconstruction", 'EVEN, "single"', "-2.00"],
    ]


def test_failures_come_before_noise(tmp_path: Path) -> None:
    """A plain failure must not be looked for below a page of open cases."""
    cells = [
        with_outcomes(tmp_path, "clip", 200),
        with_outcomes(tmp_path, "vs2", 202, offset=N - 202, seed=0),
        with_outcomes(tmp_path, "reconstruct", 300, seed=0),
    ]
    document = study_markdown(made_up({"set": {}}, cells))
    found = [row[-1] for row in rows(document, "") if row[-1] in ("does not hold", "within noise")]
    assert found == ["does not hold", "within noise"]


def test_every_claim_is_true_of_the_papers_own_figures() -> None:
    """A claim put in the paper's mouth that its own tables contradict would make a study fail it unjustly."""
    figures: dict[tuple[str, str, str], dict[str, float]] = {}
    for entry in published()["accuracy"]:
        for encoder, methods in entry["figures"].items():
            for method, row in methods.items():
                for dataset, top1 in zip(entry["datasets"], row, strict=True):
                    figures.setdefault((encoder, entry["prompts"], dataset), {})[method] = top1
    for better, worse in ORDER:
        places = [row for row in figures.values() if better in row and worse in row]
        assert places and all(row[better] > row[worse] for row in places), (better, worse)
