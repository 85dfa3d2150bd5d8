"""The study's figures, drawn from a result file that was read back: what they show is what was measured, and can be read."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_vs2.evaluation.metrics import paired_bootstrap
from hf_vs2.files.figure_style import COLUMN, PAGE
from hf_vs2.study.config import StudyConfig
from hf_vs2.study.drawings.figures import draw_figures, study_figures
from hf_vs2.study.plan import plan
from hf_vs2.study.results.catalog import study_methods
from hf_vs2.study.results.cells import Cell, CellResult, Outputs, StudyResult, save_cell


METHODS = {name: method for name, method in study_methods().items() if method.default}


N, SEEDS, CLASSES = 130, (0, 1), {"cifar10": 10, "eurosat": 45, "flowers102": 3}
GAMMAS, LAMBDAS = [1.25, 1.5, 2.0], [0.6, 0.9, 2.1]
METHOD_NAMES = ("vs2", "vs2+gate", "centroid", "negate", "vs2++", "vs2++oracle", "vs2_pass")


def config() -> StudyConfig:
    return StudyConfig.from_dict(
        {
            "output_dir": "unused",
            "encoders": ["some/clip"],
            "datasets": list(CLASSES),
            "seeds": list(SEEDS),
            "methods": list(METHOD_NAMES),
            "ablations": {
                "top_k": [16, 64],
                "expansion_factor": [2, 4],
                "share": [0.01, 1],
                "num_neighbors": [5, 50],
                "pass_weight": [0.5, 0.75, 0.8, 2],
            },
            "grid": {"gamma": GAMMAS, "lambda": LAMBDAS},
            "gate_shift": {"trained_on": ["cifar10"], "quantiles": [0.9, 0.99]},
            "cost": False,
        }
    )


def outcomes(cell: Cell) -> Outputs:
    """Random outcomes of the cell's images: the labels are the data set's, some images move away from plain CLIP's answer."""
    labels = torch.arange(N) % CLASSES[cell.dataset]
    plain = np.random.default_rng(len(cell.dataset)).random(N) < 0.6
    rng = np.random.default_rng(int(cell.name[-8:], 16))
    moved = {"clip": 0.0, "negate": 1.0}.get(cell.method, 0.15)
    right = np.where(rng.random(N) < moved, cell.method != "negate" and rng.random(N) < 0.7, plain)
    predictions = torch.where(torch.from_numpy(right), labels, (labels + 1) % CLASSES[cell.dataset])
    fvu = torch.from_numpy(rng.gamma(9, 0.05, N)).float() if METHODS[cell.method].seeded else None
    return Outputs(labels, predictions, fvu)


def measured(folder: Path, cell: Cell) -> CellResult:
    rng = np.random.default_rng(int(cell.name[-8:], 16))
    if cell.method == "grid":
        top1 = (60 + rng.normal(0, 2, (len(GAMMAS), len(LAMBDAS)))).tolist()
        figures = {"gamma": GAMMAS, "lambda": LAMBDAS, "top1": top1, "plain": 60.0, "default": [1.5, 2.1], "n": N}
        return save_cell(folder, cell, figures, None)
    if cell.method == "steering_cosine":
        figures = {
            "names": ["seed 0", "seed 1", "centroid"],
            "cosine": [[1, 0.5, 0.25], [0.5, 1, 0.75], [0.25, 0.75, 1]],
        }
        return save_cell(folder, cell, figures, None)
    outputs = outcomes(cell)
    plain = outcomes(Cell(cell.encoder, cell.dataset, "clip", cell.prompts)).right
    fixed, broken = int((outputs.right & ~plain).sum()), int((plain & ~outputs.right).sum())
    figures = {
        "top1": 100 * float(outputs.right.double().mean()),
        "gain": 100 * (fixed - broken) / N,
        "gain_ci": list(paired_bootstrap(fixed, broken, N, num_resamples=200)),
        "coverage": 0.4 if cell.method == "vs2+gate" else 1.0,
        "n": N,
    }
    if METHODS[cell.method].seeded:
        figures["held_out_fvu"] = float(rng.uniform(0.2, 0.5))
    return save_cell(folder, cell, figures, outputs)


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> StudyResult:
    """A study of three data sets and two seeds, as its files have it."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("study")
    cells = []
    for cell, sections in plan(config()).items():
        one = measured(folder / "cells", cell)
        one.sections = sections
        cells.append(one)
    meta = {
        "name": "made up",
        "datasets": {
            name: {
                "title": name.title(),
                # Two dollar signs make a formula to matplotlib, and this one it cannot read.
                "class_names": [f"a $5 \\bill of ${number}" for number in range(classes)],
                "n": N,
                "n_train": 1000,
            }
            for name, classes in CLASSES.items()
        },
        "methods": {name: {"label": one.label, "uses_labels": one.uses_labels} for name, one in METHODS.items()},
        "defaults": {"gamma": 1.5, "lambda": 2.1, "top_k": 64, "expansion_factor": 4, "num_neighbors": 50}
        | {"pass_weight": 0.8},
    }
    return StudyResult.from_json(StudyResult(meta, cells).to_json(folder / "results.json"))


@pytest.fixture(scope="module")
def figures(result) -> dict[str, Any]:
    """Each figure by its name without the encoder, laid out as in its file."""
    found = {name.replace("-clip", ""): figure for name, figure in study_figures(result)}
    for figure in found.values():
        figure.draw_without_rendering()
    return found


def panel(figure: Any, *words: str) -> Any:
    """The panel whose title has all these words."""
    return next(
        axes for axes in figure.axes if all(word in axes.get_title(loc="left").replace("\n", " ") for word in words)
    )


def line(axes: Any, label: str) -> np.ndarray:
    """The y values of a labelled line, or of an error bar's."""
    handles, labels = axes.get_legend_handles_labels()
    handle = handles[labels.index(label)]
    return np.asarray((handle[0] if isinstance(handle, tuple) else handle).get_ydata())


