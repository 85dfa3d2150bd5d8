"""One set of properties over everything that is saved: what comes back, what a kill, a full disk, a flipped bit, a mixture
of two saves, an old format and a link make of it. Killed at every moment there is the old or the new, whole."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from artefacts import ARTEFACTS, bounded_memory, put, same, save_store, store_numbers
from processes import CONTEXT, files, start
from toy import make_sae

from hf_vs2 import SAEModel, VS2CLIPForZeroShot
from hf_vs2.data.stores.activations import ActivationStore
from hf_vs2.files.atomic import replace_file, replace_folder, replace_text
from hf_vs2.files.weight_files import WeightFiles, write_tensors
from hf_vs2.study.results.cells import Cell, Outputs, load_cell, save_cell


READS = 40
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
LEFT = (".tmp", ".partial", ".replacing")
# What is saved first, and what over it.
PAIRS = [
    ("SAE", "SAE"),
    ("SAE", "SAE without statistics"),
    ("SAE", "SAE in shards"),
    ("light", "light"),
    ("light", "full in shards"),
    ("full in shards", "light"),
    ("light", "light without the rest"),
    ("sparsify", "sparsify"),
    ("corpus", "corpus"),
    ("atlas", "atlas"),
    ("text", "text"),
]
DIGESTED = ["SAE", "SAE in shards", "light", "full in shards", "corpus"]


# Saved over an earlier one


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_what_is_saved_comes_back_and_nothing_of_what_was_there(saved, copied, old, new):
    """Rows that somebody took out, a corpus, shards: they must not stay in the folder and go to the Hub."""
    out = copied(old)
    put(new, out.parent, 1)
    assert files(out) == files(saved(new, 1) / "out")
    read = ARTEFACTS[new].read
    assert same(read(out), read(saved(new, 1) / "out")) and not same(read(out), read(saved(old, 0) / "out"))


@pytest.mark.parametrize("kind", [kind for kind in ARTEFACTS if kind not in ("store", "results")])
def test_a_full_disk_leaves_what_was_there(saved, copied, monkeypatch, kind):
    """New weights beside the statistics of others would be a gate that means nothing."""
    out = copied(kind)

    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("hf_vs2.files.atomic._sync", full)
    with pytest.raises(OSError, match="could not be written: the disk is full|No space left"):
        put(kind, out.parent, 1)
    assert files(out) == files(saved(kind) / "out")
    assert not [path for path in out.parent.rglob(".*") if path.suffix in LEFT]


@pytest.mark.parametrize("kind", [kind for kind in ARTEFACTS if kind != "store"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_link_goes_on_leading_to_its_folder(saved, tmp_path, kind, exists):
    """`--output atlas`, a link to the large disk: the link must not be renamed away, nor a folder take its place."""
    disk = tmp_path / "disk" / "out"  # a card names the folder
    if exists:
        shutil.copytree(saved(kind) / "out", disk)
    elif kind != "atlas":  # a folder of one's own is made by who makes the link
        disk.mkdir(parents=True)
    (tmp_path / "out").symlink_to(disk)
    out = put(kind, tmp_path, 1)
    assert out.is_symlink() and files(disk) == files(saved(kind, 1) / "out")
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "disk", "clip"}


def interrupted(job: Callable[[], object], folder: Path, moment: int | None, signal_number: int) -> int:
    """How many operations on files in or beside `folder` a fork of this process came to that got the signal before the given one."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        with open(reading) as pipe:
            said = pipe.read()
        os.waitpid(child, 0)
        return int(said or 0)
    done = 0

    def count(event, arguments):
        nonlocal done
        if event in EVENTS and arguments and str(arguments[0]).startswith(str(folder.parent)):
            done += 1
            if done == moment:
                os.kill(os.getpid(), signal_number)

    try:
        signal.alarm(60)
        sys.addaudithook(count)
        job()
        os.write(writing, str(done).encode())
    finally:
        os._exit(0)


