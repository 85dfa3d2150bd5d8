"""Sharing over the Hub's own protocol: the real client against a Hub on this machine, faults included."""

import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hub_models import CLIP_FILES, CLIP_ID, LABELS, make_sae, make_vs2, sum_of, upload_clip
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from trainings import assert_same_weights
from transformers import AutoModel, CLIPModel, pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import hf_vs2
from hf_vs2 import SAEModel, VS2CLIPForZeroShot, push_to_hub
from hf_vs2.cli import main
from hf_vs2.encoders.base_model import loaded_revision
from hf_vs2.version import INSTALLATION


SAE_FILES = {".gitattributes", "README.md", "config.json", "hf_vs2_shim.py", "model.safetensors"}
PROCESSING_FILES = {"preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def clip():
    return upload_clip(CLIP_ID)


@pytest.fixture()
def pixels():
    return torch.from_numpy(np.random.default_rng(0).normal(size=(4, 3, 28, 28)).astype(np.float32))


@torch.no_grad()
def features(model, pixels):
    return model.get_image_features(pixel_values=pixels).pooler_output


def run_python(code, **environment):
    """What a fresh process prints; it talks to the same Hub."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


LOAD_AND_SUM = """
import os
import hf_vs2

model = hf_vs2.VS2CLIPForZeroShot.from_pretrained(os.environ["CHECKPOINT"])
print(sum(tensor.double().sum() for tensor in model.state_dict().values()).item())
"""


def output_of(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


# There and back


def test_sae_comes_back_as_it_was(hub, clip, pixels):
    sae = make_sae(clip)
    commit = sae.push_to_hub("ada/sae")
    repository = hub["ada/sae"]
    assert str(commit) == f"{hub.url}/ada/sae/commit/{repository.head.sha}"
    assert set(repository.head.files) == SAE_FILES
    assert repository.head.files["model.safetensors"].is_lfs
    for loaded in (SAEModel.from_pretrained("ada/sae"), AutoModel.from_pretrained("ada/sae")):
        assert_same_weights(loaded, sae)
        assert loaded.config.fvu_quantiles == sae.config.fvu_quantiles
    model = VS2CLIPForZeroShot.from_pretrained("ada/sae")
    assert torch.equal(features(model, pixels), features(make_vs2(clip), pixels))


def test_one_light_id_is_all_that_pipeline_needs(hub, clip):
    """The repository holds no CLIP weights, and yet the stock pipeline finds model, tokenizer, image processor and task."""
    model = make_vs2(clip)
    model.push_to_hub("ada/vs2")
    files = hub["ada/vs2"].head.files
    assert set(files) >= SAE_FILES | PROCESSING_FILES
    assert len(files["model.safetensors"].content) < len((CLIP_FILES / "model.safetensors").read_bytes())
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    answers = [
        pipeline(model="ada/vs2")(image, candidate_labels=LABELS),
        pipeline("zero-shot-image-classification", model="ada/vs2")(image, candidate_labels=LABELS),
        hf_vs2.zero_shot_classifier("ada/vs2")(image, candidate_labels=LABELS),
        hf_vs2.zero_shot_classifier(model)(image, candidate_labels=LABELS),
    ]
    for answer in answers[1:]:
        assert [one["label"] for one in answer] == [one["label"] for one in answers[0]]
        assert np.allclose([one["score"] for one in answer], [one["score"] for one in answers[0]], atol=1e-6)


def test_full_checkpoint_needs_no_other_repository(hub, clip, pixels):
    model = make_vs2(clip)
    model.push_to_hub("ada/vs2-full", full=True)
    with hub.recording() as requests:
        loaded = VS2CLIPForZeroShot.from_pretrained("ada/vs2-full")
    assert not any(CLIP_ID in path for _, path, _ in requests)
    assert torch.equal(features(loaded, pixels), features(model, pixels))


def test_folder_of_saes_is_one_repository(hub, clip, tmp_path):
    """One call, one commit; each SAE loads by its subfolder, and the training state beside them stays at home."""
    saes = {f"layer_{layer}": make_sae(clip, seed=layer, layer=layer) for layer in (0, 2)}
    for name, sae in saes.items():
        sae.save_pretrained(tmp_path / name)
        (tmp_path / name / "checkpoint-500").mkdir()
        (tmp_path / name / "checkpoint-500" / "optimizer.bin").write_bytes(b"state")
        (tmp_path / name / "training_log.json").write_text(json.dumps({"args": {"output_dir": str(tmp_path)}}))
    push_to_hub(tmp_path, "ada/saes")
    repository = hub["ada/saes"]
    assert len(repository.history()) == 2
    expected = {f"{name}/{file}" for name in saes for file in ("config.json", "model.safetensors")}
    assert set(repository.head.files) == expected | {".gitattributes", "README.md", "hf_vs2_shim.py"}
    for name, sae in saes.items():
        assert_same_weights(SAEModel.from_pretrained("ada/saes", subfolder=name), sae)
        assert_same_weights(AutoModel.from_pretrained("ada/saes", subfolder=name), sae)
        model = VS2CLIPForZeroShot.from_pretrained("ada/saes", subfolder=name)
        assert list(model.fvu_thresholds) == [sae.config.layer]


def test_old_revision_gives_old_weights_and_the_clip_of_its_time(hub, clip, pixels):
    """The commit of the CLIP is on record: whoever changes that CLIP later does not change what the SAE was made for."""
    old, new = make_vs2(clip), make_sae(clip, seed=1)
    first = old.push_to_hub("ada/moving")
    VS2CLIPForZeroShot(clip, new, gate=0.99).push_to_hub("ada/moving", tag="v2")
    original = hub[CLIP_ID].head
    hub[CLIP_ID].branches["main"] = hub[CLIP_ID].add(
        {"config.json": original.files["config.json"]}, "broken", original.sha
    )
    try:
        loaded = VS2CLIPForZeroShot.from_pretrained("ada/moving", revision=first.oid, force_download=True)
        assert torch.equal(features(loaded, pixels), features(old, pixels))
        newer = VS2CLIPForZeroShot.from_pretrained("ada/moving", revision="v2")
        assert_same_weights(newer.sae, new)
    finally:
        hub[CLIP_ID].branches["main"] = original.sha


def test_commit_of_the_clip_is_on_record_however_it_was_loaded(hub, clip, pixels):
    """transformers has forgotten it since 5.18. By branch, by tag, by commit, through our classes: the record is the commit."""
    api, repository = HfApi(), hub[CLIP_ID]
    first = repository.head.sha
    api.create_tag(CLIP_ID, tag="first")
    other = CLIPModel.from_pretrained(CLIP_ID)
    with torch.no_grad():
        other.vision_model.post_layernorm.weight.mul_(1.1)
    try:
        second = other.push_to_hub(CLIP_ID).oid
        for revision, commit in (("main", second), ("first", first), (first, first)):
            loaded = CLIPModel.from_pretrained(CLIP_ID, revision=revision)
            assert loaded_revision(loaded) == commit
            assert VS2CLIPForZeroShot(loaded, make_sae(loaded)).config.base_model_revision == commit
        make_vs2(clip).push_to_hub("ada/recorded")
        again = VS2CLIPForZeroShot.from_pretrained("ada/recorded")
        assert again.config.base_model_revision == first
        assert torch.equal(features(again, pixels), features(make_vs2(clip), pixels))
    finally:
        repository.branches["main"] = first


def test_save_pretrained_can_push(hub, clip, tmp_path):
    """transformers' `save_pretrained(push_to_hub=True)` must push what ours pushes, tokenizer and card included."""
    make_vs2(clip).save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="lab/vs2", token=hub.org, private=True)
    assert hub["lab/vs2"].private
    assert set(hub["lab/vs2"].head.files) >= SAE_FILES | PROCESSING_FILES
    assert "hf_vs2" in hub["lab/vs2"].text("README.md")


