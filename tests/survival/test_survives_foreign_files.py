"""Files of strangers and of bad disks: used whole, or refused in one message, never run, never believed half."""

import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from artefacts import ARTEFACTS, Numbers, bounded_memory
from harms import Code, by_a_bad_disk, config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import make_rows
from transformers import AutoModel
from transformers.utils import logging

from hf_vs2 import SAEModel, VS2CLIPForZeroShot
from hf_vs2.data.stores.activations import ActivationStore


TRIES, MANY_TRIES, EXAMPLES = 20, 600, 8
"""Mutations of each artefact, in the fast test and in the slow one, and changes of its configuration."""
SECONDS = 20
"""Of the processor, so that a busy machine fails nothing."""


# Kinds of files that other tests here damage by name too.
KINDS = ("SAE", "corpus", "light", "full", "store", "results")
IGNORED = ("README.md",)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Hundreds of loads would print hundreds of bars."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def flat(numbers: Numbers) -> list[float]:
    return [float(value) for one in numbers if one is not None for value in torch.as_tensor(one).flatten().tolist()]


def outcome(kind: str, folder: Path, names: tuple[str, ...]) -> list[float] | str:
    """The numbers of an artefact, or the message that it was refused with. Fails on any other end."""
    started = time.process_time()
    try:
        with bounded_memory():
            numbers = flat(ARTEFACTS[kind].read(folder / "out"))
    except (ValueError, OSError) as error:
        message = str(error)
        assert str(folder) in message or any(name in message for name in names), f"names nothing: {message}"
        assert type(error) in (ValueError, OSError, FileNotFoundError) or type(error).__module__.startswith(
            "hf_vs2"
        ), f"{type(error)}: {message}"
        return message
    finally:
        assert time.process_time() - started < SECONDS
    assert all(math.isfinite(value) for value in numbers), "NaN or infinity came out"
    return numbers


# Random damage


def mutate(folder: Path, dice: random.Random) -> tuple[str, Path]:
    """Damages one file: which harm, and where."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    # Cards are read by nobody here: a few tries will do to show that.
    files = [path for path in files if path.name not in IGNORED or dice.random() < 0.1] or files
    path = dice.choice(files)
    content = path.read_bytes()
    end = len(content) if dice.random() < 0.5 else min(len(content), 3000)  # where the headers are
    harm, damaged = by_a_bad_disk(content, dice, dice.randrange(end))
    path.write_bytes(damaged)
    return harm, path


def survive(kind: str, source: Path, scratch: Path, tries: int, seed: int) -> dict[str, int]:
    """Counts of the outcomes."""
    expected = outcome(kind, source, ())
    assert isinstance(expected, list)
    counts = {"refused": 0, "same numbers": 0, "other finite numbers": 0}
    for number in range(tries):
        dice = random.Random(seed * 1_000_003 + number)
        folder = scratch / "damaged"
        shutil.copytree(source, folder)
        harm, path = mutate(folder, dice)
        try:
            found = outcome(kind, folder, path.relative_to(folder).parts)
        except BaseException as error:
            raise AssertionError(
                f"try {number}: {harm} in {path.relative_to(folder)}: {type(error).__name__}: {error}"
            ) from error
        if isinstance(found, str):
            assert path.name not in IGNORED, f"{path.name} was read: {found}"
            counts["refused"] += 1
        else:
            ours = path.suffix == ".safetensors" and "clip" not in path.relative_to(folder).parts
            assert found == expected or not ours, f"try {number}: {harm} in {path.name} changed numbers in silence"
            counts["same numbers" if found == expected else "other finite numbers"] += 1
        shutil.rmtree(folder)
    return counts


@pytest.mark.parametrize("tries", [TRIES, pytest.param(MANY_TRIES, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_random_damage_is_refused_or_harmless(saved, tmp_path, kind, tries):
    """A bit that flips on the disk must never become a traceback nobody understands, NaN in a table, or all the memory."""
    counts = survive(kind, saved(kind), tmp_path, tries, seed=tries)
    assert counts["refused"] >= tries // 5, f"the damage does nothing: {counts}"


# Shards


def test_shards_that_were_swapped_or_borrowed_are_named(saved, tmp_path):
    """Rows in another order would be given other images' labels: accuracies of chance that look like a bad method."""
    source = saved("store") / "out"

    def damaged(name: str) -> Path:
        shutil.copytree(source, tmp_path / name)
        return tmp_path / name

    swapped = damaged("swapped")
    first, second = swapped / "shard-00000.safetensors", swapped / "shard-00001.safetensors"
    assert first.stat().st_size == second.stat().st_size, "nothing but the content tells them apart"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    for read in (lambda s: s.take([0]), lambda s: s.tensor(), lambda s: s.labels, lambda s: s.to_dataset()):
        with pytest.raises(OSError, match="shard-00000.safetensors is damaged .it is not shard 0 of this store"):
            read(ActivationStore.open(swapped))
    borrowed = damaged("borrowed")
    index = json.loads((borrowed / "index.json").read_text())
    index["model"]["fingerprint"] = "another"
    (borrowed / "index.json").write_text(json.dumps(index))
    with pytest.raises(OSError, match="it is not shard 0 of this store"):
        ActivationStore.open(borrowed).take([0])