def texts(figure: Any) -> list[Any]:
    """What is written: matplotlib also keeps labels of ticks beyond the axes, which it does not draw."""
    from matplotlib.axis import Axis
    from matplotlib.text import Text

    beyond = set()
    for axis in figure.findobj(Axis):
        low, high = sorted(axis.get_view_interval())
        room = 1e-6 * (high - low)
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        beyond |= {
            one for tick in ticks if not low - room <= tick.get_loc() <= high + room for one in tick.findobj(Text)
        }
    found = figure.findobj(Text)
    return [one for one in found if one.get_visible() and one.get_text().strip() and one not in beyond]


def test_all_can_be_read(figures):
    """A label that is cut off, written over another or too small for print is lost on the reader; so is one in a
    drawing that is shrunk to fit a paper's page."""
    from matplotlib.text import Text

    expected = {"gains", "grid", "share", "top_k", "expansion", "fvu_deciles", "risk_coverage", "pass", "neighbors"}
    assert set(figures) == expected | {"agreement", *(f"per_class-{dataset}" for dataset in CLASSES)}
    for name, figure in figures.items():
        shown = texts(figure)
        boxes = [(one.get_text(), Text.get_window_extent(one)) for one in shown]  # without the line of an annotation
        assert len(shown) > 8 and {round(one.get_fontsize(), 1) for one in shown} <= {7, 7.5, 8, 9}, name
        assert figure.get_figwidth() in (COLUMN, PAGE), name
        for text, box in boxes:
            assert box.x0 >= -1 and box.y0 >= -1, (name, text)
            assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, (name, text)
        for (first, one), (second, other) in combinations(boxes, 2):
            wide = min(one.x1, other.x1) - max(one.x0, other.x0)
            high = min(one.y1, other.y1) - max(one.y0, other.y0)
            assert wide <= 1 or high <= 1, (name, first, second)
        if name != "agreement":  # there seeds are the rows
            assert "2 seeds: 0, 1" in figure.texts[1].get_text().replace("\n", " "), name


def test_the_grid_marks_the_default(figures, result):
    """A frame around another cell would tell readers of a setting that nobody used; the best one must not be singled out."""
    axes = panel(figures["grid"], "Eurosat")
    frames = [patch for patch in axes.patches if (patch.get_gid() or "").startswith("default")]
    assert {frame.get_xy() for frame in frames} == {(2, 1)}  # third column, second row
    cells = [one.figures for one in result.select("grid", dataset="eurosat")]
    gain = np.mean([np.array(one["top1"]) - 60 for one in cells], axis=0)
    np.testing.assert_allclose(np.asarray(axes.collections[0].get_array()), gain)
    inside = next(text for text in axes.texts if text.get_position() == (2.5, 1.5))
    assert float(inside.get_text().replace("−", "-")) == pytest.approx(gain[1, 2], abs=0.051)
    caption = figures["grid"].texts[1].get_text().replace("\n", " ")
    assert "the study's default (gamma 1.5, lambda 2.1)" in caption and "best" not in caption