# Pushing again


@pytest.mark.parametrize("kind", ["sae", "vs2", "folder"])
def test_same_push_makes_no_commit(hub, clip, tmp_path, kind):
    """A script that is run twice must not fill the history."""
    what = {"sae": make_sae(clip), "vs2": make_vs2(clip), "folder": tmp_path}[kind]
    make_sae(clip).save_pretrained(tmp_path / "a")
    options = {"private": True, "tag": "v1", "license": "mit"}
    first = push_to_hub(what, f"ada/same-{kind}", **options)
    again = push_to_hub(what, f"ada/same-{kind}", **options)
    assert again.oid == first.oid
    assert again.commit_url == first.commit_url
    assert len(hub[f"ada/same-{kind}"].history()) == 2
    push_to_hub(what, f"ada/same-{kind}")  # what was said once, the licence say, need not be said again
    assert len(hub[f"ada/same-{kind}"].history()) == 2
    assert "license: mit" in hub[f"ada/same-{kind}"].text("README.md")


def test_card_edited_on_the_hub_keeps_its_text(hub, clip):
    """Someone wrote a card in the browser: their words stay, whatever is pushed after, and the metadata are completed."""
    sae = make_sae(clip, training_data={"id": "someone/pictures", "num_rows": 10})
    sae.push_to_hub("ada/edited")
    text = "\r\n# My own words\r\n\r\nDo not lose them.\r\n"
    hub["ada/edited"].edit("README.md", f"---\r\nlicense: mit\r\ntags:\r\n- birds\r\n---\r\n{text}")
    sae.push_to_hub("ada/edited", license="apache-2.0")
    card = hub["ada/edited"].text("README.md")
    assert card.endswith(text)
    for expected in ("license: mit", "- birds", "- hf_vs2", f"base_model: {CLIP_ID}", "- someone/pictures"):
        assert expected in card
    commits = len(hub["ada/edited"].history())
    sae.push_to_hub("ada/edited")
    assert len(hub["ada/edited"].history()) == commits
    make_sae(clip, seed=1, gamma=1.25).push_to_hub("ada/edited")
    assert hub["ada/edited"].text("README.md") == card


