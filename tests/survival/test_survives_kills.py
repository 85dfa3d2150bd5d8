"""Real processes are killed, starved of disk space and started twice; nothing half-written is ever taken for whole, nothing is lost.

The processes are forked from one that has imported torch, so that a kill costs no start of seconds; they import nothing of the
suite but this module, processes and toy, and work on a CLIP and images on the disk."""

import json
import os
import random
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import CONTEXT, files, start

from hf_vs2.files.atomic import replace_file, replace_files, replace_folder


TRIES = 20
STEPS = 12
FOLDER_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
CONTEXT.set_forkserver_preload(
    ["torch", "datasets", "hf_vs2.training.trainer", "hf_vs2.data.stores.activations", "hf_vs2.cli.commands.calibrate", "transformers.models.clip.modeling_clip"]
)  # fmt: skip


# What the processes do


def extract(material: Path, folder: Path, layers: tuple[int, ...] = (-1,)):
    """60 images in 8 shards."""
    import datasets
    from transformers import CLIPImageProcessorPil, CLIPModel

    from hf_vs2.data.stores.activations import extract_activations

    return extract_activations(
        CLIPModel.from_pretrained(material / "clip"),
        datasets.load_from_disk(str(material / "images")),
        folder / "activations",
        layers=layers,
        image_processor=CLIPImageProcessorPil.from_pretrained(material / "clip"),
        batch_size=3,
        shard_size=8,
        progress=False,
    )


def train(folder: Path, rows, pause: float = 0.0, **changed) -> None:
    """Continues from the newest training checkpoint, where there is one."""
    from hf_vs2 import SAEConfig, SAETrainer, SAETrainingArguments

    settings = {"max_steps": STEPS, "per_device_train_batch_size": 16, "learning_rate": 3e-3, "logging_steps": 4}
    settings |= {"save_steps": 4, "dead_latent_threshold": 2, "disable_tqdm": True, **changed}
    found = list((folder / "sae").glob("checkpoint-*"))
    settings.setdefault("resume_from_checkpoint", "latest" if found else None)
    config = SAEConfig(hidden_size=32, num_latents=64, top_k=4)
    trainer = SAETrainer(config, SAETrainingArguments(output_dir=str(folder / "sae"), **settings), rows)
    batch = trainer._batch
    trainer._batch = lambda read: (time.sleep(pause), batch(read))[1]
    trainer.train()


def calibrate(material: Path, folder: Path) -> None:
    from hf_vs2.cli import main

    images = ["--dataset", str(material / "fresh"), "--batch_size=4", "--disable_tqdm"]
    assert main(["calibrate", "--checkpoint", str(folder / "sae"), *images]) == 0


def extract_and_train(material: Path, folder: Path) -> None:
    train(folder, extract(material, folder))


def whole_run(material: Path, folder: Path) -> None:
    extract_and_train(material, folder)
    calibrate(material, folder)


def counted(material: Path, folder: Path, last: int | None) -> None:
    """A whole run that is killed before its `last`-th operation on files in its folder; without, it writes how many there are."""
    done = 0

    def count(event, arguments):
        nonlocal done
        if event in FOLDER_EVENTS and arguments and str(arguments[0]).startswith(str(folder)):
            done += 1
            if done == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    whole_run(material, folder)
    folder.with_name(folder.name + ".count").write_text(str(done))


def member(rank: int, port: int, job: str, material: Path, folder: Path) -> None:
    """One of two processes that share a job, slowed down so that there is a middle to kill it in."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    if job == "training":
        train(folder, torch.load(material / "rows.pt"), pause=0.02, per_device_train_batch_size=8, max_steps=40)
        return
    from hf_vs2.data import batches as image_batches

    torch.distributed.init_process_group("gloo")
    open_image = image_batches.open_image
    image_batches.open_image = lambda *given, **options: (time.sleep(0.03), open_image(*given, **options))[1]
    extract(material, folder)


def with_little_disk(most: int, job, *arguments) -> None:
    """Files of more than `most` bytes can't be written, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    job(*arguments)


def train_anew(folder: Path, rows_of: Path, changed: dict) -> None:
    train(folder, torch.load(rows_of), resume_from_checkpoint=None, **changed)