def test_a_default_off_the_grid_is_not_marked(result):
    """Better no frame than one around the nearest setting."""
    cells = [
        CellResult(one.cell, one.figures | {"default": [1.6, 2.1]}, one.sections) for one in result.select("grid")
    ]
    ((_, figure),) = study_figures(StudyResult(result.meta, cells))
    axes = panel(figure, "Eurosat", "not on this")
    assert not axes.patches


def runs(result: StudyResult, section: str = "table", **wanted: Any) -> tuple[list[Outputs], np.ndarray]:
    """The runs of a data set with the first prompts, and where plain CLIP is right."""
    wanted |= {"dataset": "eurosat", "prompts": "single"}
    plain = result.select("table", dataset="eurosat", prompts="single", method="clip")[0].outputs()
    return [one.outputs() for one in result.select(section, **wanted)], plain.right.numpy()


def test_deciles_are_numpys(figures, result):
    """The gate rests on this curve: tenths by FVU of each seed's SAE, then the mean over seeds."""
    seeds, plain = runs(result, method="vs2")
    expected: dict[str, list[Any]] = {"VS2 on every image": [], "plain CLIP": [], "edges": []}
    for outputs in seeds:
        parts = np.array_split(np.argsort(outputs.fvu.numpy()), 10)
        expected["VS2 on every image"].append([100 * outputs.right.numpy()[part].mean() for part in parts])
        expected["plain CLIP"].append([100 * plain[part].mean() for part in parts])
        expected["edges"].append([outputs.fvu.numpy()[part].max() for part in parts])
    axes = panel(figures["fvu_deciles"], "Eurosat", "SAE of this data set")
    for label in ("VS2 on every image", "plain CLIP"):
        np.testing.assert_allclose(line(axes, label), np.mean(expected[label], axis=0))
    edges = np.mean(expected["edges"], axis=0)
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        f"{at}\n≤ {edges[at - 1]:.2f}" for at in (1, 4, 7, 10)
    ]


def test_risk_coverage(figures, result):
    """Nothing steered is plain CLIP, everything steered is VS2; a gate stands where it was measured, under its own mark."""
    seeds, plain = runs(result, "gate_shift", method="vs2", trained_on=["cifar10"])
    panels = figures["risk_coverage"].axes
    risk = panel(figures["risk_coverage"], "Eurosat", "SAE of Cifar10, unseen")
    accuracy = panels[panels.index(risk) + len(CLASSES)]
    steered = 100 * np.mean([outputs.right.numpy().mean() for outputs in seeds])
    assert line(risk, "VS2, images below the threshold")[-1] == pytest.approx(100 - steered)
    assert line(risk, "plain CLIP, images below the threshold")[-1] == pytest.approx(100 - 100 * plain.mean())
    np.testing.assert_allclose(line(accuracy, "gated VS2, all images")[[0, -1]], [100 * plain.mean(), steered])
    for quantile in (0.9, 0.99):
        gated = result.select("gate_shift", dataset="eurosat", method="vs2+gate", gate=quantile)
        place = np.mean([one.figures["top1"] for one in gated])
        (mark,) = [one for one in accuracy.lines if one.get_label() == f"gate at q = {quantile}"]
        assert (*mark.get_xdata(), *mark.get_ydata()) == pytest.approx((40, place))  # each gate steers 40 % here


def test_gains(figures, result):
    """Mean over seeds at its method's row; a collapse is named with its number; what uses labels says so."""
    axes = panel(figures["gains"], "Eurosat")
    labels = [label.get_text() for label in figures["gains"].axes[0].get_yticklabels()]
    assert labels.index("with labels") < labels.index("VS2++, oracle (training labels)")
    assert labels.index("without an SAE") < labels.index("centroid, no SAE") < labels.index("with an SAE")
    cells = {
        name: result.select("table", dataset="eurosat", prompts="single", method=name) for name in ("vs2", "negate")
    }
    mean = {name: np.mean([one.figures["gain"] for one in found]) for name, found in cells.items()}
    drawn = [one for one in axes.lines if one.get_label() == "prompts: single"]
    places = {labels[round(float(one.get_ydata()[0]))]: float(one.get_xdata()[0]) for one in drawn}
    assert places["VS2"] == pytest.approx(mean["vs2"]) and METHODS["negate"].label not in places
    assert f"−{abs(mean['negate']):.1f}" in [text.get_text() for text in axes.texts]


