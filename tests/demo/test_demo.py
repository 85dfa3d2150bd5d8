"""The demo: what `hf-vs2 demo` writes is whole, honest and usable, and its tiny CLIP is the one the card describes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image


pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from hf_vs2 import ActivationStore, EvaluationResult, SAEModel, VS2CLIPForZeroShot  # noqa: E402
from hf_vs2.demo import run as demo_module  # noqa: E402
from hf_vs2.demo.data import DIGIT_NAMES, foreign_images, load_handwriting, prepare_digit  # noqa: E402
from hf_vs2.demo.folds import pool_folds  # noqa: E402
from hf_vs2.demo.run import run_demo  # noqa: E402
from hf_vs2.evaluation.comparison import evaluate  # noqa: E402
from hf_vs2.evaluation.methods import evaluation_methods


FIGURES = {"top1", "top5", "gain", "coverage", "mean_fvu", "n", "gamma", "lambda", "tau"}
ROW_FIELDS = FIGURES | {"method", "prompts", "gain_ci"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One run with fewer training steps: the figures are a little worse, everything else is as users get it."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_module, "MAX_STEPS", 150)
        patch.setattr(demo_module, "NUM_FOREIGN", 60)
        result = run_demo(tmp_path_factory.mktemp("demo"), progress=False)
    assert torch.get_num_threads() == threads
    return result


def test_result_file_has_every_method_with_both_prompt_sets(demo):
    content = json.loads(demo.results_path.read_text(encoding="utf-8"))
    assert {(row["method"], row["prompts"]) for row in content["rows"]} == {
        (method, prompts) for method in evaluation_methods() for prompts in ("single", "ensemble")
    }
    assert all(row.keys() >= ROW_FIELDS and row["n"] == 1797 for row in content["rows"])
    assert 70 < EvaluationResult.from_json(demo.results_path).row("clip")["top1"] < 90


def test_gate_passes_the_target_and_stops_foreign_images(demo):
    target = demo.evaluation.row("vs2+gate")["coverage"]
    coverage = {one.name: one.coverage for one in demo.foreign}
    assert target > 0.9
    assert set(coverage) == {"turned digits", "printed letters", "photo crops", "uniform noise"}
    assert coverage["printed letters"] < 0.7 * target
    assert max(coverage["turned digits"], coverage["photo crops"], coverage["uniform noise"]) < 0.25 * target


def test_what_is_left_behind_loads_and_classifies(demo):
    """The lines of Python that the demo prints run as they are; the saved model needs none of the package's own files."""
    lines = str(demo).split("Use it in Python:")[1].strip().splitlines()
    assert len(lines) == 3
    names: dict = {}
    exec("\n".join(line.strip() for line in lines[:2]), names)
    answers = eval(lines[2], names)
    assert answers[0]["label"] == "zero"
    SAEModel.from_pretrained(demo.sae_path)
    assert Image.open(demo.figure_path).size[0] > 1000
    model = VS2CLIPForZeroShot.from_pretrained(demo.model_path)
    assert model.steering_settings.gate == demo_module.GATE and model.config.holds_clip


def test_second_run_uses_the_activations_of_the_first(demo, monkeypatch):
    monkeypatch.setattr(demo_module, "MAX_STEPS", 1)
    monkeypatch.setattr(demo_module, "NUM_FOREIGN", 60)
    before = {path: path.stat().st_mtime_ns for path in (demo.output_dir / "activations").rglob("*.safetensors")}
    again = run_demo(demo.output_dir, progress=False)
    assert len(before) == 5
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert torch.equal(ActivationStore.open(again.store.path).tensor(), demo.store.tensor())


def test_pooled_folds_equal_one_evaluation_of_all_images(demo):
    """With the same SAE in every fold, pooling must change nothing but the order of the work."""
    model = VS2CLIPForZeroShot.from_pretrained(demo.model_path)
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(demo.model_path)
    rows, labels = demo.store.tensor()[:400], demo.store.labels[:400]
    folds = torch.randperm(400, generator=torch.Generator().manual_seed(1)).split([100, 250, 50])
    methods = ("clip", "centroid", "vs2+gate")

    def compare(indices):
        return evaluate(model, rows[indices], labels[indices], DIGIT_NAMES, tokenizer, methods=methods)

    whole, pooled = compare(torch.arange(400)), pool_folds([compare(fold) for fold in folds], folds)
    for expected, row in zip(whole.rows, pooled.rows, strict=True):
        for name in FIGURES:
            assert row[name] == pytest.approx(expected[name], abs=1e-3), name
        assert row["gain_ci"] == pytest.approx(expected["gain_ci"], abs=1e-3)
    for expected, one in zip(whole.samples, pooled.samples, strict=True):
        assert torch.equal(one.predictions, expected.predictions) and torch.equal(one.steered, expected.steered)
    for expected, one in zip(whole.per_class["accuracy"], pooled.per_class["accuracy"], strict=True):
        assert one == pytest.approx(expected, abs=1e-3)


def test_missing_packages_are_named_with_the_command_to_install_them(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="scikit-learn and matplotlib: run `pip install scikit-learn matplotlib`"):
        run_demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_material_is_the_same_for_the_same_seed():
    """Activations are found again only if the images are the same, byte for byte."""
    first, second = foreign_images(5, seed=3), foreign_images(5, seed=3)
    for name, images in first.items():
        assert all(np.array_equal(a, b) for a, b in zip(images, second[name], strict=True)), name
        assert {image.size for image in images} == {(28, 28)}
    handwriting = load_handwriting()
    assert handwriting.features["label"].names == list(DIGIT_NAMES)
    assert np.asarray(prepare_digit(np.full((8, 8), 16.0))).max() == 255
    assert len(handwriting) == 1797
