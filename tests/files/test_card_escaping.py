"""A card shows what strangers' files say as text: no tag, link, heading or table cell of theirs gets into it."""

import json
import re

import pytest
from cards import TRAINING_DATA, make_described_sae, make_result, save_with_log
from hub_models import CLIP_ID, upload_clip

from hf_vs2.files.markdown import code, escaped, number
from hf_vs2.files.sharing.model_card import create_model_card


@pytest.fixture()
def folder(tmp_path):
    return save_with_log(make_described_sae(upload_clip(CLIP_ID)), tmp_path / "sae")


HOSTILE = (
    "x`)`` | y |\r\n\n# Stranger\n\n<img src=x onerror=alert(1)> <!-- [a](javascript:alert(1)) ![b](https://evil.example/c.png)\n"
    "<https://evil.example> www{{7*7}}{% raw %}\n\n```\n---\n| a | b |\n|---|---|\n&lt;b&gt; \\| *c*\n[d]: https://evil.example"
)


def rendered(card):
    """As the Hub's page shows it, tables included."""
    markdown = pytest.importorskip("markdown_it", reason="rendered with markdown-it-py").MarkdownIt(
        "commonmark", {"html": True}
    )
    return markdown.enable("table").render(card.text)


def facts_of(place):
    """`config.json` with the text in one place."""
    outer, _, inner = place.partition(".")
    if not inner:
        return {outer: HOSTILE}
    if inner == "converted_from":
        return {outer: {inner: dict.fromkeys(("name", "format", "revision", "subfolder"), HOSTILE)}}
    if inner == "label_loss":
        return {outer: {**TRAINING_DATA, inner: {"name": HOSTILE, HOSTILE: HOSTILE}}}
    return {outer: {**TRAINING_DATA, inner: HOSTILE}}


CONFIG = [
    "base_model_name_or_path",
    "base_model_revision",
    "hf_vs2_version",
    *(
        f"training_data.{name}"
        for name in ("id", "split", "fingerprint", "num_rows", "skipped", "selected_from", "seed")
    ),
    *(f"training_data.{name}" for name in ("converted_from", "label_loss")),
    *(f"training_metrics.{name}" for name in ("fvu", "l0", "dead_share", "steps", "train_rows", "held_out_rows")),
]
RESULTS = {
    "class names": lambda result: result.per_class["class_names"].__setitem__(
        slice(None), [HOSTILE, "a", HOSTILE + "2"]
    ),
    "data set": lambda result: result.meta.__setitem__("dataset", {"id": HOSTILE, "split": HOSTILE}),
    "version": lambda result: result.meta.__setitem__("hf_vs2_version", HOSTILE),
    "templates": lambda result: result.meta.__setitem__("templates", {HOSTILE: [HOSTILE]}),
    "prompts": lambda result: [row.__setitem__("prompts", HOSTILE) for row in result.rows],
    "method": lambda result: result.rows.append({**result.rows[-1], "method": HOSTILE}),
}


def check(card):
    text = card.text
    assert not re.search(
        r"<(?!!-- hf_vs2 wrote)|^# (?!sae|x|&)|javascript:|\{\{|\]\(https://evil|\]: http", text, re.MULTILINE
    )
    page = rendered(card)
    assert (
        page.count("<h1>") == 1
        and "<img" not in page
        and 'evil.example"' not in page
        and 'href="javascript' not in page
    )
    assert page.count("<table>") == page.count("</table>") and "<hr" not in page
    cells = [len(re.findall("<t[dh]", row)) for row in re.findall("<tr>.*?</tr>", page, re.DOTALL)]
    assert set(cells) <= {2, 5, 8}, "a cell of theirs"
    assert len(re.findall("<pre>", page)) in (3, 4), "a block of theirs"


@pytest.mark.parametrize("place", CONFIG)
def test_a_strangers_config_stays_text(folder, place):
    config = json.loads((folder / "config.json").read_text())
    for name, value in facts_of(place).items():
        config[name] = {**(config.get(name) or {}), **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    check(create_model_card(folder))


@pytest.mark.parametrize("change", RESULTS)
def test_a_strangers_results_stay_text(folder, change):
    result = make_result()
    RESULTS[change](result)
    check(create_model_card(folder, results=result))


def test_names_licences_and_logs_stay_text(folder):
    (folder / "training_log.json").write_text(
        json.dumps({"args": {"learning_rate": HOSTILE, "mixed_precision": HOSTILE}})
    )
    check(create_model_card(folder, name="x<img src=x>`|\n\n# Stranger", license=HOSTILE))


def test_ordinary_text_looks_as_it_did():
    """Escaping that disfigures the cards of everybody would be turned off."""
    assert escaped("vs2+gate (0.5), k=64 50 % of a_b") == "vs2+gate (0.5), k=64 50 % of a_b"
    assert code("train[:600]") == "`train[:600]`" and code("a photo of a {}.") == "`a photo of a {}.`"
    assert number(1234, ",") == "1,234" and number("<b>", ",") == "&lt;b&gt;" and number(True, ",") == "True"
