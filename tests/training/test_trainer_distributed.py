"""Real processes (gloo) train the SAE that one process trains: two and four of them, with whole copies and with FSDP. Started as
users start them: by `accelerate launch` with the files of examples/accelerate, and by torch.distributed.run."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from image_stores import make_dataset, make_processor
from safetensors.torch import load_file
from toy import sparse_rows
from trainings import assert_close_weights, make_trainer

from hf_vs2 import SAEModel
from hf_vs2.training.label_losses import PrototypeAlignment


CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"
# The global batch is 64. Latents die (AuxK works on them) and gradients are clipped.
SHARED = {
    "save_steps": 10,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.05,
    "dead_latent_threshold": 2,
    "config": {"aux_k": 20},
}
# Rank 1 gets folders of its own, so that whatever it writes shows.
WORKER = """
import json, os, sys
import torch
from hf_vs2.training.label_losses import PrototypeAlignment
from trainings import make_trainer
from toy import sparse_rows
from torch.optim.optimizer import register_optimizer_step_post_hook

settings = json.loads(sys.argv[1])
rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
folder = settings.pop("output_dir") + ("" if rank == 0 or settings.pop("together", False) else "-rank1")
settings.pop("together", None)
held = {}


def bytes_held(optimizer, *_):
    def size(tensors):
        local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
        return sum(t.numel() * t.element_size() for t in local)

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held["parameters"] = size(parameters)
    held["gradients"] = size([p.grad for p in parameters if p.grad is not None])
    held["optimizer"] = size([t for state in optimizer.state.values() for t in state.values() if t.ndim])


hook = register_optimizer_step_post_hook(bytes_held)
trainer = make_trainer(folder, sparse_rows(2000), **settings)
assert trainer.accelerator.num_processes == processes > 1, trainer.accelerator.state
metrics = trainer.train()
hook.remove()
trainer.save_model(folder + "-again")
# One SAE a layer, say, in one job; this one with labels.
second = make_trainer(
    folder + "-second",
    sparse_rows(2000),
    max_steps=5,
    per_device_train_batch_size=32 // processes,
    labels=torch.arange(2000) % 7,
    label_loss=PrototypeAlignment(),
)
assert second.accelerator.num_processes == processes, second.accelerator.state
second.train()
weights = sum(p.double().abs().sum().item() for p in trainer.model.parameters())
report = {"rank": rank, "kind": trainer.accelerator.distributed_type, "weights": weights, "held": held, **metrics}
# A file each: two processes that print to one pipe may write into each other's lines.
with open(sys.argv[2] + str(rank), "w") as file:
    json.dump(report, file)
