"""The registry of methods: one registered from outside the package works everywhere, incomplete ones are refused."""

import asyncio
import re
import threading
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_clip
from steered import cls_rows, make_inputs, own_methods, scored_model, strongest
from words import NAMES, compared_model, make_word_tokenizer

from hf_vs2 import VS2CLIPForZeroShot, evaluate
from hf_vs2.methods import METHODS, Method, markdown_table, method_named, register
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
