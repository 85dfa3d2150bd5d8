"""Model cards: what a stranger reads about a checkpoint must be true, runnable, readable by the Hub, and respect edits."""

import json
import logging
import os
import re

import numpy as np
import pytest
import torch
import yaml
from cards import TRAINING_DATA, make_described_sae, make_result, save_with_log
from hub_models import CLIP_ID, make_sae, make_vs2, upload_clip
from huggingface_hub import ModelCard, parse_eval_result_entries
from loopback_hub import check_card
from PIL import Image

from hf_vs2 import (
    SAEConfig,
    SAEModel,
    VS2CLIPForZeroShot,
    create_model_card,
    push_to_hub,
    write_model_card,
)
from hf_vs2.files.sharing.card_edits import Card, card_to_upload, merge_metadata
from hf_vs2.files.sharing.card_results import ResultFacts
from hf_vs2.files.sharing.model_card import _default_steering


@pytest.fixture(scope="module")
def clip():
    return upload_clip(CLIP_ID)


@pytest.fixture()
def sae(clip):
    return make_described_sae(clip)


@pytest.fixture()
def folder(sae, tmp_path):
    return save_with_log(sae, tmp_path / "sae")


def section(card, title):
    return str(card).split(f"## {title}")[1].split("\n## ")[0]


# What it says


def test_the_card_names_the_method_that_answers(clip, tmp_path):
    """A checkpoint that keeps plain CLIP was described by VS2's gamma, lambda and gate."""
    for method, said in (
        ("none", "plain CLIP"),
        ("prototypes", "prototypes, gate at its 0.9 quantile of the distance"),
    ):
        sae = make_described_sae(clip)
        sae.config.method, sae.config.gate = method, 0.9
        assert _default_steering(sae.config) == said


def test_card_tells_what_is_on_record(folder, sae):
    card = create_model_card(folder, name="ada/sae", results=make_result(), license="mit")
    training = section(card, "SAE and training")
    for expected in (
        "96 inputs, 384 features (expansion 4)",
        "ReLU, then the 8 largest",
        "layer 2, counted from 0, of 3 layers",
        "gate at FVU 99 (quantile 0.99 of 120 held-out images)",
        "[someone/pictures](https://huggingface.co/datasets/someone/pictures), split `train[:600]`, 600 images",
        "`0f1e2d`",
        "`steps` 1500, `learning_rate` 0.0005, `per_device_train_batch_size` 512, `seed` 42",
        "| FVU | 0.2812 |",
        "| L0 | 8.0 |",
        "| Dead features | 1.5% |",
    ):
        assert expected in training
    evaluation = section(card, "Evaluation")
    assert make_result().table() in evaluation
    assert "split `test`: 300 images, 3 classes" in evaluation
    assert "- Prompts `ensemble`: `a {}.`, one &#123;&#125; &#124; two" in evaluation
    assert "1 of 3 classes gain, 1 lose and 1 stay" in evaluation
    assert "| three | 100 | 50.0 | 85.0 | +35.0 |" in evaluation
    assert "| a &#124; &lt;b&gt; | 100 | 70.0 | 52.5 | -17.5 |" in evaluation
    assert f"revision `{sae.config.base_model_revision}`" in card.text
    assert "biases" in section(card, "Intended use and limits")
    assert "under `mit`" in section(card, "Licence")
    assert "arXiv:2506.01247" in section(card, "Citation")
    assert str(folder.parent) not in str(card)


def test_card_says_that_labels_were_used(clip, tmp_path):
    """An SAE that PASS has trained is not label-free, nor is a model that holds it: neither card may say so anywhere."""
    data = TRAINING_DATA | {"label_loss": {"name": "PrototypeAlignment", "weight": 0.8}}
    sae = make_sae(clip, training_data=data)
    sae.save_pretrained(tmp_path / "sae")
    VS2CLIPForZeroShot(clip, sae, gate=0.99).save_pretrained(tmp_path / "vs2")
    result = make_result(sae_training_data=data)
    for folder, results in ((tmp_path / "sae", result), (tmp_path / "vs2", None)):
        text = create_model_card(folder, name="ada/model", results=results).text
        assert "Labels of the training images were used" in section(text, "SAE and training")
        assert "| Labels | used in training by `PrototypeAlignment` (weight 0.8) |" in text
        head = text.split("## Intended use")[0]
        assert not re.search("no labels were|without labels|right answers only", head, re.IGNORECASE)