"""


def launch(script: Path, *, file: str | None = None, processes: int = 2, **settings) -> list[dict]:
    """Train in several processes, started with a file of examples/accelerate or by torchrun; what each reported, by rank."""
    if file is None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    else:
        command = accelerate_launch(file)
    return finish(script, [start(script, command, settings)], processes)


def accelerate_launch(file: str, *options: str) -> list[str]:
    port = () if any("port" in option for option in options) else ("--main_process_port=0",)  # 0: one that is free
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / file)]
    return [*command, *port, *options]


def start(script: Path, command: list[str], settings: dict) -> subprocess.Popen:
    script.write_text(WORKER)
    arguments = [str(script), json.dumps(settings), str(script.with_name("report-"))]
    return start_process([*command, *arguments])


def start_process(command: list[str]) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(script: Path, launches: list[subprocess.Popen], processes: int) -> list[dict]:
    outputs = [launched.communicate(timeout=300)[0] for launched in launches]
    for launched, output in zip(launches, outputs, strict=True):
        assert launched.returncode == 0, output[-4000:]
    reports = [script.with_name(f"report-{rank}") for rank in range(processes)]
    found = [json.loads(report.read_text()) for report in reports]
    for report in reports:
        report.unlink()  # the next launch must write its own
    return found


def step_counters(folder):
    return load_file(folder / "checkpoint-10" / "steps_since_active.safetensors")["steps_since_active"]


def assert_same_run(folder, name, one, metrics, reports):
    """What these processes wrote and reported is what the one process of `folder / "one"` did."""
    other = SAEModel.from_pretrained(folder / name)
    assert_close_weights(one.model, other)
    assert torch.equal(one.model.mean, other.mean)
    assert one.model.config.fvu_quantiles == pytest.approx(other.config.fvu_quantiles, rel=1e-3)
    assert [report["rank"] for report in reports] == list(range(len(reports)))
    assert len({report["weights"] for report in reports}) == 1, "the processes hold different models"
    for key in ("fvu", "l0", "dead_share", "steps", "train_rows", "held_out_rows"):
        assert metrics[key] == pytest.approx(reports[0][key], rel=1e-3), key
    logs = [json.loads((folder / run / "training_log.json").read_text())["log"] for run in ("one", name)]
    for entry, other_entry in zip(*logs, strict=True):
        assert entry == pytest.approx(other_entry, rel=1e-3)
        assert entry["dead_share"] == other_entry["dead_share"]
    assert torch.equal(step_counters(folder / "one"), step_counters(folder / name))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training by one process and by two, with the same global batch."""
    folder = tmp_path_factory.mktemp("distributed")
    one = make_trainer(folder / "one", sparse_rows(2000), per_device_train_batch_size=32, **SHARED)
    metrics = one.train()
    two = launch(
        folder / "worker.py",
        file="cpu_2_processes.yaml",
        output_dir=str(folder / "two"),
        together=True,
        per_device_train_batch_size=16,
        **SHARED,
    )
    return folder, one, metrics, two


def test_two_processes_train_what_one_does(runs):
    """More processes for speed must not give another SAE: weights, statistics, thresholds, the log, dead latents."""
    folder, one, metrics, two = runs
    assert_same_run(folder, "two", one, metrics, two)
    assert {report["kind"] for report in two} == {"MULTI_CPU"}


@pytest.mark.slow
def test_four_processes_train_what_one_does(runs):
    """Four processes with a quarter of the batch each; a mean of means or a count of two parts would show."""
    folder, one, metrics, _ = runs
    four = launch(
        folder / "worker4.py",
        processes=4,
        output_dir=str(folder / "four"),
        together=True,
        per_device_train_batch_size=8,
        **SHARED,
    )
    assert_same_run(folder, "four", one, metrics, four)


@pytest.mark.slow
def test_two_machines_train_what_one_does(runs):
    """`accelerate launch` on each of two machines, here both this one, with the command line of docs/distributed.md."""
    folder, one, metrics, _ = runs
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = folder / "machines.py"
    settings = {"output_dir": str(folder / "machines"), "together": True, "per_device_train_batch_size": 16, **SHARED}
    options = ["--num_processes=2", "--main_process_ip=127.0.0.1", f"--main_process_port={port}"]
    launches = [
        start(script, accelerate_launch("two_nodes.yaml", *options, f"--machine_rank={rank}"), settings)
        for rank in range(2)
    ]
    assert_same_run(folder, "machines", one, metrics, finish(script, launches, 2))


def test_the_runs_compared_have_dead_latents_and_clipped_gradients(runs):
    """Without either, the comparisons would say nothing about AuxK and clipping."""
    folder, one, *_ = runs
    log = json.loads((folder / "one" / "training_log.json").read_text())["log"]
    assert any(0 < entry["dead_share"] < 1 for entry in log)
    counters = step_counters(folder / "one")
    assert 0 < (counters >= SHARED["dead_latent_threshold"]).sum() < len(counters)
    for changed in ({"config": {"aux_k_coefficient": 0.0}}, {"max_grad_norm": 0.0}):
        other = make_trainer(
            folder / "other",
            sparse_rows(2000),
            per_device_train_batch_size=32,
            overwrite_output_dir=True,
            **{**SHARED, **changed},
        )
        other.train()
        with pytest.raises(AssertionError):
            assert_close_weights(one.model, other.model)


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


