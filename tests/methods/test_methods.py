"""The registry of methods: one registered from outside the package works everywhere, incomplete ones are refused."""

import asyncio
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_clip
from steered import cls_rows, make_inputs, own_methods, scored_model, strongest
from torch.nn.functional import normalize
from words import NAMES, compared_model, make_word_tokenizer

from hf_vs2 import VS2CLIPForZeroShot, evaluate
from hf_vs2.methods import METHODS, Method, markdown_table, method_named, register, row_label, then
from hf_vs2.study.results.catalog import study_methods


DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module", autouse=True)
def registered():
    own = own_methods()
    METHODS.update(own)
    yield
    for name in own:
        del METHODS[name]


@pytest.fixture()
def model(tiny_clip):
    return scored_model(tiny_clip, cls_rows(tiny_clip, make_inputs(100, 4, seed=5)["pixel_values"]))


def test_it_is_a_row_of_a_comparison():
    """A user's method is compared with the same controls, intervals and gate as ours."""
    torch.manual_seed(0)
    images = torch.randn(50, 3, 32, 32)
    with torch.no_grad():
        rows = make_tiny_clip().vision_model(pixel_values=images).last_hidden_state[:, 0]
    labels = torch.arange(50) % len(NAMES)
    model = compared_model(rows, statistics=True)
    wanted = ("clip", "centroid", "own_strongest", "own_strongest+gate", "own_strongest+own_norm")
    found = evaluate(model, rows, labels, NAMES, make_word_tokenizer(), methods=wanted, templates="single")
    assert [row["method"] for row in found.rows] == [
        "clip",
        "centroid",
        "own_strongest",
        "own_strongest+gate",
        "own_strongest+own_norm",
    ]
    assert found.rows[2]["gamma"] == 1.5 and found.rows[2]["lambda"] == 2.1


def test_unknown_and_incomplete_methods_are_refused(model):
    """A typo, or half a method, must not run as another one."""
    with pytest.raises(ValueError, match="method='vs3' is not known. Use one of .*'vs2'"):
        model.set_steering(method="vs3")
    with pytest.raises(ValueError, match="There is a method 'vs2' already: VS2"):
        register(Method("vs2", "mine", step=strongest))
    for row in ("clip", "vs2_random"):
        with pytest.raises(ValueError, match="is a row of every comparison already"):
            register(Method(row, "mine", step=strongest))
    for pair in (("vs2++", "distribution_norm"), ("none", "distribution_norm"), ("vs2", "amplify")):
        with pytest.raises(ValueError, match="the first must have a step that needs no corpus, the second a fit"):
            then(*pair)
    for faulty, message in (
        ({"name": "a b", "label": "x", "step": strongest}, "name without blanks"),
        ({"name": "x+gate", "label": "x", "step": strongest}, "must not end in"),
        ({"name": "x", "label": "x", "step": "vs2"}, "step must be a function"),
        ({"name": "x", "label": "x", "step": strongest, "views": (1,)}, "no fit that makes any"),
        ({"name": "x", "label": "x"}, "neither a step nor a fit"),
    ):
        with pytest.raises(ValueError, match=message):
            register(Method(**faulty))
    assert method_named("vs2").label == "VS2"


def test_a_cell_of_a_notebook_that_registers_a_method_can_be_run_again(model):
    """The second function takes the place of the first; of one gamma a latent there is no alpha to give it."""
    own = METHODS["own_strongest"]
    register(replace(own, label="again"), exist_ok=True)
    assert row_label("own_strongest") == "again"
    register(own, exist_ok=True)
    model.set_steering(method="own_strongest")
    several = replace(own, name="own_several", one_direction=False)
    METHODS["own_several"] = several
    try:
        model.set_steering(method="own_several", gamma=[3.0] + [1.0] * (len(model.sae.W_dec) - 1))
        with pytest.raises(ValueError, match="there is no one alpha"):
            model.steer_cls(torch.randn(2, 32))
    finally:
        del METHODS["own_several"]