def poll_store(folder: Path, stop) -> None:
    """Opens the store again and again while others make it: refused as unfinished, or whole."""
    from hf_vs2.data.stores.activations import ActivationStore, StoreError

    seen = {"refused": 0, "whole": 0}
    sums = set()
    while not stop.is_set() or not seen["whole"]:
        try:
            sums.add(ActivationStore.open(folder / "activations").tensor().double().sum().item())
            seen["whole"] += 1
        except StoreError as error:
            assert "unfinished" in str(error) or "No activation store" in str(error), error
            seen["refused"] += 1
        time.sleep(0.002)
    assert len(sums) == 1 and seen["refused"], (sums, seen)


# Starting them


def run(folder: Path, job, *arguments) -> None:
    error_file = folder.with_name(folder.name + ".error")
    process = start(error_file, job, *arguments)
    process.join(200)
    assert process.exitcode == 0, error_file.read_text() if error_file.exists() else process.exitcode


def visible(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(folder).items() if "/." not in f"/{name}"}


def result(folder: Path) -> dict[str, bytes]:
    """Every file of the result and of the stores, but for the times in the log and what it is quoted in."""
    return {
        name: content
        for name, content in visible(folder).items()
        if not name.endswith(("README.md", "training_log.json")) and "checkpoint-" not in name
    }


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    from commands import make_tokenizer
    from conftest import make_tiny_clip
    from image_stores import make_dataset, make_processor
    from toy import make_rows

    folder = tmp_path_factory.mktemp("material")
    make_tiny_clip().save_pretrained(folder / "clip")
    make_processor().save_pretrained(folder / "clip")
    make_tokenizer().save_pretrained(folder / "clip")
    make_dataset(60).save_to_disk(folder / "images")
    make_dataset(90).select(range(60, 90)).save_to_disk(folder / "fresh")
    torch.save(make_rows(400, 32), folder / "rows.pt")
    return folder


CALIBRATED = ("config.json", "statistics.safetensors")


