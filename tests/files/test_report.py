"""Result files, tables and pictures: what a user keeps, reads and shows of an evaluation."""

import json

import numpy as np
import pytest

from hf_vs2.evaluation.table import terminal_table
from hf_vs2.files.report import EvaluationResult, plot_fvu_histogram, plot_gains


def make_row(method, prompts, gain, **more):
    row = {"method": method, "prompts": prompts, "top1": 60 + gain, "top5": 90.0, "gain": gain}
    row |= {"gain_ci": [gain - 1, gain + 1], "coverage": 1.0, "mean_fvu": None, "n": 100}
    return row | {"gamma": None, "lambda": None, "tau": None, "seconds": 0.1} | more


@pytest.fixture()
def result():
    rows = []
    for prompts in ("single", "ensemble"):
        rows += [
            make_row("clip", prompts, 0.0, coverage=0.0),
            make_row("distribution_norm", prompts, 3.0, coefficient=0.5, reference="evaluated"),
            make_row("vs2+gate", prompts, -2.5, mean_fvu=0.25, gamma=1.5, tau=0.4, top5=None, **{"lambda": 2.1}),
        ]
    return EvaluationResult(rows, {"seed": 0}, {"class_names": ["a"], "support": [100], "accuracy": [[60.0]] * 6})


def test_round_trip(result, tmp_path):
    """What is read back must be what was written, and the file must be JSON for anyone's reader."""
    path = result.to_json(tmp_path / "new" / "results.json")
    again = EvaluationResult.from_json(path)
    assert (again.rows, again.meta, again.per_class) == (result.rows, result.meta, result.per_class)
    assert set(json.loads(path.read_text())) == {"meta", "rows", "per_class"}
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]  # no temporary file stays behind


def test_a_failed_write_leaves_the_old_file(result, tmp_path):
    """A crash or a value that JSON cannot hold must not destroy yesterday's figures."""
    path = result.to_json(tmp_path / "results.json")
    before = path.read_bytes()
    result.rows[0]["top1"] = float("nan")
    with pytest.raises(ValueError):
        result.to_json(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"rows": 3, "meta": {}}', '{"rows": [{}], "meta": {}}', '{"rows": []}']
)
def test_another_file_is_refused(content, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="other.json is not a result file"):
        EvaluationResult.from_json(path)


def test_rows_are_found_by_name(result):
    assert result.row("vs2+gate", "ensemble") is result.rows[5]
    assert result.row("distribution_norm", coefficient=0.5) is result.rows[1]
    with pytest.raises(KeyError, match="no row for method 'vs2'"):
        result.row("vs2")


def test_table(result):
    """Aligned for a terminal, Markdown for a card; a missing figure is a dash, never a crash or a made-up zero."""
    table, caption = result.table().split("\n\n")
    lines = table.splitlines()
    assert len(lines) == 2 + len(result.rows) and len({len(line) for line in lines}) == 1
    assert "distribution_norm 0.5" in lines[3] and "+3.00 [+2.00, +4.00]" in lines[3]
    assert [cell.strip() for cell in lines[4].split("|")[3:8]] == [
        "57.50",
        "-",
        "-2.50 [-3.50, -1.50]",
        "100.0%",
        "0.250",
    ]
    assert "gamma 1.5; lambda 2.1; vs2+gate steers images of FVU up to 0.4" in caption
    assert "from the evaluated images" in caption


def test_table_for_a_terminal(result):
    """It fits 80 columns, shows first what stands for the rest, and says how to see the rest."""
    result.rows += [row | {"method": "prototypes+a_very_long_name_of_a_method+gate"} for row in result.rows[1:]]
    few, every = terminal_table(result), terminal_table(result, every_row=True)
    assert all(len(line) <= 80 for line in [*few.splitlines(), *every.splitlines()])
    assert "shown with --all: 1." in few and "prototypes" not in few and "--all" not in every
    assert (
        "+2.00 to +4.00" in few and "prototypes+a_very" in every and "vs2+gate steers images of FVU up to 0.4" in few
    )


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_pictures(result, tmp_path, suffix):
    """Both pictures draw from a result or its file, in the format that the suffix asks for."""
    pytest.importorskip("matplotlib")
    fvu = {"target": np.random.default_rng(0).beta(2, 5, 500), "foreign": np.array([0.9, np.inf, np.nan, 40.0])}
    made = [
        plot_gains(result, tmp_path / f"gains{suffix}", title="digits"),
        plot_gains(result.to_json(tmp_path / "results.json"), tmp_path / "deep" / f"gains{suffix}"),
        plot_fvu_histogram(fvu, tmp_path / f"fvu{suffix}", threshold=0.6),
    ]
    start = b"\x89PNG" if suffix == ".png" else b"<?xml"
    assert all(path.read_bytes().startswith(start) for path in made)


@pytest.mark.parametrize("text", ["$5 \\bill$", "a_{b}^2 $x$", "_$", "\\frac{1}{"])
def test_text_in_pictures_is_text(result, text, tmp_path):
    """A label, a title or the name of a prompt file with a dollar sign is no formula: it stopped the picture, or
    changed the text."""
    matplotlib = pytest.importorskip("matplotlib")
    for row in result.rows:
        row["prompts"] = text if row["prompts"] == "ensemble" else row["prompts"]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        gains = plot_gains(result, tmp_path / "gains.svg", title=text)
        fvu = plot_fvu_histogram({text: [0.1, 0.2]}, tmp_path / "fvu.svg", threshold=float("inf"), title=text)
    assert gains.read_text().count(f"{text}</text>") == 1 and f"{text} (CLIP 60.0 %)</text>" in gains.read_text()
    assert fvu.read_text().count(f"{text}</text>") == 2


def test_pictures_say_what_is_missing(result, tmp_path, take_away):
    """Without matplotlib the user must learn which extra to install; a bad suffix must not leave a file."""
    with pytest.raises(ValueError, match="suffix must be one of"):
        plot_gains(result, tmp_path / "gains.jpeg2000")
    with pytest.raises(ValueError, match="at least one per-sample FVU"):
        plot_fvu_histogram({"empty": []}, tmp_path / "fvu.png")
    only_clip = EvaluationResult(result.rows[:1], {})
    with pytest.raises(ValueError, match="no method but plain CLIP"):
        plot_gains(only_clip, tmp_path / "gains.png")

    take_away("matplotlib")
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_gains(result, tmp_path / "gains.png")
    assert not list(tmp_path.iterdir())
