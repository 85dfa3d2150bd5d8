"""Loading under load, from a branch that moves, and from a server that means harm."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hub_models import CLIP_ID, make_sae, make_vs2, serve, sum_of, upload_clip
from loopback_hub import File, LoopbackHub

import hf_vs2
from hf_vs2 import SAEModel, VS2CLIPForZeroShot


HUGE = 2**50


class Huge(bytes):
    """A few bytes that the server declares to be a petabyte."""

    def __len__(self) -> int:
        return HUGE


@pytest.fixture(scope="module")
def clip():
    return upload_clip(CLIP_ID)


def outside(folder: Path, cache: Path) -> list[Path]:
    """What lies in `folder` beside the cache."""
    return [path for path in folder.rglob("*") if path not in (cache, *cache.parents) and cache not in path.parents]


# Many at once


def test_many_threads_load_into_one_cold_cache(hub, clip, tmp_path):
    """A server that starts its workers together: each gets the whole model, though downloads break off."""
    model = make_vs2(clip)
    model.push_to_hub("ada/crowd")
    hub.cut("GET /lfs/.*/model.safetensors", after=3000, times=2)
    start = threading.Barrier(8)

    def load(_: int) -> float:
        start.wait()
        return sum_of(VS2CLIPForZeroShot.from_pretrained("ada/crowd", cache_dir=tmp_path))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(load, range(8))) == [sum_of(model)] * 8


LOAD_IN_THREADS = """
import os
from concurrent.futures import ThreadPoolExecutor
import hf_vs2

def load(_):
    model = hf_vs2.VS2CLIPForZeroShot.from_pretrained("ada/crowd-50")
    return sum(tensor.double().sum() for tensor in model.state_dict().values()).item()

with ThreadPoolExecutor(10) as pool:
    print(*pool.map(load, range(10)))
"""


@pytest.mark.slow
def test_fifty_loads_in_five_processes(hub, clip, tmp_path):
    """The same with five processes of ten threads, one cache between them."""
    model = make_vs2(clip)
    model.push_to_hub("ada/crowd-50")
    hub.cut("GET /lfs/.*/model.safetensors", after=3000, times=3)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", LOAD_IN_THREADS]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(command, env=environment, **pipes) for _ in range(5)]
    for worker in workers:
        out, err = worker.communicate(timeout=300)
        assert worker.returncode == 0, err
        assert [float(one) for one in out.split()] == [sum_of(model)] * 10


# A branch that moves


@contextmanager
def moving(hub: LoopbackHub, name: str, to: str, after: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """`main` stands at another commit from request number `after` for a file on. Yields those that came."""
    seen: list[str] = []
    take_fault = hub.take_fault

    def move(request: str, wants: str):
        # Also between a HEAD and its GET, where the client itself does not notice: it files the new content under the old commit.
        if wants == "status" and name in request:
            if len(seen) == after:
                hub[name].branches["main"] = to
            seen.append(request)
        return take_fault(request, wants)

    with monkeypatch.context() as patch:
        patch.setattr(hub, "take_fault", move)
        yield seen


# A file that is taken from the branch shows when the branch has moved early, one that is asked for twice only between the two.
FEW_MOMENTS = (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 99)


@pytest.mark.parametrize(
    "moments", [FEW_MOMENTS, pytest.param(range(100), marks=pytest.mark.slow)], ids=["few", "all"]
)
@pytest.mark.parametrize("kind", ["sae", "vs2", "pipeline", "sparsify"])
def test_a_load_is_of_one_commit(hub, clip, tmp_path, monkeypatch, kind, moments):
    """Somebody pushes while we download, between any two of our files: settings of one commit with weights or an image processor
    of another would give wrong numbers without a word."""
    name = f"ada/moving-{kind}-{len(moments)}"
    commits = {}
    for seed, gamma in enumerate((1.25, 1.75)):
        sae = make_sae(clip, seed=seed, gamma=gamma)
        if kind == "sparsify":
            sae.save_sparsify(tmp_path / f"{seed}")
            files = {path.name: File(path.read_bytes(), False) for path in (tmp_path / f"{seed}").iterdir()}
            if not seed:
                serve(hub, name, files)
            commit = hub[name].add(files, "another", None)
        else:
            commit = (sae if kind == "sae" else VS2CLIPForZeroShot(clip, sae, gamma=gamma)).push_to_hub(name).oid
        if kind == "pipeline":
            hub[name].edit("preprocessor_config.json", processor_with_mean(hub, name, seed))
            commit = hub[name].head.sha
        commits[commit] = (gamma, sae.W_enc, seed)
    first, second = commits
    load = {
        "sae": SAEModel.from_pretrained,
        "vs2": VS2CLIPForZeroShot.from_pretrained,
        "pipeline": hf_vs2.zero_shot_classifier,
        "sparsify": SAEModel.from_sparsify,
    }[kind]
    for after in moments:
        hub[name].branches["main"] = first
        with moving(hub, name, second, after, monkeypatch) as seen:
            loaded = load(name, cache_dir=tmp_path / str(after))
        model = loaded.model if kind == "pipeline" else loaded
        gamma, weights, seed = commits[second if after == 0 else first]
        assert torch.equal((model if kind in ("sae", "sparsify") else model.sae).W_enc, weights)
        if kind == "sparsify":  # whose files know no gamma
            assert model.config.training_data["converted_from"]["revision"] == (second if after == 0 else first)
        else:
            assert model.config.gamma == gamma, f"moved before {seen[after]}"
        assert kind != "pipeline" or loaded.image_processor.image_mean[0] == seed
        if len(seen) <= after:
            break
    assert after > 1


def test_a_warm_load_asks_once_and_needs_no_answer(hub, clip, tmp_path):
    """A commit found by one short request: not one for each file, and where it fails (a train, a failing Hub), the commit last seen."""
    first, second = make_sae(clip, seed=0), make_sae(clip, seed=1)
    first.push_to_hub("ada/warm")

    def load(**options) -> torch.Tensor:
        return SAEModel.from_pretrained("ada/warm", cache_dir=tmp_path, **options).W_enc

    assert torch.equal(load(), first.W_enc)
    with hub.recording() as requests:
        assert torch.equal(load(), first.W_enc)
    assert [method for method, *_ in requests] == ["HEAD"]
    second.push_to_hub("ada/warm")
    assert torch.equal(load(local_files_only=True), first.W_enc)
    hub.fail("HEAD /ada/warm", status=503)
    assert torch.equal(load(), first.W_enc)
    assert torch.equal(load(), second.W_enc)
    with hub.recording() as requests:
        assert torch.equal(load(local_files_only=True), second.W_enc)
        assert torch.equal(load(revision=hub["ada/warm"].head.sha), second.W_enc)
    assert not requests


def processor_with_mean(hub: LoopbackHub, name: str, mean: float) -> str:
    return json.dumps(json.loads(hub[name].text("preprocessor_config.json")) | {"image_mean": [float(mean)] * 3})


# A server that means harm


def hostile_index(where: str) -> dict[str, File]:
    index = {"metadata": {}, "weight_map": {"W_enc": where}}
    return {"model.safetensors.index.json": File(json.dumps(index).encode(), False)}


@pytest.mark.parametrize("kind", ["relative", "absolute", "commit", "symlink"])
def test_nothing_is_written_outside_the_cache(hub, clip, tmp_path, kind):
    """Names that climb out of the folder would put a stranger's file among the user's own."""
    make_sae(clip).push_to_hub("ada/harmless")
    files = dict(hub["ada/harmless"].head.files)
    weights = files["model.safetensors"]
    sha = None
    if kind == "commit":
        sha = "../../../../climbed"
    elif kind == "symlink":  # as git stores one, and as the Hub serves it: the place it leads to
        files["model.safetensors"] = File(b"../../../../climbed.safetensors", False)
    else:
        del files["model.safetensors"]
        where = "../../../../climbed.safetensors" if kind == "relative" else str(tmp_path / "climbed.safetensors")
        files |= hostile_index(where) | {where: weights}
    serve(hub, f"ada/climbs-{kind}", files, sha)
    cache = tmp_path / "home" / "cache"
    cache.mkdir(parents=True)
    with pytest.raises((OSError, ValueError), match="climbed|damaged"):
        SAEModel.from_pretrained(f"ada/climbs-{kind}", cache_dir=cache)
    assert not outside(tmp_path, cache)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_petabyte_is_refused_at_once(hub, clip, tmp_path, name):
    """A declared size must not fill the disk, nor keep the program waiting."""
    make_sae(clip).push_to_hub("ada/modest")
    files = dict(hub["ada/modest"].head.files)
    files[name] = File(Huge(files[name].content), False)
    serve(hub, f"ada/huge-{name}", files)
    with pytest.warns(UserWarning, match="Not enough free disk space"), pytest.raises(OSError):
        SAEModel.from_pretrained(f"ada/huge-{name}", cache_dir=tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 10**5


ANSWER_YES = """
import sys
import hf_vs2
from hf_vs2.cli import main
from hf_vs2.retrieval import embed_images
from hf_vs2.processing import load_processing
from hf_vs2.vision_tower import VisionTower

