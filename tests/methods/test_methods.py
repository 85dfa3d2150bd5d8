"""The registry of methods: one registered from outside the package works everywhere, incomplete ones are refused."""

import asyncio
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_clip
from steered import classes_of, cls_rows, make_inputs, scored_model
from words import NAMES, compared_model, make_word_tokenizer

from hf_vs2 import VS2CLIPForZeroShot, evaluate
from hf_vs2.functional.label_free import norm_fit
from hf_vs2.methods import METHODS, Batch, LatentStep, Method, markdown_table, method_named, register, then
from hf_vs2.study.results.catalog import study_methods


DOCS = Path(__file__).parents[2] / "docs"


def strongest(batch: Batch) -> LatentStep:
    best = batch.values.argmax(-1, keepdim=True)
    return batch.moved(batch.alpha * batch.values.gather(1, best), batch.indices.gather(1, best))


@pytest.fixture(scope="module", autouse=True)
def own_methods():
    """A step, a fit and the two together, as a user would add them."""
    step = Method(
        "own_strongest",
        "strongest latent",
        step=strongest,
        one_direction=True,
        explains=True,
        shows=("gamma", "lambda"),
    )
    register(step)
    register(Method("own_norm", "own norm", fit=lambda classes, rows: norm_fit(classes, 0.5 * rows.mean())))
    then("own_strongest", "own_norm")
    yield
    for name in ("own_strongest", "own_norm", "own_strongest+own_norm"):
        del METHODS[name]


@pytest.fixture()
def model(tiny_clip):
    return scored_model(tiny_clip, cls_rows(tiny_clip, make_inputs(100, 4, seed=5)["pixel_values"]))


@pytest.mark.parametrize("method", ["own_strongest", "own_norm", "own_strongest+own_norm"])
@torch.no_grad()
def test_a_method_of_ones_own_is_steered_gated_and_kept(model, tiny_clip, tmp_path, method):
    """Whoever adds a method must not have to edit the package: a file that asks for names would run plain CLIP in silence."""
    inputs, classes = make_inputs(6, 4), classes_of(tiny_clip)
    plain = tiny_clip(**inputs).logits_per_image
    model.set_steering(method=method)
    steered = model(**inputs)
    assert steered.steered.all() and not torch.allclose(steered.logits_per_image, plain, atol=1e-3)
    rows = cls_rows(tiny_clip, inputs["pixel_values"])
    replayed = model.class_logits(model.image_features_from_cls(rows), classes)
    torch.testing.assert_close(replayed, steered.logits_per_image, rtol=0, atol=1e-4)
    model.set_steering(gate=0.5)
    gated = model(**inputs)
    assert 0 < gated.steered.sum() < len(plain)
    assert torch.equal(gated.logits_per_image[~gated.steered], plain[~gated.steered])
    model.save_pretrained(tmp_path, full=True)
    again = VS2CLIPForZeroShot.from_pretrained(tmp_path)
    assert again.steering_settings.method == method
    assert torch.equal(again(**inputs).logits_per_image, gated.logits_per_image)


@torch.no_grad()
def test_its_equation_is_what_runs(model, tiny_clip):
    """By hand: the strongest latent's direction is added, the norm is kept; edits take the place of what the method does."""
    rows = cls_rows(tiny_clip, make_inputs(6, 4)["pixel_values"])
    model.set_steering(method="own_strongest")
    values, indices = model.sae.encode(rows)
    best = values.argmax(-1, keepdim=True)
    moved = rows + 0.35 * values.gather(1, best) * model.sae.W_dec[indices.gather(1, best).squeeze(1)]  # 0.7 (1.5 - 1)
    expected = moved * (rows.norm(dim=-1) / moved.norm(dim=-1)).unsqueeze(-1)
    torch.testing.assert_close(model.steer_cls(rows).rows, expected, rtol=0, atol=1e-5)
    explanation = model.explain_from_cls(rows, classes_of(tiny_clip))
    parts = explanation.plain_scores + explanation.normalisation + explanation.contributions.sum(-1)
    torch.testing.assert_close(parts, explanation.steered_scores, rtol=0, atol=1e-9)
    assert ((explanation.latent_changes != 0).sum(-1) == 1).all()
    latent = int(indices.gather(1, best)[0])
    with model.editing(suppress=[latent]):
        step = model.steerer.move(rows).step
        assert step.change[0, step.latents[0] == latent].sum() == -values[0].max()


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


def test_a_checkpoint_of_a_method_that_nobody_registered_names_it(model, tmp_path):
    """Loading it as another method would give other answers than those that were measured."""
    model.set_steering(method="own_strongest")
    model.save_pretrained(tmp_path, full=True)
    code = f"import hf_vs2; hf_vs2.VS2CLIPForZeroShot.from_pretrained({str(tmp_path)!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ValueError" in result.stderr and "method='own_strongest' is not known" in result.stderr


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


def test_a_block_that_an_error_leaves_leaves_nothing_behind(model):
    before = model.steering_settings
    with pytest.raises(RuntimeError), model.steering(gamma=3.0):
        raise RuntimeError
    assert model.steering_settings == before and model.steerer is model._steerer