def test_card_says_which_latents_were_changed_by_hand(clip, tmp_path):
    """Who uses a checkpoint with a feature suppressed must be able to read that."""
    model = VS2CLIPForZeroShot(clip, make_sae(clip), gate=0.99)
    model.save_pretrained(tmp_path / "plain")
    model.set_steering(edits={"amplify": {5: 3.0}, "suppress": [2], "set": {7: 1.5}})
    model.save_pretrained(tmp_path / "edited")
    plain, edited = (create_model_card(tmp_path / name, name="ada/model").text for name in ("plain", "edited"))
    assert "5 times 3, 2 to 0, 7 to 1.5" in edited and "by hand" not in plain


def test_metadata_are_what_the_hub_understands(folder, clip, tmp_path):
    """The Hub finds model, data, task and figures; its client reads back what it was given."""
    card = create_model_card(folder, name="ada/sae", results=make_result(), license="mit", tags=["birds"])
    assert check_card(str(card)) == []
    data = ModelCard(str(card)).data
    assert (data.base_model, data.base_model_relation, data.datasets) == (CLIP_ID, "adapter", ["someone/pictures"])
    assert (data.library_name, data.license, data.pipeline_tag) == ("hf_vs2", "mit", "feature-extraction")
    assert set(data.tags) >= {"hf_vs2", "birds"}
    assert [(one.metric_value, one.dataset_type, one.dataset_split) for one in data.eval_results] == [
        (0.635, "someone/pictures", "test")
    ] * 2
    make_vs2(clip).save_pretrained(tmp_path / "vs2")
    card = create_model_card(tmp_path / "vs2", name="ada/vs2")
    assert check_card(str(card)) == []
    # The only pair with which `pipeline(model=id)` needs no task.
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "zero-shot-image-classification")


PARTS = [{**TRAINING_DATA, "num_rows": 400}, {"id": "someone/cars", "fingerprint": "77aa", "num_rows": 100}]
# Settings of an SAE, what its card says, and the data sets that the Hub links.
ON_RECORD = {
    "nothing": (
        {},
        ["a CLIP whose name was not recorded", "came without a result file", "have not stated a licence", "no gate"],
        None,
    ),
    # Who feeds such an SAE CLS rows gets nonsense.
    "a SigLIP": (
        {"base_model_type": "siglip", "site": "pooled"},
        [
            "the pooled activation of an image",
            "| CLIP family | `siglip` |",
            "| Reads | what the vision tower pools from",
        ],
        None,
    ),
    "folders of the author's machine": (
        {"training_data": {"id": "/nobody/my_pictures"}, "base_model_name_or_path": "/nobody/my_clip"},
        ["`my_pictures`", "`my_clip`"],
        None,
    ),
    "several data sets": (
        {"training_data": {"num_rows": 500, "seed": 1, "selected_from": 5000, "parts": PARTS}},
        [
            "split `train[:600]`, 400 images; [someone/cars](https://huggingface.co/datasets/someone/cars)",
            *("100 images (selected from 5,000)", "`0f1e2d`, `77aa`"),
        ],
        ["someone/cars", "someone/pictures"],
    ),
    # Which must not cost the user the weights.
    "a gate without calibration": (
        {"gate": 0.99, "fvu_quantiles": {"0.9": 0.1}},
        ["for which it is not calibrated"],
        None,
    ),
}


@pytest.mark.parametrize("case", ON_RECORD)
def test_a_card_says_what_is_on_record_and_makes_nothing_up(tmp_path, case):
    """A stranger has nothing else to go by."""
    settings, expected, linked = ON_RECORD[case]
    SAEModel(SAEConfig(**{"hidden_size": 16, "top_k": 4, **settings})).save_pretrained(tmp_path / "sae")
    card = create_model_card(tmp_path / "sae", name="ada/sae")
    assert check_card(str(card)) == [] and "/nobody" not in str(card) and str(tmp_path) not in str(card)
    assert [text for text in expected if text not in card.text] == []
    assert ("CLS" in section(card, "How to use")) == (case != "a SigLIP")
    assert (card.data.base_model, card.data.datasets, card.data.license) == (None, linked, None)