def check_interrupted_save(saved, old: str, new: str, tmp_path: Path, signal_number: int, tries: int) -> None:
    root, read, thing = tmp_path / "tried", ARTEFACTS[new].read, ARTEFACTS[new].make(1)
    place, kept = root / "out", saved(old)
    save = lambda: ARTEFACTS[new].save(thing, place)  # noqa: E731
    before = ARTEFACTS[old].read(kept / "out")
    shutil.copytree(kept, root)
    operations = interrupted(save, place, None, signal_number)
    after, made = read(place), files(place)
    assert operations > 5 and not same(before, after)
    seen = set()
    for number in range(min(tries, operations)):
        moment = operations - number * operations // tries if tries < operations else 1 + number
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(kept, root)
        assert not interrupted(save, place, moment, signal_number), "it was not interrupted"
        if number % 2:  # otherwise the next one to open the folder is the next save
            found = read(place)
            assert same(found, before) or same(found, after), f"{new}: a mixture before operation {moment}"
            seen.add(same(found, after))
        save()
        assert files(place) == made, f"{new}: saved again after operation {moment}"
        assert not [path for path in root.rglob(".*") if path.suffix in LEFT]
    assert tries < operations or seen == {False, True}


@pytest.mark.parametrize(
    ("old", "new"), [PAIRS[0], ("light", "full in shards"), ("sparsify", "sparsify"), ("atlas", "atlas")]
)
def test_a_save_over_an_earlier_one_that_is_killed_leaves_one_of_the_two(saved, tmp_path, old, new):
    """Weights of one and thresholds of the other would load in silence; neither would be a lost SAE."""
    check_interrupted_save(saved, old, new, tmp_path, signal.SIGKILL, 4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_a_save_killed_before_each_of_its_operations(saved, tmp_path, old, new, how):
    """The same, at every moment; and with Ctrl-C, where what is under way is ended or undone at once."""
    check_interrupted_save(saved, old, new, tmp_path, how, 1000)


def test_a_save_that_cannot_be_finished_says_so(copied, monkeypatch):
    """A reader without the right to write, of a folder whose writer was killed: no mixture, but who can mend it."""
    out, read = copied("SAE"), ARTEFACTS["SAE"].read
    with monkeypatch.context() as patch:
        patch.setattr("hf_vs2.files.atomic._move", lambda folder: None)
        patch.setattr("hf_vs2.files.sharing.model_card.write_model_card", lambda folder: None)  # which would open it
        put("SAE", out.parent, 1)

    def refuse(folder):
        raise PermissionError("read-only")

    monkeypatch.setattr("hf_vs2.files.atomic._move", refuse)
    with pytest.raises(OSError, match=r"was saved into by a process that died.*\.replacing can't be moved.*read-only"):
        read(out)
    monkeypatch.undo()
    assert SAEModel.from_pretrained(out).config.gamma == 2.0 and not list(out.glob(".*"))


def test_a_folder_of_a_stranger_moves_nothing_outside(tmp_path):
    """What a save left half moved is a plan on the disk. One in a downloaded folder must not reach the user's own files."""
    folder = tmp_path / "downloaded"
    (folder / ".replacing").mkdir(parents=True)
    mine = tmp_path / "thesis.txt"
    mine.write_text("mine")
    (folder / "corpus").symlink_to(tmp_path)
    for plan in ({"new": [], "old": ["../thesis.txt"]}, {"new": [], "old": ["corpus/thesis.txt"]}):
        (folder / ".replacing" / ".plan.json").write_text(json.dumps(plan))
        with pytest.raises(OSError, match="is not inside it"):
            SAEModel.from_pretrained(folder)
        assert mine.read_text() == "mine"


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    """Of a process that was killed nobody else cleans up; one that is still writing must not lose its file."""
    (tmp_path / ".results.json.0a1b2c3d.tmp").mkdir()
    (tmp_path / ".results.json.0a1b2c3d.tmp" / "results.json").write_text("half")
    (tmp_path / ".mine.tmp").write_text("another program's")
    (tmp_path / ".0badcafe.tmp").write_text("another program's")

    def write(path):
        path.write_text("slow")
        replace_text(tmp_path / "results.json", "quick")
        assert path.read_text() == "slow"

    replace_file(tmp_path / "other.json", write)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".0badcafe.tmp",
        ".mine.tmp",
        "other.json",
        "results.json",
    ]


