"""`scripts/true_clip.py`: what decides between rules must count each image once, and run on a user's own embeddings."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from drawn import drawn_classes, images_of
from made_up_study import description
from safetensors.torch import save_file


SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture()
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import scenarios
    import true_clip

    return scenarios, true_clip


def test_an_image_of_many_draws_counts_once(scripts):
    """Twenty draws of the same hundred images are no two thousand: the interval is that of a hundred."""
    scenarios, true_clip = scripts
    empty = torch.zeros(100, 4)
    own = scenarios.ImageSet("x", "e", empty, torch.zeros(100), empty[:2], 1.0, empty[:0])
    change = torch.tensor([1.0, -1.0, 0.0, 0.0] * 25) + torch.tensor([1.0] + [0.0] * 99)
    one = scenarios.Scenario("even", own, torch.arange(100), own, torch.arange(100))
    once, often = (true_clip.pooled([(one, change.double())] * number) for number in (1, 20))
    assert often == pytest.approx(once) and once["images"] == 100
    expected = 1.96 * 100 * change.std(correction=0).item() / 10
    assert once["high"] - once["gain"] == pytest.approx(expected)


def test_it_runs_on_ones_own_embeddings(tmp_path):
    """Two label sets of one encoder: every rule is scored, and a foreign set of images is drawn from the other."""
    for number, name in enumerate(("these", "those")):
        classes, labels = drawn_classes(4, seed=number).float(), torch.arange(4).repeat(40)
        rows = images_of(classes.double(), labels, seed=number, noise=1.0).float()
        save_file({"image_embeds": rows, "label": labels, "class_embeds": classes}, tmp_path / f"{name}.safetensors")
    output = tmp_path / "results" / "own.json"
    command = [sys.executable, str(SCRIPTS / "true_clip.py"), "--embeddings", str(tmp_path), "--seeds", "1"]
    command += ["--kinds", "even", "50%", "other", "--temperature", "30", "--output", str(output)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    results = json.loads(output.read_text())
    assert {one["kind"] for one in results} >= {"even", "other images: those", "other images: these"}
    for one in results:
        assert {"anchored_prototypes", "TransCLIP", "ZLaP", "recommended", "recommended, 100 labels"} <= set(
            one["rules"]
        )
        assert len(one["each"]) == one["draws"] and f"| {one['set']} | {one['kind']} |" in printed
    even = next(one for one in results if one["kind"] == "even")
    assert even["rules"]["anchored_prototypes"]["gain"] == pytest.approx(
        sum(each["gains"]["anchored_prototypes"] for each in even["each"]) / even["draws"], abs=2e-3
    )
    table = subprocess.run(
        [sys.executable, str(SCRIPTS / "recommend_table.py"), str(output)], capture_output=True, text=True, check=True
    ).stdout
    assert "| **all** |" in table


def test_the_sets_of_a_study(scripts, clip_path, images_path, tmp_path):
    """One command for one's own CLIP: test images are scored, training images are the unlabelled ones."""
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(description(clip_path, images_path, tmp_path / "out")))
    found, other = scripts[0].study_sets(tmp_path / "study.yaml", None)
    assert len(found.embeds) == len(found.labels) == 24 and len(found.extra) == 120 and len(other.extra) == 60
    assert len(found.cls) == 144 and found.temperature == pytest.approx(found.clip.logit_scale.exp().item())
    torch.testing.assert_close(found.embeds.norm(dim=-1), torch.ones(24))
    kinds = {one.kind for one in scripts[0].scenarios_of(found, [found, other], 1)}
    assert kinds >= {"even", "80% of one label", "other images: half"}