@pytest.fixture(scope="module")
def undisturbed(material, tmp_path_factory):
    """The folder of a run that nobody disturbed, what `calibrate` changes as it was before, its seconds and its file operations."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(folder, extract_and_train, material, folder)
    trained = {name: (folder / "sae" / name).read_bytes() for name in CALIBRATED}
    run(folder, calibrate, material, folder)
    again = folder.with_name("again")
    began = time.monotonic()
    run(again, counted, material, again, None)
    seconds = time.monotonic() - began
    assert result(again) == result(folder), "two undisturbed runs differ: the comparisons would say nothing"
    return folder, trained, seconds, int(again.with_name("again.count").read_text())


# Killed


def assert_nothing_torn(folder: Path, undisturbed: tuple) -> None:
    """Whatever has the name of a whole thing is whole, and what it is in the undisturbed run."""
    from hf_vs2 import SAEModel
    from hf_vs2.data.stores.activations import ActivationStore

    reference, trained, *_ = undisturbed
    whole = visible(reference)
    for name, content in visible(folder).items():
        if name.endswith((".safetensors", ".bin")) and name in whole:
            before = trained.get(name.removeprefix("sae/"), whole[name])
            assert content in (before, whole[name]), f"{name} is torn"
        elif name.endswith("index.json") and json.loads(content)["complete"]:
            assert content == whole[name]
            assert len(ActivationStore.open((folder / name).parent)) > 0
    [names, *others] = [{path.name for path in one.iterdir()} for one in (reference / "sae").glob("checkpoint-*")]
    assert all(other == names for other in others)
    for checkpoint in (folder / "sae").glob("checkpoint-*"):
        assert {path.name for path in checkpoint.iterdir()} == names, f"{checkpoint.name} lacks files"
        assert json.loads((checkpoint / "trainer_state.json").read_text())["step"] == int(checkpoint.name[11:])
    config = folder / "sae" / "config.json"
    if config.exists():
        found = {name: (folder / "sae" / name).read_bytes() for name in CALIBRATED}
        assert found in (trained, {name: whole[f"sae/{name}"] for name in CALIBRATED}), "of two states"
        SAEModel.from_pretrained(folder / "sae")
        assert (folder / "sae" / "model.safetensors").read_bytes() == whole["sae/model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["file operation", "clock"])
def test_killed_at_any_moment_the_next_run_ends_as_if_nothing_had_happened(material, undisturbed, tmp_path, moment):
    """Out of memory, a preempted node, a pulled plug, during extraction, training, calibration or saving: the user starts the same
    thing again, and gets the same bits, with no rubbish left beside them."""
    reference, _, seconds, operations = undisturbed
    draw = random.Random(6)
    killed, reached = 0, set()
    for number in range(TRIES):
        folder = tmp_path / str(number)
        # One draw from each part of the run.
        share = (number + draw.random()) / TRIES
        last = 1 + int(share * operations) if moment == "file operation" else None
        victim = start(tmp_path / "error", counted, material, folder, last)
        if moment == "clock":
            victim.join(share * seconds)
            victim.kill()
        victim.join(200)
        assert victim.exitcode in (-signal.SIGKILL, 0), (tmp_path / "error").read_text()
        killed += victim.exitcode != 0
        reached.add((bool(list(folder.glob("activations/*/index.json"))), (folder / "sae" / "config.json").exists()))
        assert_nothing_torn(folder, undisturbed)
        run(folder, whole_run, material, folder)
        assert result(folder) == result(reference), f"killed after {share:.0%}"
        left = [path for path in folder.rglob(".*") if path.suffix in (".tmp", ".partial")]
        assert not left, left
    assert killed == TRIES if moment == "file operation" else killed > TRIES / 2
    assert len(reached) > 1, "all kills fell into the same part of the run"


def share_job(job: str, material: Path, folder: Path) -> list:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        start(folder.with_name(f"{folder.name}.error{rank}"), member, rank, port, job, material, folder)
        for rank in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("job", ["training", "extraction"])
def test_who_loses_its_partner_says_so_and_both_go_on(material, tmp_path, job):
    """One node of a job dies. The other must not hold its machine for hours without a word, nor leave something torn; started
    again, the two end with what one process makes alone."""
    draw = random.Random(7)
    for number in range(TRIES // 2):
        folder, victim = tmp_path / str(number), number % 2
        members = share_job(job, material, folder)
        first = "sae/checkpoint-*" if job == "training" else "activations/*/shard-*"
        deadline = time.monotonic() + 200
        while not list(folder.glob(first)):
            assert all(one.is_alive() for one in members) and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.3 * draw.random())
        members[victim].kill()
        began = time.monotonic()
        members[1 - victim].join(60)
        waited = time.monotonic() - began
        assert members[1 - victim].exitcode == 1, f"after {waited:.0f} s: {members[1 - victim].exitcode}"
        message = folder.with_name(f"{number}.error{1 - victim}").read_text()
        assert "Another process of this job has died" in message and "start the job again" in message
        for one in share_job(job, material, folder):
            one.join(200)
            assert one.exitcode == 0
        if job == "extraction":
            from hf_vs2.data.stores.activations import ActivationStore

            assert ActivationStore.open(folder / "activations").image_indices.tolist() == list(range(60))
    if job == "training":
        from trainings import assert_close_weights

        from hf_vs2 import SAEModel

        run(tmp_path / "one", train_anew, tmp_path / "one", material / "rows.pt", {"max_steps": 40})
        one = SAEModel.from_pretrained(tmp_path / "one" / "sae")
        for number in range(TRIES // 2):
            assert_close_weights(one, SAEModel.from_pretrained(tmp_path / str(number) / "sae"))


# A full disk


@pytest.mark.parametrize(
    ("named", "most", "changed"),
    [
        ("checkpoint-4", 8_000, {}),  # the model of the training checkpoint, by safetensors
        ("checkpoint-4", 25_000, {}),  # Adam's state, by torch
        ("sae", 8_000, {"save_steps": 0}),  # the result
    ],
)
def test_a_full_disk_is_named_and_what_was_there_stays(material, tmp_path, named, most, changed):
    """The week's result must not be lost because the next training into its folder found no room."""
    folder = tmp_path / "run"
    run(folder, train_anew, folder, material / "rows.pt", {})
    before = files(folder)
    error_file = tmp_path / "error"
    other = {"seed": 1, "overwrite_output_dir": True, **changed}
    process = start(error_file, with_little_disk, most, train_anew, folder, material / "rows.pt", other)
    process.join(200)
    assert process.exitcode == 1
    message = error_file.read_text()
    assert message.startswith("OSError: ") and f"{named} could not be written" in message, message

    def sae(found: dict) -> dict:
        """Without what is of the training, which begins anew: its log and training checkpoints."""
        of_training = ("/.", "/checkpoint-", "/training_log.json")
        return {
            name: content for name, content in found.items() if not any(part in f"/{name}" for part in of_training)
        }

    assert sae(files(folder)) == sae(before) and "sae/model.safetensors" in sae(before)