def test_a_folder_takes_anothers_place_where_names_cannot_be_exchanged(tmp_path, monkeypatch):
    """On Windows and some network disks."""
    monkeypatch.setattr("hf_vs2.files.atomic._exchange", lambda one, other: False)
    for number in range(2):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "file").write_text(str(number))
        replace_folder(tmp_path / "new", tmp_path / "place")
    assert [path.name for path in tmp_path.iterdir()] == ["place"] and (tmp_path / "place" / "file").read_text() == "1"


# A reader beside a writer


def save_in_turn(folder, stop):
    """Two SAEs of one shape, which differ in all the rest, saved over each other until told to stop."""
    saes = [make_sae(seed=seed, gamma=1.0 + seed) for seed in (0, 1)]
    while not stop.is_set():
        for sae in saes:
            sae.save_pretrained(folder)


@pytest.mark.slow
def test_a_reader_during_saves_gets_one_sae_or_an_error(tmp_path):
    """A gate served with the weights of one training and the thresholds of another would pass wrong images in silence."""
    folder, stop = tmp_path / "sae", CONTEXT.Event()
    weights = {1.0 + seed: make_sae(seed=seed).W_enc for seed in (0, 1)}
    make_sae(seed=0, gamma=1.0).save_pretrained(folder)
    writer = start(tmp_path / "error", save_in_turn, folder, stop)
    seen = []
    deadline = time.monotonic() + 60
    while (len(seen) < READS or len(set(seen)) < 2) and time.monotonic() < deadline:
        try:
            sae = SAEModel.from_pretrained(folder)
        except (OSError, ValueError):
            continue
        assert torch.equal(sae.W_enc, weights[sae.config.gamma])
        seen.append(sae.config.gamma)
    stop.set()
    writer.join(60)
    assert writer.exitcode == 0
    assert len(set(seen)) == 2, "the reader met both"


def test_a_save_between_the_config_and_the_weights_is_noticed(tmp_path, monkeypatch):
    """The moment that a race seldom meets: thresholds already read, weights not yet. Another number of files must not hide it."""
    find = WeightFiles.find
    for number, options in enumerate(({}, {"max_shard_size": "3KB"}, {})):
        make_sae(seed=0, gamma=1.0).save_pretrained(tmp_path)

        def save_first(*arguments, options=options, seed=number + 1):
            make_sae(seed=seed, gamma=2.0).save_pretrained(tmp_path, **options)
            return find(*arguments)

        with (
            monkeypatch.context() as patch,
            pytest.raises(ValueError, match="safetensors is (damaged, or not|none) of the"),
        ):
            patch.setattr(WeightFiles, "find", save_first)
            SAEModel.from_pretrained(tmp_path)
        assert torch.equal(SAEModel.from_pretrained(tmp_path).W_enc, make_sae(seed=number + 1).W_enc)


def test_a_model_with_nan_is_not_saved_over_a_sound_one(copied):
    """What nobody could use must not take the place of what somebody does."""
    out, broken = copied("SAE"), make_sae(32)
    with torch.no_grad():
        broken.W_dec[3, 5] = torch.nan
    with pytest.raises(ValueError, match="The model to be saved is damaged: W_dec holds NaN"):
        broken.save_pretrained(out)
    assert SAEModel.from_pretrained(out).config.gamma == 1.0


# Files that were not saved together, or are damaged


