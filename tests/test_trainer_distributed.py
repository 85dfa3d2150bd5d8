"""Two real processes (gloo) train the SAE that one process trains. Started as users start them, by torch.distributed.run;
`accelerate launch --cpu --num_processes 2` would silently run one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import PrototypeAlignment, assert_close_weights, make_trainer
from toy import sparse_rows

from hf_vs2 import SAEModel


# Rank 1 gets folders of its own, so that whatever it writes shows.
WORKER = """
import json, os, sys
import torch
from test_trainer import PrototypeAlignment, make_trainer, sparse_rows

settings = json.loads(sys.argv[1])
rank = int(os.environ["RANK"])
folder = settings.pop("output_dir") + ("" if rank == 0 or settings.pop("together", False) else "-rank1")
settings.pop("together", None)
trainer = make_trainer(folder, sparse_rows(2000), **settings)
assert trainer.accelerator.num_processes == 2, trainer.accelerator.state
metrics = trainer.train()
trainer.save_model(folder + "-again")
# One SAE a layer, say, in one job; this one with labels.
second = make_trainer(
    folder + "-second",
    sparse_rows(2000),
    max_steps=5,
    per_device_train_batch_size=16,
    labels=torch.arange(2000) % 7,
    label_loss=PrototypeAlignment(),
)
assert second.accelerator.num_processes == 2, second.accelerator.state
second.train()
report = {"rank": rank, "weights": sum(p.double().abs().sum().item() for p in trainer.model.parameters()), **metrics}
# A file each: two processes that print to one pipe may write into each other's lines.
with open(sys.argv[2] + str(rank), "w") as file:
    json.dump(report, file)
"""


def launch(script: Path, **settings) -> list[dict]:
    """Train in two processes; what each reported at the end, by rank."""
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    tests = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, (tests, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    run = subprocess.run(
        [*command, str(script), json.dumps(settings), str(script.with_name("report-"))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(script.with_name(f"report-{rank}").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training by one process and by two, with the same global batch."""
    folder = tmp_path_factory.mktemp("distributed")
    shared = {"save_steps": 10, "gradient_accumulation_steps": 2, "config": {"aux_k": 20}}
    one = make_trainer(folder / "one", sparse_rows(2000), per_device_train_batch_size=32, **shared)
    metrics = one.train()
    two = launch(
        folder / "worker.py", output_dir=str(folder / "two"), together=True, per_device_train_batch_size=16, **shared
    )
    return folder, one, metrics, two


def counters(folder):
    return load_file(folder / "checkpoint-10" / "steps_since_active.safetensors")["steps_since_active"]


def test_two_processes_train_what_one_does(runs):
    """More processes for speed must not give another SAE: weights, statistics, thresholds, the log."""
    folder, one, metrics, two = runs
    other = SAEModel.from_pretrained(folder / "two")
    assert_close_weights(one.model, other)
    assert torch.equal(one.model.mean, other.mean)
    assert one.model.config.fvu_quantiles == pytest.approx(other.config.fvu_quantiles, rel=1e-3)
    assert [report["rank"] for report in two] == [0, 1]
    assert two[0]["weights"] == two[1]["weights"], "the processes hold different models"
    for name in ("fvu", "l0", "dead_share", "steps", "train_rows", "held_out_rows"):
        assert metrics[name] == pytest.approx(two[0][name], rel=1e-3), name
    logs = [json.loads((folder / name / "training_log.json").read_text())["log"] for name in ("one", "two")]
    for entry, other_entry in zip(*logs, strict=True):
        assert entry == pytest.approx(other_entry, rel=1e-3)


def test_two_processes_train_with_labels_what_one_does(runs):
    """Each process must take the labels of its own rows. Class means are those of one process's rows, so one process that
    accumulates two such parts a step is the reference."""
    folder, *_ = runs
    one = make_trainer(
        folder / "one-second",
        sparse_rows(2000),
        max_steps=5,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        labels=torch.arange(2000) % 7,
        label_loss=PrototypeAlignment(),
    )
    one.train()
    two = SAEModel.from_pretrained(folder / "two-second")
    assert_close_weights(one.model, two)
    assert one.model.config.training_data == two.config.training_data


def test_dead_latents_are_counted_over_both(runs):
    """A latent active in the other process only is not dead; DDP's buffer broadcast would call it so."""
    folder, *_ = runs
    ours = counters(folder / "one")
    assert torch.equal(ours, counters(folder / "two"))
    assert 0 < (ours > 0).sum() < len(ours), "the case needs latents of both kinds"


@pytest.mark.slow
def test_two_processes_resume_and_only_the_first_writes(runs):
    """A job of two processes that was stopped half-way ends where it would have; rank 1 leaves no file behind."""
    folder, one, metrics, two = runs
    settings = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "config": {"aux_k": 20}}
    launch(
        folder / "worker.py",
        output_dir=str(folder / "resumed"),
        resume_from_checkpoint=str(folder / "two" / "checkpoint-10"),
        **settings,
    )
    whole, resumed = SAEModel.from_pretrained(folder / "two"), SAEModel.from_pretrained(folder / "resumed")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert (folder / "resumed-again" / "config.json").is_file(), "save_model works after train(), too"
    assert not list(folder.glob("*-rank1*"))
    partial = [path for path in folder.rglob("*") if "partial" in path.name or path.name.startswith("tmp")]
    assert not partial


def test_one_process_continues_what_two_began(runs):
    """The machine with two GPUs is gone: the global batch is what counts, not how many processes share it."""
    folder, one, *_ = runs
    resumed = make_trainer(
        folder / "alone",
        sparse_rows(2000),
        per_device_train_batch_size=64,
        config={"aux_k": 20},
        resume_from_checkpoint=str(folder / "two" / "checkpoint-10"),
    )
    resumed.train()
    assert_close_weights(one.model, resumed.model)