def test_edit_made_while_we_push_is_not_lost(hub, clip, monkeypatch):
    """Between reading the card and committing, somebody saves another: the push starts over with theirs."""
    sae = make_sae(clip)
    sae.push_to_hub("ada/race")
    create_commit = HfApi.create_commit

    def edit_first(self, repo_id, **options):
        monkeypatch.undo()
        hub[repo_id].edit("README.md", "# Written in that very moment\n")
        return create_commit(self, repo_id, **options)

    monkeypatch.setattr(HfApi, "create_commit", edit_first)
    make_sae(clip, seed=1).push_to_hub("ada/race")
    assert hub["ada/race"].text("README.md").endswith("# Written in that very moment\n")
    assert_same_weights(SAEModel.from_pretrained("ada/race"), make_sae(clip, seed=1))


def test_card_written_in_the_folder_goes_up(hub, clip, tmp_path, caplog):
    """A user edits the card in the folder, again and again; only one that was edited on the Hub stands in its way."""
    make_sae(clip).save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    for number in range(2):
        card.write_text(card.read_text() + f"\nMy remark {number}.\n")
        push_to_hub(tmp_path, "ada/local")
        assert f"My remark {number}." in hub["ada/local"].text("README.md")
    make_sae(clip, seed=1).push_to_hub("ada/local")  # a model has no card of its own: the one that was uploaded stays
    assert "My remark 1." in hub["ada/local"].text("README.md")
    hub["ada/local"].edit("README.md", "# From the browser\n")
    card.write_text("# From the folder\n")
    with caplog.at_level(logging.WARNING, logger="hf_vs2"):
        push_to_hub(tmp_path, "ada/local")
    assert "hf upload ada/local" in caplog.text
    assert hub["ada/local"].text("README.md").endswith("# From the browser\n")


