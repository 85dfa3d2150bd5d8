"""One SAE training step: ours, eai-sparsify's and SAELens' with their own modules and step order, and the floor, in turn.

    pip install eai-sparsify==1.3.3 sae-lens==6.54.12
    python benchmarks/sae_train_step.py
    python benchmarks/sae_train_step.py --setting 768 3072 64 1024 --rounds 30

Settings are hidden_size, num_latents, top_k and batch size. The floor is what no top-k SAE can leave out: the encoder's product, the
top-k and a fused Adam step. Prints the median milliseconds of each side, the ratio of the fastest peer to ours (above 1: ours is
faster) and of ours to the floor, both taken round by round, and the peak memory of a few steps in a fresh process above what the
imports take. Peers that are not installed are left out. Nobody's dead-latent loss is active: no latent is dead yet.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import finish, make_parser, parse, ratio, seconds_in_turn

from hf_vs2 import SAEConfig, SAEModel
from hf_vs2.training.graphed_step import GraphedStep


SETTINGS = [
    (768, 3072, 64, 1024),  # the paper's ViT-B/32
    (768, 12288, 32, 1024),
    (768, 3072, 256, 1024),  # the paper's ViT-B/16
    (768, 49152, 32, 1024),
]
LEARNING_RATE = 1e-4
MEMORY_STEPS = 6  # more than GraphedStep takes before it records one

Step = Callable[[torch.Tensor], object]


def ours(hidden_size: int, num_latents: int, top_k: int, device: str) -> Step:
    """The step of `SAETrainer`: clipping and the counters of dead latents included; on a GPU replayed as one graph."""
    config = SAEConfig(
        hidden_size=hidden_size, num_latents=num_latents, top_k=top_k, total_variance=float(hidden_size)
    )
    sae = SAEModel(config).to(device).train()
    graphed = device.startswith("cuda")
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE, fused=True, capturable=graphed)
    idle = torch.zeros(num_latents, dtype=torch.int64, device=device)

    def step(x: torch.Tensor) -> None:
        out = sae(x)
        out.loss.backward()
        sae.remove_parallel_decoder_gradient()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        sae.normalize_decoder()
        active = torch.zeros_like(idle)
        active.scatter_reduce_(
            0, out.latent_indices.flatten(), (out.latent_values != 0).flatten().long(), reduce="amax"
        )
        idle.add_(1).masked_fill_(active.bool(), 0)

    return GraphedStep(step, torch.device(device)) if graphed else step


def ours_eager(hidden_size: int, num_latents: int, top_k: int, device: str) -> Step:
    """The same without the graph: what training on several GPUs does."""
    graphed = ours(hidden_size, num_latents, top_k, device)
    return graphed._step if isinstance(graphed, GraphedStep) else graphed


def sparsify(hidden_size: int, num_latents: int, top_k: int, device: str) -> Step:
    """eai-sparsify's `SparseCoder` in the order of its trainer, with Adam; that trainer itself wants a language model."""
    if not device.startswith("cuda"):
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernels ask for a GPU where Triton is installed
    with contextlib.redirect_stdout(io.StringIO()):
        from sparsify import SparseCoder, SparseCoderConfig
    sae = SparseCoder(hidden_size, SparseCoderConfig(num_latents=num_latents, k=top_k), device, dtype=torch.float32)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)
    idle = torch.zeros(num_latents, dtype=torch.int64, device=device)

    def step(x: torch.Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x, x, total_variance=(x - x.mean(0)).pow(2).sum())
        fired = torch.zeros(num_latents, dtype=torch.bool, device=device)
        fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        idle.add_(len(x))
        idle[fired] = 0

    return step


