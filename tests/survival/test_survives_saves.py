"""What is saved over something earlier, killed at every moment: the old or the new, whole; and files that were not saved together are
refused by name."""

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
from artefacts import bounded_memory, store_folder, store_numbers
from conftest import make_tiny_clip
from processes import CONTEXT, files, start
from toy import make_rows, make_sae
from transformers import CLIPModel

from hf_vs2 import RetrievalCorpus, SAEModel, VS2CLIPForZeroShot, calibrate, measure_statistics
from hf_vs2.atlas.writing import atlas_folder
from hf_vs2.data.stores.activations import ActivationStore
from hf_vs2.files.atomic import replace_file, replace_folder, replace_text
from hf_vs2.files.weight_files import WeightFiles, write_tensors
from hf_vs2.study.results.cells import Cell, Outputs, load_cell, save_cell


READS = 40
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
KINDS = (
    "SAE",
    "SAE without statistics",
    "shards over a single file",
    "light",
    "full, in shards, over light",
    "light over full",
    "sparsify",
    "corpus",
    "atlas",
    "text",
)
LEFT = (".tmp", ".partial", ".replacing")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> CLIPModel:
    folder = tmp_path_factory.mktemp("clip")
    make_tiny_clip().save_pretrained(folder)
    return CLIPModel.from_pretrained(folder)


def make_calibrated(seed: int) -> SAEModel:
    rows = make_rows(400, 32, seed=seed) * (1 + seed)
    sae = make_sae(32, seed=seed, layer=2, total_variance=40.0, gamma=1.0 + seed)
    calibrate(sae, rows)
    sae.set_domain_statistics(measure_statistics(sae, rows, held_out=torch.arange(300, 400), sketch_rows=20))
    return sae


def make_model(clip: CLIPModel, seed: int) -> VS2CLIPForZeroShot:
    """Everything that a checkpoint can hold."""
    model = VS2CLIPForZeroShot(clip, make_calibrated(seed), gate=0.9, gamma=1.5 + seed)
    model.set_corpus(RetrievalCorpus.from_store(make_rows(30, 32, seed=seed), clip=clip))
    with model.steering(method="prototypes"):
        model.steerer.fit_classes(make_rows(2, 24, seed=seed), ("one", "two"))
    return model


def sae_numbers(folder: Path) -> list:
    sae = SAEModel.from_pretrained(folder)
    known = sae.domain_statistics
    return [sae.W_enc, sae.config.gamma, sae.config.fvu_quantiles, None if known is None else known.rows]


def model_numbers(folder: Path) -> list:
    model = VS2CLIPForZeroShot.from_pretrained(folder)
    found = [model.sae.W_enc, model.config.gamma, model.sae.config.fvu_quantiles, model.domain_statistics.rows]
    return [*found, model.corpus.rows, *(one.fit.prototypes for one in model.fitted_label_sets)]


def corpus_numbers(folder: Path) -> list:
    corpus = RetrievalCorpus.from_pretrained(folder)
    return [corpus.rows, corpus.encoder]


def atlas_numbers(folder: Path) -> list:
    return [json.loads((folder / "latents.json").read_text())]


def save_atlas(folder: Path, number: int) -> None:
    with atlas_folder(folder) as made:
        (made / "data").mkdir()
        (made / "data" / "0.js").write_text(str(number))
        (made / "latents.json").write_text(json.dumps({"format": "hf_vs2.atlas", "number": number}))


SHARDS = {"max_shard_size": "30KB"}


@pytest.fixture(scope="module")
def savers(clip) -> dict[str, tuple[Callable, Callable, Callable]]:
    """Kind -> what saves the earlier thing into a folder, what saves the later one over it, and what reads either."""
    saes = [make_calibrated(seed) for seed in (0, 1)]
    bare = make_sae(32, seed=1, layer=2)
    models = [make_model(clip, seed) for seed in (0, 1)]
    corpora = [
        RetrievalCorpus(make_rows(9, 32, seed=seed), make_rows(9, 8, seed=seed), f"an/encoder{seed}")
        for seed in (0, 1)
    ]
    return {
        "SAE": (saes[0].save_pretrained, saes[1].save_pretrained, sae_numbers),
        "SAE without statistics": (saes[0].save_pretrained, bare.save_pretrained, sae_numbers),
        "shards over a single file": (
            saes[0].save_pretrained,
            lambda folder: saes[1].save_pretrained(folder, **SHARDS),
            sae_numbers,
        ),
        "light": (models[0].save_pretrained, models[1].save_pretrained, model_numbers),
        "full, in shards, over light": (
            models[0].save_pretrained,
            lambda folder: models[1].save_pretrained(folder, full=True, **SHARDS),
            model_numbers,
        ),
        "light over full": (
            lambda folder: models[0].save_pretrained(folder, full=True, **SHARDS),
            models[1].save_pretrained,
            model_numbers,
        ),
        "sparsify": (saes[0].save_sparsify, saes[1].save_sparsify, lambda folder: [SAEModel.from_sparsify(folder).W_enc]),
        "corpus": (corpora[0].save_pretrained, corpora[1].save_pretrained, corpus_numbers),
        "atlas": (
            lambda folder: save_atlas(folder, 0),
            lambda folder: save_atlas(folder, 1),
            atlas_numbers,
        ),
        "text": (
            lambda folder: replace_text(folder / "results.json", "old"),
            lambda folder: replace_text(folder / "results.json", "new"),
            lambda folder: [(folder / "results.json").read_text()],
        ),
    }  # fmt: skip


