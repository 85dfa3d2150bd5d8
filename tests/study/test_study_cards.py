"""The cards in `model_cards/` are the library's own and say what the study found."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from made_up_study import description

from hf_vs2.files.sharing.card_edits import Card
from hf_vs2.files.sharing.model_card import _environment
from hf_vs2.study import StudyResult
from hf_vs2.version import INSTALLATION


REPOSITORY = Path(__file__).parents[2]
CARDS = sorted(path for path in (REPOSITORY / "model_cards").glob("*.md") if path.name != "README.md")


def top1_of(text: str, method: str, prompts: str) -> float:
    """A figure of the card's table."""
    (found,) = re.findall(rf"^\| {re.escape(method)} +\| {prompts} +\| +([\d.]+) \|", text, flags=re.MULTILINE)
    return float(found)


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_a_card_is_the_librarys_own_and_agrees_with_the_study(path):
    """A card edited by hand, or of another run than the published figures, would claim what nobody measured."""
    card = Card.parse(path.read_text(encoding="utf-8"))
    assert card.author == "wrote" and not card.text_changed and not card.data_changed
    study = StudyResult.from_json(REPOSITORY / "examples" / "results" / "vit-tiny-lit" / "results.json")
    (dataset,) = {name for name in study.meta["datasets"] if f" on {name.replace('_', '-')}," in card.text}
    section = "table" if path.stem.endswith(f"lit-{dataset}-k16") else "gate_shift"
    for prompts in ("single", "ensemble") if section == "table" else ("single",):
        plain = study.select("table", dataset=dataset, method="clip", prompts=prompts)[0]
        assert top1_of(card.text, "clip", prompts) == pytest.approx(plain.figures["top1"], abs=0.005)
        (vs2,) = study.select(section, dataset=dataset, method="vs2", prompts=prompts, seed=0)
        assert top1_of(card.text, "vs2", prompts) == pytest.approx(vs2.figures["top1"], abs=0.005)


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_a_card_has_the_words_of_todays_templates(path):
    """Whoever reads a committed card to learn what theirs will say must find what the code writes now."""
    text = path.read_text(encoding="utf-8")
    parts = _environment().get_template("parts.md.jinja").module
    assert INSTALLATION in text and str(parts.limits()) in text and str(parts.citation()) in text
    (picture,) = re.findall(r"```text\n(.*?)\n```", text, flags=re.DOTALL)
    gains = dict(re.findall(r"^\| (\S+) +\| single +\|.*\| +([+-][\d.]+) \[", text, flags=re.MULTILINE))
    (drawn,) = [line for line in picture.splitlines() if line.startswith("VS2, gated ")]
    zero, dot = picture.splitlines()[0].index(" 0 ") + 1, drawn.index("●")
    assert (dot > zero) == (float(gains["vs2+gate"]) > 0)
    assert f"a gain of {float(gains['vs2+gate']):+.1f} [" in text.split("## How to use")[0].replace("\n", " ")


def test_there_are_cards():
    """One for each data set of the study, and one for the SAE of two of them."""
    assert len(CARDS) == 4
    readme = (REPOSITORY / "model_cards" / "README.md").read_text(encoding="utf-8")
    assert all(f"({path.name})" in readme for path in CARDS)


def test_the_script_writes_a_card_for_each_sae(tmp_path, monkeypatch, clip_path, images_path):
    """Whoever runs a study gets its cards, without a path of their machine in them."""
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(description(clip_path, images_path, tmp_path / "study")), encoding="utf-8")
    script = REPOSITORY / "scripts" / "study_cards.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(study), "--output_dir", str(tmp_path / "cards")])
    runpy.run_path(str(script), run_name="__main__")
    cards = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "cards").iterdir()}
    assert cards and all("| vs2+gate" in card and str(tmp_path) not in card for card in cards.values())
    assert all(str(images_path) not in card and str(clip_path) not in card for card in cards.values())