def test_interrupted_push_goes_on_where_it_stopped(hub, clip):
    """The weights have arrived, the commit has not: the second push does not send them again."""
    sae = make_sae(clip, seed=7)
    hub.fail("POST .*/commit/main", status=400)
    with pytest.raises(HfHubHTTPError):
        sae.push_to_hub("ada/interrupted")
    with hub.recording() as requests:
        sae.push_to_hub("ada/interrupted")
    assert not any(method == "PUT" for method, _, _ in requests)
    assert_same_weights(SAEModel.from_pretrained("ada/interrupted"), sae)


# Branches, pull requests, tags


def test_branch_tag_and_pull_request(hub, clip):
    """`main` stays as it is until somebody merges; each proposal can be loaded by its revision."""
    main = make_sae(clip)
    main.push_to_hub("ada/refs", tag="v1")
    branch = make_sae(clip, seed=1).push_to_hub("ada/refs", revision="experiment")
    proposal = make_sae(clip, seed=2).push_to_hub("ada/refs", create_pr=True, token=hub.other, commit_message="Better")
    repository = hub["ada/refs"]
    assert repository.tags["v1"] == repository.branches["main"] != branch.oid == repository.branches["experiment"]
    assert proposal.pr_url == f"{hub.url}/ada/refs/discussions/{proposal.pr_num}"
    assert repository.history(proposal.pr_revision)[0].title == "Better"
    again = make_sae(clip, seed=2).push_to_hub("ada/refs", create_pr=True, token=hub.other, commit_message="Better")
    assert again.pr_url == proposal.pr_url and again.oid == proposal.oid and len(repository.pull_requests) == 1
    assert_same_weights(SAEModel.from_pretrained("ada/refs"), main)
    assert_same_weights(SAEModel.from_pretrained("ada/refs", revision="experiment"), make_sae(clip, seed=1))
    make_sae(clip, seed=3).push_to_hub("ada/refs", revision=proposal.pr_revision)
    repository.merge(proposal.pr_num)
    assert_same_weights(SAEModel.from_pretrained("ada/refs", force_download=True), make_sae(clip, seed=3))