def same(left: list, right: list) -> bool:
    return len(left) == len(right) and all(
        torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        for one, other in zip(left, right, strict=True)
    )


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


def check_interrupted_save(savers, kind: str, tmp_path: Path, signal_number: int, tries: int) -> None:
    old, new, read = savers[kind]
    place, kept, whole = (tmp_path / name / "out" for name in ("place", "kept", "whole"))
    old(kept)
    before = read(kept)
    shutil.copytree(kept, whole)
    operations = interrupted(lambda: new(whole), whole, None, signal_number)
    after, made = read(whole), files(whole)
    assert operations > 5 and not same(before, after)
    seen = set()
    for number in range(min(tries, operations)):
        moment = operations - number * operations // tries if tries < operations else 1 + number
        shutil.rmtree(place.parent, ignore_errors=True)
        shutil.copytree(kept, place)
        assert not interrupted(lambda: new(place), place, moment, signal_number), "it was not interrupted"
        if number % 2:  # otherwise the next one to open the folder is the next save
            found = read(place)
            assert same(found, before) or same(found, after), f"{kind}: a mixture before operation {moment}"
            seen.add(same(found, after))
        new(place)
        assert files(place) == made, f"{kind}: saved again after operation {moment}"
        assert not [path for path in place.parent.rglob(".*") if path.suffix in LEFT]
    assert tries < operations or seen == {False, True}