def test_card_of_several_saes_tells_them_apart(clip, tmp_path):
    for layer in (0, 2):
        metrics = {"fvu": 0.1 + layer / 10}
        make_sae(clip, layer=layer, training_metrics=metrics).save_pretrained(tmp_path / f"layer_{layer}")
    card = create_model_card(tmp_path, name="ada/saes")
    assert "### layer_0" in card.text and "### layer_2" in card.text
    assert "| FVU | 0.1000 |" in card.text and "| FVU | 0.3000 |" in card.text
    assert 'subfolder="layer_2"' in card.text


def test_figures_of_another_sae_are_refused(folder, caplog):
    """A table under the wrong weights is worse than none."""
    other = make_result(sae={"num_latents": 384, "top_k": 16, "activation": "relu"})
    with pytest.raises(ValueError, match="measured with another SAE"):
        create_model_card(folder, results=other)
    other.to_json(folder / "results.json")
    with caplog.at_level(logging.WARNING, logger="hf_vs2"):
        card = create_model_card(folder)
    assert "left out" in caplog.text
    assert "came without a result file" in card.text
    make_result().to_json(folder / "results.json")
    assert "classes gain" in create_model_card(folder).text


def test_leaderboard_entry_only_for_a_benchmark_of_the_hub():
    assert ResultFacts(make_result()).leaderboard_entry is None
    assert ResultFacts(make_result(task_id="default", dataset={"id": "/data/pictures"})).leaderboard_entry is None
    facts = ResultFacts(make_result(task_id="default", date="2026-01-01T00:00:00Z"))
    (entry,) = parse_eval_result_entries(yaml.safe_load(facts.leaderboard_entry))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("someone/pictures", "default", 63.5)


def test_figures_stay_with_the_weights_that_they_are_of(hub, clip, sae):
    """Pushed again from Python, without the result file: the table stays while the weights do, and goes when they change."""
    sae.push_to_hub("ada/figures", results=make_result(task_id="default", checkpoint=os.path.abspath("sae")))
    repository = hub["ada/figures"]
    assert {"results.json", ".eval_results/hf_vs2.yaml"} <= set(repository.head.files)
    assert json.loads(repository.text("results.json"))["rows"] == make_result().rows
    assert os.path.abspath("sae") not in repository.text("results.json")  # where it was evaluated is nobody's business
    sae.push_to_hub("ada/figures")
    assert len(repository.history()) == 2
    sae.config.gamma = 1.25
    sae.push_to_hub("ada/figures")
    assert "classes gain" in repository.text("README.md") and "gamma 1.25" in repository.text("README.md")
    with torch.no_grad():
        sae.b_pre.add_(1)
    sae.push_to_hub("ada/figures")
    assert not {"results.json", ".eval_results/hf_vs2.yaml"} & set(repository.head.files)
    assert "classes gain" not in repository.text("README.md")