REFUSED = {
    "moved tag": ({"tag": "v1"}, "already marks commit .* Nothing was uploaded"),
    "tag for a branch": ({"revision": "v1"}, "revision='v1' is a tag"),
    "proposed tag": ({"tag": "v2", "create_pr": True}, "create_pr=True"),
    "proposed branch": ({"revision": "dev", "create_pr": True}, "create_pr=True"),
    "public": ({"private": True}, "exists and is public"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_push_that_would_mean_something_else_is_refused(hub, clip, case):
    """Who asks for v1 a year from now gets what v1 was, and private=True never ends in a public repository: said before
    anything is uploaded."""
    (options, message), name = REFUSED[case], f"ada/{case.replace(' ', '-')}"
    make_sae(clip).push_to_hub(name, tag="v1")
    make_sae(clip, seed=1).push_to_hub(name)
    before = hub[name].history(), dict(hub[name].branches), dict(hub[name].pull_requests)
    with pytest.raises(ValueError, match=message):
        make_sae(clip, seed=2).push_to_hub(name, **options)
    assert (hub[name].history(), hub[name].branches, hub[name].pull_requests) == before


# Who may


def test_private_stays_private(hub, tmp_path):
    """Only the owner reads it, with the CLIP private too."""
    model = make_vs2(upload_clip("ada/private-clip", private=True))
    model.push_to_hub("ada/private", private=True)
    for token in (False, hub.other):
        with pytest.raises(OSError, match="ada/private"):
            VS2CLIPForZeroShot.from_pretrained("ada/private", token=token, cache_dir=tmp_path)
    loaded = VS2CLIPForZeroShot.from_pretrained("ada/private", token=hub.read)
    assert_same_weights(loaded, model)


@pytest.mark.parametrize("token, status", [(False, 401), ("hf_nonsense", 401), ("hf_read", 403), ("hf_other", 403)])
def test_refused_push_says_what_to_do(hub, clip, token, status):
    with pytest.raises(HfHubHTTPError, match="hf auth login") as caught:
        make_sae(clip).push_to_hub("ada/forbidden", token=token)
    assert caught.value.response.status_code == status
    assert "ada/forbidden" not in hub.repositories


def test_what_is_missing_is_named(hub, clip):
    make_sae(clip).push_to_hub("ada/there")
    with pytest.raises(OSError, match="ada/missing"):
        VS2CLIPForZeroShot.from_pretrained("ada/missing")
    with pytest.raises(OSError, match="v9"):
        VS2CLIPForZeroShot.from_pretrained("ada/there", revision="v9")
    with pytest.raises(OSError, match="layer_5"):
        VS2CLIPForZeroShot.from_pretrained("ada/there", subfolder="layer_5")
    with pytest.raises(HfHubHTTPError, match="bob/nothing"):
        make_sae(clip).push_to_hub("bob/nothing", create_pr=True)


def test_gated_clip_is_named(hub, tmp_path):
    """The checkpoint is open, but its CLIP asks for consent: the error must name the CLIP, not the checkpoint."""
    make_vs2(upload_clip("ada/gated-clip")).push_to_hub("ada/on-gated")
    hub["ada/gated-clip"].gated = True
    with pytest.raises(OSError, match="ada/gated-clip"):
        VS2CLIPForZeroShot.from_pretrained("ada/on-gated", token=hub.other, cache_dir=tmp_path)


# A bad network


@pytest.mark.parametrize("status", [500, 503])
@pytest.mark.parametrize("request_", ["PUT /uploads", "POST .*/commit/main"])
def test_push_survives_a_failing_server(hub, clip, status, request_):
    name = f"ada/flaky-{status}-{len(request_)}"
    hub.fail(request_, status=status)
    sae = make_sae(clip, seed=status + len(request_))
    sae.push_to_hub(name)
    assert len(hub[name].history()) == 2
    assert_same_weights(SAEModel.from_pretrained(name), sae)


def test_server_gone_but_cache_warm(hub, clip, tmp_path, pixels):
    """On the train: what was loaded once loads again, from one id, without the network; what was not says so."""
    make_vs2(clip).push_to_hub("ada/offline")
    warm = pipeline(
        "zero-shot-image-classification", model="ada/offline", model_kwargs={"cache_dir": tmp_path / "hub"}
    )
    image = Image.new("RGB", (40, 40))
    embedded = VS2CLIPForZeroShot.from_pretrained("ada/offline", cache_dir=tmp_path / "hub").encode_images(image)
    with hub.recording() as requests:
        offline = output_of(
            run_python(LOAD_AND_SUM, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1", CHECKPOINT="ada/offline")
        )
        cached = VS2CLIPForZeroShot.from_pretrained("ada/offline", cache_dir=tmp_path / "hub", local_files_only=True)
        assert (cached.encode_images(image) == embedded).all(), "by the image processor in that cache"
        with pytest.raises(OSError, match="ada/offline is no folder here, .* not in the cache"):
            VS2CLIPForZeroShot.from_pretrained("ada/offline", cache_dir=tmp_path / "empty", local_files_only=True)
    assert float(offline) == sum_of(warm.model)
    assert not requests


# Without the package


WITHOUT_PACKAGE = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name == "hf_vs2":
            raise ModuleNotFoundError("No module named 'hf_vs2'", name="hf_vs2")

sys.meta_path.insert(0, NotInstalled())
from transformers import AutoModel, pipeline

def run_pipeline(name, **options):
    return pipeline("zero-shot-image-classification", model=name, **options)

for load in (AutoModel.from_pretrained, run_pipeline):
    for trust in (True, False):
        try:
            load("ada/shim", trust_remote_code=trust)
        except (ImportError, ValueError) as error:
            print(type(error).__name__, " ".join(str(error).split()))
"""


def test_trust_remote_code_tells_what_to_install(hub, clip):
    """Someone without hf_vs2 follows transformers' advice to trust the repository, and reads what to install."""
    make_vs2(clip).push_to_hub("ada/shim")
    told = output_of(run_python(WITHOUT_PACKAGE)).splitlines()
    assert len(told) == 4
    assert all(INSTALLATION in line and line.startswith("ImportError") for line in told[::2])
    assert all("trust_remote_code=True" in line for line in told[1::2])


def test_trusting_with_the_package_installed_changes_nothing(hub, clip, tmp_path):
    """The classes that the shim leads to are the package's own, and nothing saved later carries a copy of their code. (By
    itself transformers copies the sources of whatever it has found through a repository.)"""
    make_vs2(clip).push_to_hub("ada/shim-installed")
    for name, ours in (("VS2CLIPForZeroShot", VS2CLIPForZeroShot), ("VS2CLIPConfig", hf_vs2.VS2CLIPConfig)):
        found = get_class_from_dynamic_module(f"hf_vs2_shim.{name}", "ada/shim-installed")
        assert found is ours
        found.register_for_auto_class()  # as the Auto classes do with trust_remote_code=True
    model = AutoModel.from_pretrained("ada/shim-installed", trust_remote_code=True)
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.py")] == ["hf_vs2_shim.py"]


# The command line


def test_push_command_prints_where_to_look(hub, clip, tmp_path, capsys):
    make_sae(clip).save_pretrained(tmp_path)
    command = ["push", str(tmp_path), "ada/cli"]
    assert main([*command, "--private", "--tag", "v1", "--license", "mit", "--commit_message", "First"]) == 0
    repository = hub["ada/cli"]
    assert capsys.readouterr().out.split() == [f"{hub.url}/ada/cli/commit/{repository.head.sha}"]
    assert repository.private and repository.tags["v1"] == repository.head.sha and repository.head.title == "First"
    make_sae(clip, seed=1).save_pretrained(tmp_path)
    assert main([*command, "--create_pr"]) == 0
    assert f"{hub.url}/ada/cli/discussions/" in capsys.readouterr().out
    assert main([*command, "--revision", "new", "--token", hub.read]) == 2
    assert "hf auth login" in capsys.readouterr().err
    assert main(["push", str(tmp_path / "absent"), "ada/cli"]) == 2
    assert "there is no such folder" in capsys.readouterr().err


# Bad input


def test_unreachable_hub_is_named(clip, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="127.0.0.1:9 could not be reached"):
        make_sae(clip).push_to_hub("ada/unreachable")


def test_what_is_no_checkpoint_is_refused_before_anything_is_made(hub, clip, tmp_path):
    make_sae(clip).save_pretrained(tmp_path / "half")
    (tmp_path / "half" / "model.safetensors").unlink()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "empty").mkdir()
    cases = [
        (tmp_path / "half", ValueError, "no model.safetensors"),
        (tmp_path / "other", ValueError, "'bert'"),
        (tmp_path / "empty", ValueError, "holds no checkpoint"),
        (tmp_path / "absent", OSError, "no such folder"),
        (clip, TypeError, "not CLIPModel"),
    ]
    for what, error, message in cases:
        with pytest.raises(error, match=message):
            push_to_hub(what, "ada/nothing")
    assert "ada/nothing" not in hub.repositories


def test_paths_of_this_machine_are_announced(hub, tmp_path, caplog):
    """A CLIP that was loaded from a folder: nobody else has that folder."""
    clip = CLIPModel.from_pretrained(CLIP_FILES)
    with caplog.at_level(logging.WARNING, logger="hf_vs2"):
        make_sae(clip).push_to_hub("ada/paths")
    assert str(CLIP_FILES) in caplog.text and "clip=" in caplog.text
    assert str(CLIP_FILES) not in hub["ada/paths"].text("README.md")
