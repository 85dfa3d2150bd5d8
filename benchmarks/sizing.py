"""What a large run needs, from measured costs: memory per device, time, storage.

    python benchmarks/sizing.py --step_ms MS --tower_images_per_second N --reading_ms MS

--step_ms is a training step as `benchmarks/sae_train_step.py` measures it (for --step_latents and --step_batch) on one of the
devices, --tower_images_per_second what the vision tower alone does there (`benchmarks/pipeline_throughput.py`), and --reading_ms
the time of one processor to decode, resize and crop an image (`benchmarks/feeding.py`). The bytes of weights, gradients and Adam's
state of a latent, and of a row on disk, are measured here, on a small SAE and a small shard. Time grows in proportion to rows,
latents and steps and is divided by the devices: communication is not in it, so it is a lower bound. Extraction is as fast as the
slower of towers and reading, which run side by side.

Memory in training is (benchmarks/training_memory.py): alone 4 copies of the weights, as whole copies (DDP) 4.5, dealt out over N
devices (FSDP) 4/N and, while they are gathered, 2 more; and the latents of a batch, before the top-k.
"""

import tempfile
from pathlib import Path

import torch
from common import finish, make_parser, parse

from hf_vs2 import SAEConfig, SAEModel
from hf_vs2.data.stores.store_format import read_shard_header, write_shard


SMALL = 1024


def bytes_per_latent(hidden_size: int) -> dict[str, float]:
    """Of weights, gradients and Adam's state, counted after one step."""
    sae = SAEModel(SAEConfig(hidden_size=hidden_size, num_latents=SMALL, top_k=8, total_variance=1.0))
    optimizer = torch.optim.Adam(sae.parameters(), fused=True)
    sae(torch.randn(16, hidden_size)).loss.backward()
    optimizer.step()
    of_a_latent = [parameter for parameter in sae.parameters() if len(parameter) == SMALL]
    states = [t for p in of_a_latent for t in optimizer.state[p].values() if t.ndim]
    kinds = {"weights": of_a_latent, "gradients": [p.grad for p in of_a_latent], "Adam": states}
    return {kind: sum(t.numel() * t.element_size() for t in tensors) / SMALL for kind, tensors in kinds.items()}


def bytes_per_row(hidden_size: int, dtype: torch.dtype) -> float:
    """Of a store with labels, written to disk."""
    tensors = {"layer_11": torch.zeros(SMALL, hidden_size, dtype=dtype)}
    tensors |= {name: torch.zeros(SMALL, dtype=torch.int64) for name in ("image_index", "label")}
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder), 0, tensors, {})
        header = read_shard_header(Path(folder), 0)
    assert header is not None
    return header["bytes"] / SMALL


def main() -> None:
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("--step_ms", type=float, required=True, help="Milliseconds of a measured step.")
    parser.add_argument("--step_latents", type=int, default=49152, help="Latents of that step.")
    parser.add_argument("--step_batch", type=int, default=1024, help="Rows of that step.")
    parser.add_argument("--tower_images_per_second", type=float, required=True, help="Of one device, on ready pixels.")
    parser.add_argument("--reading_ms", type=float, required=True, help="Of one processor, for an image.")
    parser.add_argument("--processors", type=int, nargs="+", default=[16, 64, 192], help="Of all machines together.")
    parser.add_argument("--hidden_size", type=int, default=768)
    parser.add_argument("--num_images", type=int, default=14_197_122, help="By default ImageNet-22k's.")
    parser.add_argument("--num_train_epochs", type=float, default=5.0)
    parser.add_argument("--per_device_train_batch_size", type=int, default=64)
    parser.add_argument("--latents", type=int, nargs="+", default=[3072, 49152, 1_000_000, 16_000_000])
    parser.add_argument("--num_devices", type=int, nargs="+", default=[1, 8])
    args = parse(parser)

    stored = {"float32": bytes_per_row(args.hidden_size, torch.float32)}
    stored["bfloat16"] = bytes_per_row(args.hidden_size, torch.bfloat16)
    print(f"Activations of {args.num_images:,} images, one layer of width {args.hidden_size}, with labels:")
    print("  on disk " + ", ".join(f"{kind} {size * args.num_images / 1e9:.1f} GB" for kind, size in stored.items()))
    print(f"{'devices':>11} {'processors':>11} {'images/s':>9} {'limited by':>11} {'hours':>7}")
    extraction = []
    for devices in args.num_devices:
        for processors in args.processors:
            speeds = {"towers": devices * args.tower_images_per_second, "reading": processors * 1000 / args.reading_ms}
            limit = min(speeds, key=lambda name: speeds[name])
            row = {"devices": devices, "processors": processors, "images_per_second": round(speeds[limit], 1)}
            extraction.append(row | {"limit": limit, "hours": round(args.num_images / speeds[limit] / 3600, 2)})
            print(f"{devices:>11} {processors:>11} {speeds[limit]:>9,.0f} {limit:>11} {extraction[-1]['hours']:>7.2f}")

    latent = bytes_per_latent(args.hidden_size)
    held = ", ".join(f"{kind} {size:,.0f}" for kind, size in latent.items())
    print(f"\nA latent: {held} bytes. Training for {args.num_train_epochs:g} epochs:")
    print(f"{'latents':>11} {'copy GB':>8} {'devices':>8} {'DDP GB':>8} {'FSDP GB':>8} {'hours':>9} {'state GB':>9}")
    rows = []
    for num_latents in args.latents:
        copy = latent["weights"] * num_latents / 1e9
        batch = args.per_device_train_batch_size * num_latents * 4 / 1e9
        per_row = args.step_ms / 1000 / args.step_batch * num_latents / args.step_latents
        hours = args.num_train_epochs * args.num_images * per_row / 3600
        for devices in args.num_devices:
            row = {
                "latents": num_latents,
                "copy_gb": round(copy, 3),
                "devices": devices,
                "ddp_gb": round((4 if devices == 1 else 4.5) * copy + batch, 2),
                "fsdp_gb": None if devices == 1 else round((4 / devices + 2) * copy + batch, 2),
                "hours": round(hours / devices, 3),
                "training_state_gb": round(3 * copy, 2),
            }
            rows.append(row)
            fsdp = "-" if row["fsdp_gb"] is None else f"{row['fsdp_gb']:.1f}"
            print(
                f"{num_latents:>11,} {copy:>8.2f} {devices:>8} {row['ddp_gb']:>8.1f} {fsdp:>8} {row['hours']:>9.2f} "
                f"{row['training_state_gb']:>9.1f}"
            )
    print("GB are of each device; state GB is a training checkpoint on disk\n(weights and Adam's state).")
    finish(args, __doc__, [{"bytes_per_latent": latent, "bytes_per_row": stored}, *extraction, *rows])


if __name__ == "__main__":
    main()