def essential(out: Path) -> list[Path]:
    """Those without which there is no artefact: of a checkpoint without statistics VS2 can still be used."""
    names = ("config.json", "corpus.json", "index.json", "results.json", "cfg.json")
    found = sorted(path for path in out.rglob("*") if path.suffix == ".safetensors" or path.name in names)
    shards = [path for path in found if "-of-" in path.name]
    return [path for path in found if path not in shards[1:-1]]


@pytest.mark.parametrize("kind", DIGESTED)
def test_a_file_of_another_save_or_with_a_flipped_bit_is_refused(saved, copied, kind):
    """Copied by hand, by a sync that was cut off, or by a bad disk: everything fits in shape, and the last bits of a
    number nobody else would see."""
    for path in essential(saved(kind) / "out"):
        name = path.relative_to(saved(kind) / "out")
        content = bytearray(path.read_bytes())
        content[-4] ^= 1
        for damage in ((saved(kind, 1) / "out" / name).read_bytes(), bytes(content)):
            if (path.suffix == ".json" and damage == bytes(content)) or damage == path.read_bytes():
                continue  # the CLIP's shards are the same in both
            out = copied(kind)
            (out / name).write_bytes(damage)
            with pytest.raises(ValueError, match=r"safetensors is damaged, or not of the save that") as caught:
                ARTEFACTS[kind].read(out)
            assert path.suffix == ".json" or path.name in str(caught.value)


@pytest.mark.parametrize("kind", [*DIGESTED, "sparsify", "store", "results"])
def test_a_file_that_is_cut_emptied_lost_or_another_is_refused_by_name(saved, copied, kind):
    """A download that broke off, a full disk, a stranger's folder: one message that says which file it is."""
    for path in essential(saved(kind) / "out"):
        name, content = path.relative_to(saved(kind) / "out"), path.read_bytes()
        for damage in (content[: len(content) // 2], b"", b"<html>not found</html>", None):
            out = copied(kind)
            (out / name).unlink() if damage is None else (out / name).write_bytes(damage)
            if damage is None and path.name == "statistics.safetensors":
                continue  # which is missed, not needed
            with pytest.raises((ValueError, OSError)) as caught, bounded_memory():
                ARTEFACTS[kind].read(out)
            assert path.name in str(caught.value) or str(out) in str(caught.value), f"{name}: {caught.value}"


def test_weights_of_an_earlier_save_beside_the_shards_are_refused(saved, copied):
    """A sync that deletes nothing: the single file is what every reader would take, stock transformers too."""
    mixed = copied("SAE in shards", 1)
    shutil.copy(saved("SAE") / "out" / "model.safetensors", mixed)
    with pytest.raises(ValueError, match=r"model.safetensors is none of the files that config.json was saved with"):
        SAEModel.from_pretrained(mixed)


@pytest.mark.parametrize("kind", DIGESTED)
def test_what_earlier_versions_saved_loads(saved, copied, kind):
    """They wrote no digests, and those before statistics and label sets said nothing of these."""
    out = copied(kind)
    for path in (*out.glob("config.json"), *out.rglob("corpus.json")):
        content = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in content.items() if "digest" not in key}))
    assert same(ARTEFACTS[kind].read(out), ARTEFACTS[kind].read(saved(kind) / "out"))
    for path in out.glob("config.json"):
        content = json.loads(path.read_text())
        for name in ("holds_statistics", "holds_label_sets", "holds_corpus"):
            content.pop(name, None)
        path.write_text(json.dumps(content))
        assert 0 < len(ARTEFACTS[kind].read(out)) < len(ARTEFACTS[kind].read(saved(kind) / "out"))


@pytest.mark.parametrize(("kind", "cls"), [("SAE", SAEModel), ("light", VS2CLIPForZeroShot)])
def test_words_of_a_config_may_be_edited(copied, monkeypatch, kind, cls):
    """A default gate or gamma changed by hand, the CLIP's name put right before a push."""
    out = copied(kind)
    monkeypatch.chdir(out.parent)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"gamma": 1.25, "gate": 0.5}))
    assert cls.from_pretrained(out).config.gamma == 1.25


