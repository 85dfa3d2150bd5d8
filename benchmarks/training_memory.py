"""Memory of SAE training per process, in copies of the weights: alone, as whole copies (DDP), and dealt out (FSDP).

    python benchmarks/training_memory.py
    accelerate launch --config_file examples/accelerate/cpu_2_processes.yaml benchmarks/training_memory.py
    accelerate launch --config_file examples/accelerate/fsdp_cpu_2_processes.yaml benchmarks/training_memory.py
    accelerate launch --config_file examples/accelerate/fsdp_cpu_2_processes.yaml --num_processes 4 benchmarks/training_memory.py

A copy is what W_enc and W_dec take in float32. "held" is what parameters, gradients and Adam's state take after a step, counted;
"peak" is the most memory that the process had during a step, above what it had before there was a model: resident on a CPU (Linux),
allocated on a GPU. The batch is small, so that the latents' own memory is what is seen.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from common import finish, make_parser, parse
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_vs2 import SAEConfig, SAETrainer, SAETrainingArguments


ROWS, BATCH, STEPS = 600, 64, 4


def local_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of what this process holds of the tensors."""
    parts = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum(part.numel() * part.element_size() for part in parts)


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


class Watch:
    """Called after each optimizer step; the last one counts, when the first steps' allocations are behind."""

    def __init__(self, device: str):
        self.on_gpu = device.startswith("cuda")
        self.before = 0 if self.on_gpu else resident("VmRSS")
        self.found: dict[str, int] = {}

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.found = {
            "weights": local_bytes(parameters),
            "gradients": local_bytes(p.grad for p in parameters if p.grad is not None),
            "Adam": local_bytes(t for state in optimizer.state.values() for t in state.values() if t.ndim),
            "peak": (torch.cuda.max_memory_allocated() if self.on_gpu else resident("VmHWM")) - self.before,
        }
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM


def main() -> None:
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("--hidden_size", type=int, default=768)
    parser.add_argument("--num_latents", type=int, default=49152)
    args = parse(parser)
    torch.set_num_threads(1)
    rows = torch.randn(ROWS, args.hidden_size)
    watch = Watch(args.device)
    register_optimizer_step_post_hook(watch)
    with tempfile.TemporaryDirectory() as folder:
        config = SAEConfig(hidden_size=args.hidden_size, num_latents=args.num_latents, top_k=32)
        settings = {"max_steps": STEPS, "save_steps": 0, "calibration_share": 0.0, "disable_tqdm": True}
        trainer = SAETrainer(config, SAETrainingArguments(output_dir=folder, **settings), rows)
        processes = trainer.accelerator.num_processes
        trainer.args.per_device_train_batch_size = BATCH // processes
        trainer.train()
    if trainer.accelerator.is_main_process:
        copy = 2 * args.num_latents * args.hidden_size * 4
        kind = str(trainer.accelerator.distributed_type).rpartition(".")[2]
        row = {"kind": kind, "processes": processes, "copy_bytes": copy}
        row |= {name: round(size / copy, 2) for name, size in watch.found.items()}
        print(f"{kind}, {processes} process(es), {args.num_latents} latents; a copy is {copy / 1e6:.0f} MB")
        print("  ".join(f"{name} {row[name]:.2f}" for name in watch.found), "copies per process")
        finish(args, __doc__, [row])


if __name__ == "__main__":
    main()