def test_code_runs_as_printed(hub, clip, sae, tmp_path, monkeypatch, capsys):
    """Someone copies each block from the page, beside a photo of theirs."""
    make_vs2(clip).push_to_hub("ada/card-vs2")
    sae.push_to_hub("ada/card-sae", results=make_result())
    sae.save_pretrained(tmp_path / "saes" / "layer_2")
    push_to_hub(tmp_path / "saes", "ada/card-saes")
    pixels = np.random.default_rng(0).integers(0, 255, (32, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    cards = {name: hub[name].text("README.md") for name in ("ada/card-vs2", "ada/card-sae", "ada/card-saes")}
    blocks = [
        (name, one) for name, text in cards.items() for one in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    ]
    assert len(blocks) == 6
    for name, block in blocks:
        exec(compile(block, name, "exec"), {})
    shown = capsys.readouterr().out
    assert shown.count("'predictions'") == 3 and shown.count("torch.Size([2, 8])") == 4


# What it leaves alone


def test_saving_again_keeps_a_card_that_was_edited(folder, sae):
    """Retraining into the same folder: the words stay, the metadata follow."""
    card = folder / "README.md"
    write_model_card(folder, license="mit")
    written = card.read_text()
    sae.save_pretrained(folder)
    assert card.read_text() == written  # nobody edited it, nothing has changed
    card.write_text(written.replace("# sae", "# My SAE of birds"))
    sae.config.base_model_name_or_path = "someone/else"
    sae.save_pretrained(folder)
    assert "# My SAE of birds" in card.read_text()
    assert "base_model: someone/else" in card.read_text()
    card.write_text("---\ntags: [unclosed\n---\nMine\n")
    sae.save_pretrained(folder)
    assert card.read_text() == "---\ntags: [unclosed\n---\nMine\n"


OURS = Card.parse("---\ntags:\n- hf_vs2\nbase_model: a/b\n---\n\n# Ours\n").signed("wrote").source
OURS_NEWER = Card.parse("---\ntags:\n- hf_vs2\nbase_model: a/c\n---\n\n# Ours, newer\n").signed("wrote").source
FOUND = {
    "none": None,
    "ours": OURS,
    "ours, text edited": OURS.replace("# Ours", "# Theirs"),
    "ours, text added below": OURS + "\nTheirs\n",
    "ours, metadata edited": OURS.replace("base_model: a/b", "base_model: a/b\nlanguage: en"),
    "a user's": "---\nlanguage: en\n---\n# Theirs\n",
    "a user's without metadata": "# Theirs\n",
    "a user's on Windows": "---\r\nlanguage: en\r\n---\r\n# Theirs\r\n",
    "a user's that we uploaded": Card.parse("---\nlanguage: en\n---\n# Theirs\n").signed("uploaded").source,
}


@pytest.mark.parametrize("remote", FOUND)
@pytest.mark.parametrize("local", FOUND)
def test_no_text_of_a_user_is_lost(local, remote):
    """Every meeting of a card in the folder with one on the Hub: a user's words survive, ours are renewed, and the second push
    finds nothing to do."""
    content, stands_back = card_to_upload(OURS_NEWER, FOUND[local], FOUND[remote])
    by_user = [name for name in (local, remote) if "Theirs" in (FOUND[name] or "")]
    assert ("Theirs" in content) == bool(by_user)
    assert ("# Ours, newer" in content) == (not by_user)
    assert Card.parse(content).data["base_model"] == "a/c"
    assert "hf_vs2" in Card.parse(content).data["tags"]
    sources = (
        [local] if remote == "a user's that we uploaded" and "Theirs" in (FOUND[local] or "") else [local, remote]
    )
    if any(
        "language: en" in (FOUND[name] or "") for name in sources
    ):  # a newer card of the user's replaces their own older one
        assert Card.parse(content).data["language"] == "en"
    if FOUND[remote] and "Theirs" not in FOUND[remote]:
        assert not stands_back
    assert card_to_upload(OURS_NEWER, FOUND[local], content)[0] == content


def test_metadata_are_merged():
    """Lists are united, a user's choices stay, figures measured anew replace the old ones and other figures stay."""

    def index(value, metric="Top-1"):
        result = {"task": {"type": "t"}, "dataset": {"name": "d", "type": "d"}}
        return {**result, "metrics": [{"type": "accuracy", "name": metric, "value": value}]}

    theirs = {
        "license": "mit",
        "tags": ["birds", "clip"],
        "datasets": "one/set",
        "model-index": [{"name": "mine", "results": [index(0.5), index(0.9, "Top-5")]}],
    }
    ours = {
        "license": "apache-2.0",
        "tags": ["hf_vs2", "clip"],
        "base_model": "a/b",
        "datasets": ["two/set"],
        "model-index": [{"name": "ours", "results": [index(0.6)]}],
    }
    merged = merge_metadata(ours, theirs)
    assert (merged["license"], merged["tags"]) == ("mit", ["birds", "clip", "hf_vs2"])
    assert (merged["base_model"], merged["datasets"]) == ("a/b", "one/set")
    (model,) = merged["model-index"]
    values = {metric["name"]: metric["value"] for result in model["results"] for metric in result["metrics"]}
    assert (model["name"], values) == ("mine", {"Top-1": 0.6, "Top-5": 0.9})
    assert merge_metadata(ours, merged) == merged
    nonsense = merge_metadata(ours, {"model-index": "soon"})
    assert nonsense["model-index"] == "soon"