def test_many_classes_are_cut(figures, result):
    """With 45 classes: largest gains first, largest losses last, and how many are not shown."""
    seeds, plain = runs(result, method="vs2")
    labels = seeds[0].labels.numpy()
    gain = np.array(
        [
            100 * np.mean([outputs.right.numpy()[labels == label].mean() for outputs in seeds])
            - 100 * plain[labels == label].mean()
            for label in range(CLASSES["eurosat"])
        ]
    )
    axes = figures["per_class-eurosat"].axes[0]
    widths = [bar.get_width() for bar in axes.patches]
    best, worst = min(15, int((gain > 1e-9).sum())), min(15, int((gain < -1e-9).sum()))
    expected = np.sort(gain)[::-1]
    np.testing.assert_allclose(widths, [*expected[:best], *expected[len(expected) - worst :]], atol=1e-9)
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[best] == f"{45 - best - worst} classes between" and names[0].startswith("a $5 \\bill of $")


def test_files(result, tmp_path):
    """PNG, SVG and PDF of each; drawn again, the last two are the same, so that a repository shows no change where nothing changed."""
    part = StudyResult(result.meta, result.select("grid"))
    once, again = draw_figures(part, tmp_path / "new" / "once"), draw_figures(part, tmp_path / "again")
    assert [path.name for path in once] == [f"grid-clip{suffix}" for suffix in (".png", ".svg", ".pdf")]
    assert sorted(once) == sorted((tmp_path / "new" / "once").iterdir())  # no temporary file stays
    for one, other in zip(once, again, strict=True):
        assert one.read_bytes().startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[one.suffix])
        assert one.suffix == ".png" or one.read_bytes() == other.read_bytes()
    assert ">lambda</text>" in once[1].read_text()  # text, not outlines
    bare = [figure for _, figure in study_figures(part, notes=False)]
    assert not any(figure.texts for figure in bare)  # a caption says it


def test_markers_of_a_method_stand_nearer_to_each_other_than_to_the_next(figures):
    """Two prompts of one method that are further apart than two methods are read as a pair of different ones."""
    axes = panel(figures["gains"], "Eurosat")
    at = {
        name: {float(one.get_ydata()[0]) for one in axes.lines if one.get_label() == f"prompts: {name}"}
        for name in ("single", "ensemble")
    }
    assert min(abs(one - round(one)) for one in at["single"]) <= 0.2 and at["single"]
    assert all(min(abs(one - other) for other in at["ensemble"]) <= 0.4 for one in at["single"])


def test_no_figure_of_nothing(result, tmp_path):
    """An empty section gives no file; a result file that came without the outcomes of images still gives the others."""
    plain = StudyResult(result.meta, result.select("table", method="clip"))
    assert draw_figures(plain, tmp_path / "none") == [] and not (tmp_path / "none").exists()
    cells = [
        CellResult(one.cell, one.figures, ["table"], tmp_path / "gone.safetensors")
        for one in result.select("table", dataset="cifar10")
    ]
    assert [name for name, _ in study_figures(StudyResult(result.meta, cells))] == ["gains-clip"]


def test_missing_matplotlib(result, tmp_path, take_away):
    """The user must learn what to install, before a folder appears."""
    take_away("matplotlib")
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw_figures(result, tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_lines_from_labels_to_points_do_not_cross():
    """Lines that cross lead the eye from a label to another label's point, where points lie above each other."""
    from matplotlib.figure import Figure

    from hf_vs2.study.drawings.figure_curves import _label_above

    axes = Figure(figsize=(2.2, 2)).add_subplot()
    places = {"0": (0.401, 10.17), "0.1": (0.374, 10.17), "2": (0.36, 10.07), "1": (0.35, 9.9), "0.5": (0.3499, 9.93)}
    places["0.8"] = (0.3503, 10.2)
    axes.plot(*zip(*places.values(), strict=True))
    _label_above(axes, places)
    to_fraction = axes.transData + axes.transAxes.inverted()
    lines = [(np.array(text.xyann), to_fraction.transform(text.xy)) for text in axes.texts]

    def side(a, b, c):
        (x, y), (u, v) = b - a, c - a
        return np.sign(x * v - y * u)

    assert len(lines) == len(places)
    for (a, b), (c, d) in combinations(lines, 2):
        assert side(a, b, c) == side(a, b, d) or side(c, d, a) == side(c, d, b)