@pytest.mark.slow
def test_two_processes_resume_and_only_the_first_writes(runs):
    """A job of two processes that was stopped half-way ends where it would have; rank 1 leaves no file behind."""
    folder, one, metrics, two = runs
    settings = {**SHARED, "save_steps": 0, "per_device_train_batch_size": 16}
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
        **{**SHARED, "per_device_train_batch_size": 64, "gradient_accumulation_steps": 1},
        resume_from_checkpoint=str(folder / "two" / "checkpoint-10"),
    )
    resumed.train()
    assert_close_weights(one.model, resumed.model)


# Latents beyond one device: FSDP


@pytest.fixture(scope="module")
def sharded(runs):
    """The training of `runs` by two processes that hold half of the weights each. An odd number of latents can't be halved."""
    folder, *_ = runs
    settings = {**SHARED, "config": {"aux_k": 20, "num_latents": 97}, "per_device_train_batch_size": 16}
    place = folder / "sharded"
    place.mkdir()
    one = make_trainer(place / "one", sparse_rows(2000), **{**settings, "per_device_train_batch_size": 32})
    metrics = one.train()
    two = launch_fsdp(place, output_dir=str(place / "two"), together=True, **settings)
    return place, one, metrics, two, settings


def launch_fsdp(folder, **settings):
    return launch(folder / "worker.py", file="fsdp_cpu_2_processes.yaml", **settings)


@pytest.mark.slow
def test_fsdp_trains_what_one_process_does(sharded):
    """Weights dealt out over processes: steered by gradients of parts, normalised in parts, and saved whole."""
    place, one, metrics, two, _ = sharded
    assert_same_run(place, "two", one, metrics, two)
    assert {report["kind"] for report in two} == {"FSDP"}
    torch.testing.assert_close(SAEModel.from_pretrained(place / "two").W_dec.norm(dim=-1), torch.ones(97))


@pytest.mark.slow
def test_fsdp_leaves_each_process_half(sharded, runs):
    """The point of it: an FSDP configuration that accelerate ignores, as it does on CPUs, would train whole copies."""
    _, one, _, two, _ = sharded
    whole = sum(p.numel() * p.element_size() for p in one.model.parameters())
    for report in two:
        held = report["held"]
        assert 0.49 * whole < held["parameters"] < 0.51 * whole
        assert held["gradients"] == held["parameters"] and held["optimizer"] == 2 * held["parameters"]
    assert sum(report["held"]["parameters"] for report in two) == whole
    *_, copies = runs
    assert copies[0]["held"]["parameters"] == copies[1]["held"]["parameters"] > 0.9 * whole


@pytest.mark.slow
def test_fsdp_resumes_exactly(sharded):
    """A sharded job that was stopped half-way ends where it would have, to the bit; without FSDP it says what differs."""
    place, _, _, _, settings = sharded
    checkpoint = str(place / "two" / "checkpoint-10")
    settings = {**settings, "save_steps": 0, "resume_from_checkpoint": checkpoint}
    launch_fsdp(place, output_dir=str(place / "resumed"), together=True, **settings)
    whole, resumed = SAEModel.from_pretrained(place / "two"), SAEModel.from_pretrained(place / "resumed")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    alone = make_trainer(place / "alone", sparse_rows(2000), **{**settings, "per_device_train_batch_size": 32})
    with pytest.raises(ValueError, match="was trained with sharding=fsdp, now it is None"):
        alone.train()


@pytest.mark.slow
def test_fsdp_in_bfloat16(sharded):
    """Half precision is for the products: rows, loss and FVU must not be rounded to it."""
    place, one, metrics, _, settings = sharded
    settings = {**settings, "mixed_precision": "bf16"}
    two = launch_fsdp(place, output_dir=str(place / "bfloat16"), together=True, **settings)
    sae = SAEModel.from_pretrained(place / "bfloat16")
    assert {p.dtype for p in sae.parameters()} == {torch.float32}
    assert two[0]["fvu"] == pytest.approx(metrics["fvu"], rel=0.02)