def test_a_flipped_bit_in_a_shard_is_seen_when_it_is_first_read(tmp_path):
    """Opening a store of a thousand shards must not read them; a row that changed must not be trained on."""
    save_store(0, tmp_path / "store")
    shard = tmp_path / "store" / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    rows = content.find(ActivationStore.open(tmp_path / "store").take([5]).numpy().tobytes())
    content[rows] ^= 1
    shard.write_bytes(content)
    store = ActivationStore.open(tmp_path / "store")
    store.take([0])
    assert store.labels is not None, "the labels lie elsewhere in the shard"
    for read in (lambda: store.take([7]), store.tensor, store.to_dataset):
        with pytest.raises(OSError, match="shard-00001.safetensors is damaged .the numbers of layer_2 are not those"):
            read()


def test_a_store_of_an_earlier_version_is_read(tmp_path, monkeypatch):
    """Its shards say nothing of digests."""

    def write(path, tensors, about):
        write_tensors(path, tensors, {name: value for name, value in about.items() if name != "digests"})

    with monkeypatch.context() as patch:
        patch.setattr("hf_vs2.data.stores.store_format.write_tensors", write)
        save_store(0, tmp_path / "store")
    with bounded_memory():
        assert len(store_numbers(tmp_path / "store")[0]) == 10


# Cells of a study


CELLS = [Cell("clip", "data", method, "single", 0, {"gamma": 1.5}) for method in ("vs2", "centroid")]


def damage_cells(folder: Path, harm: str) -> str:
    """Name of the damaged file of the first cell."""
    cell, other = (folder / f"{one.name}.json" for one in CELLS)
    outcomes = cell.with_suffix(".safetensors")
    if harm == "figure":
        cell.write_text(cell.read_text().replace("61.5", "71.5"))
    elif harm == "JSON cut":
        cell.write_text(cell.read_text()[:50])
    elif harm == "JSON of another cell":
        shutil.copy(other, cell)
    elif harm == "outcomes of another cell":
        shutil.copy(other.with_suffix(".safetensors"), outcomes)
    elif harm == "outcomes cut":
        outcomes.write_bytes(outcomes.read_bytes()[:-9])
    elif harm == "outcomes lost":
        outcomes.unlink()
    else:
        content = bytearray(outcomes.read_bytes())
        content[-1] ^= 1
        outcomes.write_bytes(content)
    return cell.name if harm in ("figure", "JSON cut", "JSON of another cell") else outcomes.name


@pytest.mark.parametrize(
    "harm",
    ["figure", "JSON cut", "JSON of another cell", "outcomes of another cell", "outcomes cut", "outcomes lost", "bit"],
)
def test_a_damaged_cell_is_named_and_measured_again(tmp_path, caplog, harm):
    """One of thousands; the study must neither stop nor put its number into the table."""
    for number, cell in enumerate(CELLS):
        outputs = Outputs(torch.arange(9), torch.arange(9) + number)
        save_cell(tmp_path, cell, {"top1": 61.5 + number, "n": 9}, outputs)
    assert load_cell(tmp_path, CELLS[0]).figures == {"top1": 61.5, "n": 9}
    assert torch.equal(load_cell(tmp_path, CELLS[1]).outputs().predictions, torch.arange(9) + 1)
    name = damage_cells(tmp_path, harm)
    assert load_cell(tmp_path, CELLS[0]) is None
    assert name in caplog.text and "is measured again" in caplog.text
    assert load_cell(tmp_path, CELLS[1]) is not None


def test_a_cell_of_an_earlier_version_is_kept(tmp_path):
    """Hours of measuring."""
    save_cell(tmp_path, CELLS[0], {"top1": 61.5}, Outputs(torch.arange(9), torch.arange(9)))
    path = tmp_path / f"{CELLS[0].name}.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if "digest" not in k}))
    assert len(load_cell(tmp_path, CELLS[0]).outputs().labels) == 9