# Code in the place of data


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "adapter_model.bin", "model.safetensors"])
@pytest.mark.parametrize("kind", ["SAE", "light", "full", "corpus", "clip"])
def test_a_pickle_is_never_loaded(saved, tmp_path, kind, name):
    """A pickle runs what it says: one from a stranger can take over the machine."""
    folder, marker = tmp_path / "copy", tmp_path / "was here"
    shutil.copytree(saved("light" if kind == "clip" else kind), folder)
    place = folder / ("clip" if kind == "clip" else "out")
    if kind == "corpus":
        name = "corpus.safetensors" if name == "model.safetensors" else name
    for path in place.glob("*.safetensors"):
        path.unlink()
    torch.save(Code(marker), place / name)
    with pytest.raises((ValueError, OSError)):
        ARTEFACTS["light" if kind == "clip" else kind].read(folder / "out")
    assert not marker.exists()
    with open(place / name, "rb") as file:
        torch.load(file, weights_only=False)
    assert marker.exists(), "the pickle does nothing: the test proves nothing"


@pytest.mark.parametrize("kind", ["SAE", "light", "full"])
def test_variants_are_refused_and_offloaded_weights_run(saved, tmp_path, kind, monkeypatch):
    """`variant="fp16"` was passed over without a word and other weights than asked for came; a CLIP on the disk failed
    at the first image with "Cannot copy out of meta tensor"."""
    monkeypatch.chdir(saved(kind))
    load, name = SAEModel if kind == "SAE" else VS2CLIPForZeroShot, "out"
    with pytest.raises(ValueError, match="variant='fp16': checkpoints of hf_vs2 have one file of weights"):
        load.from_pretrained(name, variant="fp16")
    model = load.from_pretrained(name)
    with pytest.raises(ValueError, match="variant='fp16'"):
        model.save_pretrained(tmp_path / "saved", variant="fp16")
    on_disk = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "off"}
    from_disk, rows = load.from_pretrained(name, **on_disk), make_rows(4, 32)
    if kind == "SAE":
        assert torch.equal(from_disk(rows).reconstruction, model(rows).reconstruction)
    else:
        assert torch.equal(
            from_disk.image_features_from_cls(rows).features, model.image_features_from_cls(rows).features
        )


def test_code_that_a_config_names_is_not_run(saved, tmp_path):
    """`auto_map` in config.json is how checkpoints bring code; ours bring none, whatever they say."""
    marker = tmp_path / "was here"
    folder = shutil.copytree(saved("SAE"), tmp_path / "copy") / "out"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config(auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})(folder)
    read = ARTEFACTS["SAE"].read
    assert flat(read(folder)) == flat(read(saved("SAE") / "out"))
    assert isinstance(AutoModel.from_pretrained(folder), SAEModel)
    assert not marker.exists()


# Any JSON in any field

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400) | st.just("x/y"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
FEW_OR_MANY = pytest.mark.parametrize("examples", [EXAMPLES, pytest.param(150, marks=pytest.mark.slow)])


def property_of(examples: int) -> settings:
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(derandomize=True, deadline=None, max_examples=examples, suppress_health_check=quiet)


def fields_changed(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(names) | st.text(max_size=12), JSON | st.just(...), min_size=1, max_size=3)


@FEW_OR_MANY
@pytest.mark.parametrize("kind", ["SAE", "light", "full"])
def test_any_config_is_used_or_refused_by_name(saved, tmp_path, kind, examples):
    """Property: whatever JSON stands in whichever fields, the result is finite numbers or one message about the file."""
    folder = tmp_path / "copy"
    shutil.copytree(saved(kind), folder)
    path = folder / "out" / "config.json"
    original = json.loads(path.read_text())

    @property_of(examples)
    @given(fields_changed(sorted(original)))
    def run(changes: dict[str, Any]) -> None:
        content = {name: value for name, value in (original | changes).items() if value is not ...}
        path.write_text(json.dumps(content))
        outcome(kind, folder, (*original, "config.json", "clip"))

    run()


@FEW_OR_MANY
def test_any_result_row_is_shown_or_refused(saved, tmp_path, examples):
    """The same for result files, which people send each other."""
    shutil.copytree(saved("results"), tmp_path / "copy")
    path = tmp_path / "copy" / "out" / "results.json"
    original = json.loads(path.read_text())

    @property_of(examples)
    @given(fields_changed(sorted(original["rows"][1])))
    def run(changes: dict[str, Any]) -> None:
        row = {name: value for name, value in (original["rows"][1] | changes).items() if value is not ...}
        path.write_text(json.dumps(original | {"rows": [original["rows"][0], row]}))
        outcome("results", tmp_path / "copy", ("results.json",))

    run()