@pytest.mark.parametrize("kind", ["SAE", "full, in shards, over light", "sparsify", "atlas"])
def test_a_save_over_an_earlier_one_that_is_killed_leaves_one_of_the_two(savers, tmp_path, kind):
    """Weights of one and thresholds of the other would load in silence; neither would be a lost SAE."""
    check_interrupted_save(savers, kind, tmp_path, signal.SIGKILL, 4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("kind", KINDS)
def test_a_save_killed_before_each_of_its_operations(savers, tmp_path, kind, how):
    """The same, at every moment; and with Ctrl-C, where what is under way is ended or undone at once."""
    check_interrupted_save(savers, kind, tmp_path, how, 1000)


def test_a_save_that_cannot_be_finished_says_so(savers, tmp_path, monkeypatch):
    """A reader without the right to write, of a folder whose writer was killed: no mixture, but who can mend it."""
    old, new, read = savers["SAE"]
    old(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("hf_vs2.files.atomic._move", lambda folder: None)
        patch.setattr("hf_vs2.files.sharing.model_card.write_model_card", lambda folder: None)  # which would open it
        new(tmp_path / "out")

    def refuse(folder):
        raise PermissionError("read-only")

    monkeypatch.setattr("hf_vs2.files.atomic._move", refuse)
    with pytest.raises(OSError, match=r"was saved into by a process that died.*\.replacing can't be moved.*read-only"):
        read(tmp_path / "out")
    monkeypatch.undo()
    assert read(tmp_path / "out")[1] == 2.0 and not list((tmp_path / "out").glob(".*"))


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


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_goes_on_leading_to_its_folder(tmp_path, exists):
    """`--output atlas`, a link to the large disk: the link must not be renamed away, nor a folder take its place."""
    (tmp_path / "atlas").symlink_to(tmp_path / "disk" / "atlas")
    if exists:
        save_atlas(tmp_path / "disk" / "atlas", 0)
    save_atlas(tmp_path / "atlas", 1)
    assert (tmp_path / "atlas").is_symlink() and atlas_numbers(tmp_path / "disk" / "atlas")[0]["number"] == 1
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("atlas", "disk")] == []


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


def test_a_model_with_nan_is_not_saved_over_a_sound_one(savers, tmp_path):
    """What nobody could use must not take the place of what somebody does."""
    old, _, read = savers["SAE"]
    old(tmp_path / "out")
    broken = make_sae(32)
    with torch.no_grad():
        broken.W_dec[3, 5] = torch.nan
    with pytest.raises(ValueError, match="The model to be saved is damaged: W_dec holds NaN"):
        broken.save_pretrained(tmp_path / "out")
    assert read(tmp_path / "out")[1] == 1.0


# Files that were not saved together


@pytest.fixture(scope="module")
def saved(savers, tmp_path_factory) -> Callable[[str, int], Path]:
    """A folder of each kind, of the earlier thing (0) or the later (1)."""
    made: dict[tuple[str, int], Path] = {}

    def make(kind: str, number: int) -> Path:
        if (kind, number) not in made:
            made[kind, number] = tmp_path_factory.mktemp("saved") / "out"
            savers[kind][number](made[kind, number])
        return made[kind, number]

    return make


MIXTURES = [
    ("SAE", "model.safetensors"),
    ("SAE", "statistics.safetensors"),
    ("SAE", "config.json"),
    ("light", "model.safetensors"),
    ("light", "statistics.safetensors"),
    ("light", "label_sets.safetensors"),
    ("light", "corpus/corpus.safetensors"),
    ("light", "config.json"),
    ("corpus", "corpus.safetensors"),
]


@pytest.mark.parametrize(("kind", "name"), MIXTURES)
def test_a_file_of_another_save_is_refused(savers, saved, tmp_path, kind, name):
    """Copied by hand, or by a sync that was cut off: everything fits in shape, and every number would be of neither."""
    mixed = shutil.copytree(saved(kind, 0), tmp_path / "mixed")
    shutil.copy(saved(kind, 1) / name, mixed / name)
    found = Path(name).name if name != "config.json" else "model.safetensors"
    with pytest.raises(ValueError, match=f"{found} is damaged, or not of the save that"):
        savers[kind][2](mixed)


def test_weights_of_an_earlier_save_beside_the_shards_are_refused(savers, saved, tmp_path):
    """A sync that deletes nothing: the single file is what every reader would take, stock transformers too."""
    mixed = shutil.copytree(saved("shards over a single file", 1), tmp_path / "mixed")
    shutil.copy(saved("SAE", 0) / "model.safetensors", mixed)
    with pytest.raises(ValueError, match=r"model.safetensors is none of the files that config.json was saved with"):
        sae_numbers(mixed)


@pytest.mark.parametrize("kind", ["SAE", "light", "full, in shards, over light", "corpus"])
def test_a_flipped_bit_is_refused_by_file_name(savers, saved, tmp_path, kind):
    """In the last bits of a number nobody else would see it."""
    for path in sorted(saved(kind, 1).rglob("*.safetensors")):
        damaged = shutil.copytree(saved(kind, 1), tmp_path / "damaged", dirs_exist_ok=True)
        content = bytearray(path.read_bytes())
        content[-4] ^= 1
        (damaged / path.relative_to(saved(kind, 1))).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path.name} is damaged, or not of the save that"):
            savers[kind][2](damaged)


def without_digests(folder: Path) -> None:
    for path in (*folder.glob("config.json"), *folder.rglob("corpus.json")):
        content = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in content.items() if "digest" not in key}))


@pytest.mark.parametrize("kind", ["SAE", "light", "full, in shards, over light", "corpus"])
def test_what_earlier_versions_saved_loads(savers, saved, tmp_path, kind):
    """They wrote no digests."""
    old = shutil.copytree(saved(kind, 1), tmp_path / "old")
    without_digests(old)
    assert same(savers[kind][2](old), savers[kind][2](saved(kind, 1)))


@pytest.mark.parametrize("kind", ["SAE", "light"])
def test_words_of_a_config_may_be_edited(saved, tmp_path, kind):
    """A default gate or gamma changed by hand, the CLIP's name put right before a push."""
    edited = shutil.copytree(saved(kind, 0), tmp_path / "edited")
    config = json.loads((edited / "config.json").read_text())
    config |= {"gamma": 1.25, "gate": 0.5}
    (edited / "config.json").write_text(json.dumps(config))
    assert (SAEModel if kind == "SAE" else VS2CLIPForZeroShot).from_pretrained(edited).config.gamma == 1.25


def test_a_flipped_bit_in_a_shard_is_seen_when_it_is_first_read(tmp_path):
    """Opening a store of a thousand shards must not read them; a row that changed must not be trained on."""
    store_folder(tmp_path)
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
        store_folder(tmp_path)
    with bounded_memory():
        assert len(store_numbers(tmp_path)[0]) == 10


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