*names, folder = sys.argv[1:]
for load in (
    hf_vs2.VS2CLIPForZeroShot.from_pretrained,
    hf_vs2.SAEModel.from_pretrained,
    hf_vs2.zero_shot_classifier,
    load_processing,
    VisionTower.of,
    lambda name: embed_images(name, []),
    lambda name: main(["train", "--model", name, "--dataset", folder, "--output_dir", folder + "/out"]),
):
    for name in names:
        try:
            load(name)
        except Exception as error:
            print(type(error).__name__, " ".join(str(error).split())[:200])
"""


def test_code_of_a_repository_never_runs(hub, clip, tmp_path):
    """Not even for someone whose terminal answers yes to all questions (`yes | hf-vs2 ...`): we do not ask."""
    make_vs2(clip).push_to_hub("ada/tame")
    files = dict(hub["ada/tame"].head.files)
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n".encode()
    files |= {"hf_vs2_shim.py": File(code, False), "stranger.py": File(code, False)}
    serve(hub, "ada/wild-vs2", files)
    parts = {"AutoConfig": "Config", "AutoModel": "Model", "AutoImageProcessor": "Processor"}
    asks = {"auto_map": {auto: f"stranger.{name}" for auto, name in parts.items()}}
    strange = {
        "config.json": {"model_type": "stranger"},
        "preprocessor_config.json": {"image_processor_type": "Processor"},
    }
    files |= {name: File(json.dumps(content | asks).encode(), False) for name, content in strange.items()}
    serve(hub, "ada/wild-stranger", files)
    ran = subprocess.run(
        [sys.executable, "-c", ANSWER_YES, "ada/wild-vs2", "ada/wild-stranger", str(tmp_path)],
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        input="y\n" * 100,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert not (tmp_path / "ran").exists(), ran.stdout
    assert "Do you wish to run" not in ran.stdout