@pytest.mark.slow
def test_fsdp_from_the_command_line(tiny_clip, tmp_path):
    """The command of docs/distributed.md, from images: extraction shared, weights dealt out, stopped, resumed, calibrated, and
    one report printed."""
    tiny_clip.save_pretrained(tmp_path / "clip")
    make_processor().save_pretrained(tmp_path / "clip")
    make_dataset(60).save_to_disk(tmp_path / "images")
    images = ["--model", str(tmp_path / "clip"), "--dataset", str(tmp_path / "images"), "--batch_size=8"]
    options = ["--top_k=4", "--max_steps=8", "--save_steps=4", "--disable_tqdm", "--dead_latent_threshold=2"]

    def train(launcher, output_dir, batch_size, *more):
        command = [*launcher, "-m", "hf_vs2.cli", "train", *images, *options]
        given = [f"--per_device_train_batch_size={batch_size}", "--output_dir", str(tmp_path / output_dir), *more]
        launched = start_process([*command, *given])
        output = launched.communicate(timeout=300)[0]
        assert launched.returncode == 0 and output.count("Written:") == 1, output[-4000:]
        return SAEModel.from_pretrained(tmp_path / output_dir)

    fsdp = accelerate_launch("fsdp_cpu_2_processes.yaml")
    two = train(fsdp, "two", 16)
    assert two.config.fvu_quantiles and two.config.training_metrics["steps"] == 8
    assert_close_weights(train([sys.executable], "one", 32), two)
    checkpoint = ["--resume_from_checkpoint", str(tmp_path / "two" / "checkpoint-4")]
    resumed = train(fsdp, "two", 16, *checkpoint)
    for name, tensor in two.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"FSDP_VERSION": "1"}, "set fsdp_version: 2"),
        ({"FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading: false"),
        ({"FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "fsdp_state_dict_type: FULL_STATE_DICT"),
    ],
)
def test_fsdp_that_cannot_work_is_refused(monkeypatch, tmp_path, variables, message):
    """Version 1 flattens the directions away; "efficient loading" extracts with a CLIP without weights on all ranks but 0; a
    sharded checkpoint is a pickle that accelerate 1.10 resumes without Adam's state."""
    for name, value in {"ACCELERATE_USE_FSDP": "true", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, sparse_rows(300))


# The files of examples/accelerate


@pytest.mark.parametrize("file", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_accelerate_reads_our_files(file):
    """A key that this accelerate does not know, or a default that it fills in for one we left out, is found by users only."""
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS / file), "script.py"])
    args, defaults, _ = _validate_launch_command(args)
    assert args.multi_gpu != args.use_fsdp, "started by torchrun, as accelerate does for these two"
    environment = prepare_multi_gpu_env(args)
    machines = 2 if file == "two_nodes.yaml" else 1
    assert (args.num_machines, int(args.nproc_per_node)) == (machines, args.num_processes // machines)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    if file.startswith("fsdp"):
        wanted = {"VERSION": "2", "CPU_RAM_EFFICIENT_LOADING": "false", "STATE_DICT_TYPE": "FULL_STATE_DICT"}
        assert {name: environment[f"FSDP_{name}"] for name in wanted} == wanted
        assert environment["FSDP_OFFLOAD_PARAMS"] == "false" and environment["FSDP_RESHARD_AFTER_FORWARD"] == "true"
    else:
        assert "ACCELERATE_USE_FSDP" not in environment


def test_the_fsdp_files_differ_in_the_machine_only():
    """What the tests run on CPUs must be what users run on GPUs."""
    gpus, cpus = (load_config_from_file(str(CONFIGS / name)) for name in ("fsdp.yaml", "fsdp_cpu_2_processes.yaml"))
    assert gpus.fsdp_config == cpus.fsdp_config and gpus.distributed_type == cpus.distributed_type