def test_a_full_disk_stops_an_extraction_that_then_goes_on(material, tmp_path):
    """A shard that did not fit must be named, not be taken for whole, and be made when there is room."""
    layers = (0, 1, 2)  # shards larger than the index
    whole, folder, error_file = tmp_path / "whole", tmp_path / "run", tmp_path / "error"
    run(whole, extract, material, whole, layers)
    shard = min(whole.glob("activations/*/shard-*"))
    process = start(error_file, with_little_disk, shard.stat().st_size - 1, extract, material, folder, layers)
    process.join(200)
    assert process.exitcode == 1
    assert f"{shard.name} could not be written" in error_file.read_text()
    assert not list(folder.glob("activations/*/shard-*")) and not list(folder.rglob(".*.tmp"))
    run(folder, extract, material, folder, layers)
    assert visible(folder / "activations") == visible(whole / "activations")


# Two at once


def test_two_extractions_and_a_reader_at_once(material, undisturbed, tmp_path):
    """Two jobs of a cluster want the same store while a third waits for it: one makes it, nobody reads a part."""
    reference, *_ = undisturbed
    folder, stop = tmp_path / "run", CONTEXT.Event()
    reader = start(tmp_path / "error", poll_store, folder, stop)
    makers = [start(tmp_path / f"error{number}", extract, material, folder) for number in range(2)]
    for maker in makers:
        maker.join(200)
    stop.set()
    reader.join(200)
    assert [one.exitcode for one in (*makers, reader)] == [0, 0, 0]
    assert visible(folder / "activations") == visible(reference / "activations")


@pytest.mark.parametrize("how", ["file", "files", "folder"])
def test_content_is_on_the_disk_before_its_name(tmp_path, monkeypatch, how):
    """A power cut after the name and before the content leaves an empty file that says it is whole. What can be tested without
    one: that the system is told to write the content down first, and the name after it."""
    done, sync, replace = [], os.fsync, os.replace

    def name_of(descriptor):
        return os.readlink(f"/proc/self/fd/{descriptor}")

    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append(("sync", name_of(descriptor))), sync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append(("move", str(old), str(new))), replace(old, new)))
    target = tmp_path / "out"

    def write(folder):
        for name in ("a", "z"):
            (folder / name).write_text(name)

    if how == "file":
        replace_file(target / "a", lambda path: path.write_text("a"))
    elif how == "files":
        replace_files(target, write, last="a")
    else:
        (tmp_path / "partial").mkdir()
        write(tmp_path / "partial")
        replace_folder(tmp_path / "partial", target)
    moves = [step for step in done if step[0] == "move"]
    assert [Path(new).name for *_, new in moves] == {"file": ["a"], "files": ["z", "a"], "folder": ["out"]}[how]
    for _, old, new in moves:
        place = done.index(("move", old, new))
        content = {Path(old).name} if how != "folder" else {"a", "z", "partial"}
        assert content <= {Path(path).name for kind, path, *_ in done[:place] if kind == "sync"}
        assert ("sync", str(Path(new).parent)) in done[place:]
    if how == "files":
        assert ("sync", str(target)) in done[done.index(moves[0]) : done.index(moves[1])], "others before the last"


def test_two_trainings_into_one_folder(material, tmp_path):
    """The same command started twice by mistake: the second one says so, the first one's result is its own."""
    folder, alone = tmp_path / "run", tmp_path / "alone"
    changed = [{"seed": seed, "pause": 0.2} for seed in (1, 2)]
    both = [start(tmp_path / f"error{one['seed']}", train_anew, folder, material / "rows.pt", one) for one in changed]
    for one in both:
        one.join(200)
    assert sorted(one.exitcode for one in both) == [0, 1]
    [winner] = [number for number, one in enumerate(both) if one.exitcode == 0]
    loser = (tmp_path / f"error{changed[1 - winner]['seed']}").read_text()
    assert f"Another training is writing to {folder / 'sae'}" in loser
    run(alone, train_anew, alone, material / "rows.pt", {"seed": changed[winner]["seed"]})
    assert result(folder) == result(alone)