def saelens(hidden_size: int, num_latents: int, top_k: int, device: str, sparse: bool = False) -> Step:
    """SAELens' own trainer, as it comes or with its sparse activations (which its rescaling by decoder norm excludes)."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = TopKTrainingSAEConfig(
        d_in=hidden_size,
        d_sae=num_latents,
        k=top_k,
        device=device,
        use_sparse_activations=sparse,
        rescale_acts_by_decoder_norm=not sparse,
    )
    settings = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=10**9,
        device=device,
        autocast=False,
        lr=LEARNING_RATE,
        lr_end=LEARNING_RATE,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=1024,
        dead_feature_window=10**6,
        feature_sampling_window=10**6,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(settings, TopKTrainingSAE(config), iter(())).step


def saelens_sparse(hidden_size: int, num_latents: int, top_k: int, device: str) -> Step:
    return saelens(hidden_size, num_latents, top_k, device, sparse=True)


def floor(hidden_size: int, num_latents: int, top_k: int, device: str) -> Step:
    encoder = torch.nn.Parameter(torch.randn(num_latents, hidden_size, device=device) / hidden_size**0.5)
    decoder = torch.nn.Parameter(encoder.detach().clone())
    bias = torch.zeros(num_latents, device=device)
    for weight in (encoder, decoder):
        weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.Adam([encoder, decoder], lr=LEARNING_RATE, fused=True)

    def step(x: torch.Tensor) -> None:
        with torch.no_grad():
            F.linear(x, encoder, bias).topk(top_k, sorted=False)
        optimizer.step()

    return step


SIDES = {
    "ours": ours,
    "ours_eager": ours_eager,
    "sparsify": sparsify,
    "saelens": saelens,
    "saelens_sparse": saelens_sparse,
    "floor": floor,
}
PEERS = ("sparsify", "saelens", "saelens_sparse")


def rows_like_clip(batch_size: int, hidden_size: int, device: str) -> torch.Tensor:
    """A mean, a few strong directions and noise."""
    torch.manual_seed(0)
    strong = torch.randn(batch_size, 64) @ torch.randn(64, hidden_size) / 8
    return (torch.randn(hidden_size) + strong + 0.3 * torch.randn(batch_size, hidden_size)).to(device)


def made(names: tuple[str, ...], setting: list[int], device: str) -> dict[str, Step]:
    steps = {}
    for name in names:
        try:
            steps[name] = SIDES[name](*setting[:3], device)
        except ImportError as error:
            print(f"left out: {name} ({error})", file=sys.stderr)
    return steps


def peak_mb(name: str, setting: list[int], args: argparse.Namespace) -> int:
    """Of a few steps in a fresh process, above what imports take; on a GPU, what torch allocated."""
    command = [sys.executable, __file__, "--measure_memory_of", name, "--setting", *map(str, setting)]
    command += ["--threads", str(args.threads), "--device", args.device]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(name: str, setting: list[int], device: str) -> int:
    SIDES[name](64, 64, 4, device)(torch.randn(8, 64, device=device))  # imports, and what the libraries set up once
    x = rows_like_clip(setting[3], setting[0], device)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
    else:
        start = _status_kb("VmRSS")
    step = SIDES[name](*setting[:3], device)
    for _ in range(MEMORY_STEPS):
        step(x)
    if device.startswith("cuda"):
        return round((torch.cuda.max_memory_allocated() - start) / 1e6)
    # Not getrusage's maximum: on Linux that of a child begins with its parent's.
    return round((_status_kb("VmHWM") - start) / 1e3)


def _status_kb(name: str) -> int:
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))


def compare(setting: list[int], args: argparse.Namespace) -> dict[str, object]:
    torch.set_float32_matmul_precision(args.precision)
    sides = [name for name in SIDES if name != "ours_eager" or args.device.startswith("cuda")]
    steps = made(tuple(sides), setting, args.device)
    x = rows_like_clip(setting[3], setting[0], args.device)
    timed = seconds_in_turn(
        {name: lambda step=step: step(x) for name, step in steps.items()}, args.rounds, args.device, 5
    )
    peers = [name for name in PEERS if name in timed]
    milliseconds = {name: round(1e3 * statistics.median(seconds), 3) for name, seconds in timed.items()}
    row: dict[str, object] = dict(
        zip(("hidden_size", "num_latents", "top_k", "batch_size"), setting, strict=True), milliseconds=milliseconds
    )
    row["ours_over_floor"] = ratio(timed["ours"], timed["floor"])
    if peers:
        fastest = min(peers, key=milliseconds.__getitem__)
        row |= {"fastest_peer": fastest, "fastest_peer_over_ours": ratio(timed[fastest], timed["ours"])}
    del steps
    if not args.no_memory:
        row["peak_mb"] = {name: peak_mb(name, setting, args) for name in ("ours", *peers)}
    return row


def main() -> None:
    parser = make_parser(__doc__, rounds=15)
    parser.add_argument(
        "--setting",
        type=int,
        nargs=4,
        action="append",
        metavar=("HIDDEN", "LATENTS", "K", "BATCH"),
        help="Measure this one instead; may be given several times.",
    )
    parser.add_argument("--precision", default="highest", choices=("highest", "high"), help="high: TF32 on a GPU.")
    parser.add_argument("--no_memory", action="store_true", help="Leave the memory out.")
    parser.add_argument("--measure_memory_of", choices=SIDES, help=argparse.SUPPRESS)
    args = parse(parser)
    if args.measure_memory_of:
        print(measure_memory(args.measure_memory_of, args.setting[0], args.device))
        return
    rows = []
    for setting in args.setting or SETTINGS:
        row = compare(setting, args)
        rows.append(row)
        hidden_size, num_latents, top_k, batch_size = setting
        print(f"\n{hidden_size} -> {num_latents} latents, k {top_k} ({top_k / num_latents:.2%}), batch {batch_size}")
        for name, value in row["milliseconds"].items():
            memory = f"{row['peak_mb'][name]:6} MB" if name in row.get("peak_mb", {}) else ""
            print(f"  {name:15} {value:9.2f} ms {memory}")
        for name in ("fastest_peer_over_ours", "ours_over_floor"):
            if name in row:
                found = row[name]
                print(f"  {name} {found['median']} (quartiles {found['low']} to {found['high']})")
    finish(args, __doc__, rows)


if __name__ == "__main__":
    main()