def test_a_package_that_is_installed_brings_a_method_to_every_door(tmp_path):
    """`pip install` of a package with an entry point is all that its user does: no import of its own."""
    (tmp_path / "plug.py").write_text(
        "from hf_vs2.methods import METHODS, Method, register\n"
        "register(Method('from_afar', 'from afar', step=METHODS['vs2'].step))\n"
    )
    about = tmp_path / "plug-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[hf_vs2.methods]\nfrom_afar = plug\n")
    asked = {
        "evaluate": "from hf_vs2.evaluation.methods import check_methods; check_methods(['from_afar+gate'])",
        "study": "from hf_vs2.study.config import StudyConfig; print(StudyConfig.from_dict({'output_dir': 'x', "
        "'encoders': ['a/b'], 'datasets': ['cifar10'], 'methods': ['from_afar']}).methods)",
        "steering": "from hf_vs2.config.steering import Steering; Steering(method='from_afar')",
    }
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    for door, code in asked.items():
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{door}: {done.stderr}"


@torch.no_grad()
def test_scores_follow_the_coefficient_of_a_method_made_of_two(model, tiny_clip):
    """The page says `then(step, "distribution_norm")`: with another coefficient its scores must not be the old ones."""
    combined = then("own_strongest", "distribution_norm")
    rows, classes = cls_rows(tiny_clip, make_inputs(6, 4)["pixel_values"]), normalize(torch.randn(3, 24), dim=-1)
    try:
        scores = []
        for coefficient in (0.25, 1.0):
            with model.steering(method=combined.name, coefficient=coefficient):
                scores.append(model.class_logits(model.image_features_from_cls(rows), classes))
        assert not torch.allclose(*scores, atol=1e-3)
    finally:
        del METHODS[combined.name]


def test_a_checkpoint_of_a_method_that_nobody_registered_names_it(model, tmp_path, monkeypatch):
    """Loading it as another method would give other answers than those that were measured."""
    model.set_steering(method="own_strongest")
    model.save_pretrained(tmp_path, full=True)
    monkeypatch.delitem(METHODS, "own_strongest")
    with pytest.raises(ValueError, match="method='own_strongest' is not known"):
        VS2CLIPForZeroShot.from_pretrained(tmp_path)


def test_the_documented_table_is_that_of_the_registry():
    """A method that the page lacks is one that nobody finds."""
    ours = [line for line in markdown_table().splitlines() if "own_strongest" not in line and "own_norm" not in line]
    assert "\n".join(ours) in (DOCS / "methods.md").read_text(encoding="utf-8")
    page = (DOCS / "study.md").read_text(encoding="utf-8").partition("\n## Methods\n")[2]
    named = set(re.findall(r"`([\w+.]+)`", page))
    known = {name.removesuffix("+gate") for name in study_methods()}
    missing = {name for name in known if not name.startswith(("own_", "strongest"))} - named
    assert not missing, "docs/study.md"


# Settings belong to their context


@torch.no_grad()
def test_blocks_of_several_threads_and_tasks_keep_apart(model, tiny_clip):
    """One model serves many requests: nobody's settings may become another's, nor stay."""
    rows = cls_rows(tiny_clip, make_inputs(6, 4)["pixel_values"])
    gammas = [1.0 + 0.25 * number for number in range(8)]
    expected = []
    for gamma in gammas:
        with model.steering(gamma=gamma):
            expected.append(model.steer_cls(rows).rows)
    before, wrong = model.steering_settings, []

    def work(number: int) -> None:
        for _ in range(20):
            with torch.no_grad(), model.steering(gamma=gammas[number]):
                with model.steering(enabled=False):
                    assert not model.steering_settings.enabled
                if not torch.equal(model.steer_cls(rows).rows, expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(gammas))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and model.steering_settings == before

    async def task(number: int) -> bool:
        with model.steering(gamma=gammas[number]):
            for _ in range(5):
                await asyncio.sleep(0)  # others run now, each inside its own block
                if not torch.equal(model.steer_cls(rows).rows, expected[number]):
                    return False
        return True

    async def everyone() -> list[bool]:
        return await asyncio.gather(*map(task, range(len(gammas))))

    assert all(asyncio.run(everyone())) and model.steering_settings == before


def test_what_is_set_inside_a_block_is_refused(model):
    """The block's settings would hide it: somebody would measure another model than the one they set."""
    with model.steering(gamma=2.0):
        for change in (lambda: model.set_steering(lambda_=1.0), lambda: model.set_corpus(None)):
            with pytest.raises(RuntimeError, match="This is inside `with model.steering"):
                change()
    model.set_steering(lambda_=1.0)
    assert model._latest.settings.lambda_ == model.steering_settings.lambda_ == 1.0, "what compiled code reads"
