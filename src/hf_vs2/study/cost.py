"""What steering costs: FLOPs, parameters, time and memory of one forward pass with and without it, and of SAE
training.

FLOPs are those of matrix products, convolutions and sparse sums, a multiplication and an addition counted as two;
elementwise work (normalisation, activations, top-k, rescaling) is counted on neither side, as is the custom.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel
from transformers import initialization as init

from ..clip.modeling import VS2CLIPForZeroShot
from ..config.sae import SAEConfig
from ..config.schema import COUNT
from ..encoders.families import embedding_width, family_of, tower_of
from ..functional.sparse_ops import torch_operations_only
from ..sae.modeling import SAEModel


WARM_UP = 3
TRAINING_ROWS = 256
"""Rows of the training step whose FLOPs are counted; what is done once a batch is shared among them."""


def measure_cost(
    clip: CLIPModel, sae: SAEModel, *, batch_size: int = 1, num_classes: int = 100, repeats: int = 30
) -> dict[str, Any]:
    """
    Compare plain CLIP with the same CLIP steered: from pixels to scores of `num_classes` cached class embeddings.

    Every image is steered (no gate), which is the dearer case. Both models are left as they were found.

    Args:
        clip, sae: where and in the dtype in which they are to be measured.
        batch_size, repeats: of the timing: images a call, and pairs of calls.
        num_classes: rows of the class matrix.

    Returns:
        JSON-able: `device`, `dtype`, `threads`, `torch`, `batch_size`, `image_size`, `num_classes`, and the dicts of
        [`count_flops`] under `flops`, [`count_parameters`] under `parameters`, [`count_training_flops`] under
        `training`, [`time_pairs`] under `time` and [`peak_memory`] under `memory`.

    Raises:
        ValueError: the SAE belongs to another CLIP, or a number is below 1.
    """
    for name, number in (("batch_size", batch_size), ("num_classes", num_classes), ("repeats", repeats)):
        COUNT.read(number, name)
    return {
        "device": torch.cuda.get_device_name(clip.device) if clip.device.type == "cuda" else str(clip.device),
        "dtype": str(clip.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch_size": batch_size,
        "image_size": clip.config.vision_config.image_size,
        "num_classes": num_classes,
        "flops": count_flops(clip, sae, num_classes),
        "parameters": count_parameters(clip, sae),
        "training": count_training_flops(sae.config),
        "time": time_pairs(clip, sae, batch_size, num_classes, repeats),
        "memory": peak_memory(clip, sae, batch_size, num_classes),
    }


# FLOPs and parameters


def count_flops(clip: CLIPModel, sae: SAEModel, num_classes: int = 100) -> dict[str, Any]:
    """
    FLOPs of one image from pixels to class scores, counted by torch's own counter while the model runs.

    The counter does not know the sparse sum of decoder directions (`embedding_bag`); its real multiplications and
    additions, `2 * top_k * hidden_size` a sum, are added by formula.

    Returns:
        `plain`, `steered`, `added` (FLOPs an image), `added_percent`, `added_by_formula` (the part of `added` that
        torch's counter would have missed) and `attention` (the part of `plain` that lies in attention's two products,
        which counters that go by modules leave out).
    """
    model, pixels, classes = _setting(clip, sae, 1, num_classes)
    counts = {}
    for name, enabled in (("plain", False), ("steered", True)):
        # Fused attention on a CPU is unknown to the counter; the plain form does the same products.
        with model.steering(enabled=enabled), sdpa_kernel(SDPBackend.MATH), _counting() as counter:
            _scores(model, pixels, classes)
        counts[name] = counter
    plain, steered = (counts[name].get_total_flops() for name in ("plain", "steered"))
    return {
        "plain": plain,
        "steered": steered,
        "added": steered - plain,
        "added_percent": 100 * (steered - plain) / plain,
        "added_by_formula": _by_formula(counts["steered"]) - _by_formula(counts["plain"]),
        "attention": counts["plain"].get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0),
    }


def count_parameters(clip: CLIPModel, sae: SAEModel) -> dict[str, Any]:
    """`clip` (both towers), `image_side` (vision tower and projection), `sae`, and `added_percent` of the image
    side."""
    image_side = _size(tower_of(clip)) + _size(family_of(clip).projection(clip))
    return {
        "clip": _size(clip),
        "image_side": image_side,
        "sae": _size(sae),
        "added_percent": 100 * _size(sae) / image_side,
    }


def count_training_flops(config: SAEConfig) -> dict[str, Any]:
    """
    FLOPs of forward and backward of an SAE a sample, on cached rows, without extraction, AuxK and optimizer.

    Returns:
        `per_sample` as this implementation works, `added_by_formula` (the part of it that torch's counter would have
        missed), and `dense_encoder`: three times the encoder's product, what a dense backward of it alone would take.
    """
    num_latents, hidden_size = config.weight_shape
    with torch.inference_mode(False), torch.enable_grad(), _counting() as counter:
        SAEModel(config)(torch.randn(TRAINING_ROWS, hidden_size)).loss.backward()
    return {
        "per_sample": counter.get_total_flops() / TRAINING_ROWS,
        "added_by_formula": _by_formula(counter) / TRAINING_ROWS,
        "dense_encoder": 3 * 2 * hidden_size * num_latents,
    }


def _bag_flops(weight: tuple[int, ...], indices: tuple[int, ...], *_: Any, **__: Any) -> int:
    """A weighted sum of rows of `weight`, or with per-sample weights' gradient the dot products with them."""
    return 2 * indices[0] * weight[1]


def _bag_gradient_flops(
    grad: tuple[int, ...], weight: tuple[int, ...], indices: tuple[int, ...], *_: Any, **__: Any
) -> int:
    return _bag_flops(weight, indices)


_FORMULAS = {
    torch.ops.aten._embedding_bag: _bag_flops,
    torch.ops.aten._embedding_bag_forward_only: _bag_flops,
    torch.ops.aten._embedding_bag_per_sample_weights_backward: _bag_gradient_flops,
}


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    with torch_operations_only(), FlopCounterMode(display=False, custom_mapping=dict(_FORMULAS)) as counter:
        yield counter


def _by_formula(counter: FlopCounterMode) -> int:
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(operation, 0) for operation in _FORMULAS)


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Time


def time_pairs(clip: CLIPModel, sae: SAEModel, batch_size: int, num_classes: int, repeats: int) -> dict[str, Any]:
    """
    Wall time of a call with and without steering, taken in pairs whose order alternates.

    Returns:
        `plain_ms`, `steered_ms` (medians a call), `ratio` (median of the pairs' steered over plain), `ratio_iqr` (its
        first and third quartile) and `pairs`.
    """
    model, pixels, classes = _setting(clip, sae, batch_size, num_classes)

    def seconds(enabled: bool) -> float:
        with model.steering(enabled=enabled):
            _wait(clip)
            start = time.perf_counter()
            _scores(model, pixels, classes)
            _wait(clip)
            return time.perf_counter() - start

    for _ in range(WARM_UP):
        seconds(False), seconds(True)
    pairs = []
    for number in range(repeats):
        first = seconds(number % 2 == 1)
        second = seconds(number % 2 == 0)
        pairs.append((second, first) if number % 2 else (first, second))
    ratios = torch.tensor([steered / plain for plain, steered in pairs], dtype=torch.float64)
    low, middle, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return {
        "plain_ms": 1000 * statistics.median(plain for plain, _ in pairs),
        "steered_ms": 1000 * statistics.median(steered for _, steered in pairs),
        "ratio": middle,
        "ratio_iqr": [low, high],
        "pairs": repeats,
    }


def _wait(clip: CLIPModel) -> None:
    if clip.device.type == "cuda":
        torch.cuda.synchronize(clip.device)


# Memory


def peak_memory(clip: CLIPModel, sae: SAEModel, batch_size: int = 1, num_classes: int = 100) -> dict[str, Any] | None:
    """
    Peak memory of a call in bytes: `plain`, `steered`, `added`, `added_percent`, and `kind`, how it was taken.

    On a GPU the weights plus what the call allocates beyond them. On a CPU the largest resident set of two fresh
    processes, libraries included, that build models of these sizes and run them; `None` where the system does not tell
    it.
    """
    plain: int | None
    steered: int | None
    if clip.device.type == "cuda":
        kind = "weights and torch.cuda.max_memory_allocated of a call"
        plain, steered = _cuda_peak(clip, sae, batch_size, num_classes)
    else:
        kind = "largest resident set of a fresh process, libraries included"
        plain, steered = (_process_peak(clip, one, batch_size, num_classes) for one in (None, sae))
    if plain is None or steered is None:
        return None
    added = steered - plain
    return {"kind": kind, "plain": plain, "steered": steered, "added": added, "added_percent": 100 * added / plain}


def _cuda_peak(clip: CLIPModel, sae: SAEModel, batch_size: int, num_classes: int) -> list[int]:
    model, pixels, classes = _setting(clip, sae, batch_size, num_classes)
    peaks = []
    for enabled in (False, True):
        with model.steering(enabled=enabled):
            _scores(model, pixels, classes)
            _wait(clip)
            before = torch.cuda.memory_allocated(clip.device)
            torch.cuda.reset_peak_memory_stats(clip.device)
            _scores(model, pixels, classes)
            _wait(clip)
            grown = torch.cuda.max_memory_allocated(clip.device) - before
        peaks.append(grown + _bytes(clip) + (_bytes(sae) if enabled else 0))
    return peaks


def _bytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _process_peak(clip: CLIPModel, sae: SAEModel | None, batch_size: int, num_classes: int) -> int | None:
    """The largest resident set of a process of its own; the weights do not matter, so only the configs are sent."""
    task = {
        "clip": clip.config.to_dict(),
        "attention": clip.config._attn_implementation,
        "dtype": str(clip.dtype).removeprefix("torch."),
        "sae": None if sae is None else sae.config.to_dict(),
        "sae_dtype": None if sae is None else str(sae.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "num_classes": num_classes,
        "threads": torch.get_num_threads(),
    }
    # As multiprocessing does it: what could be imported here can be there. Its own start would run the caller's script
    # again.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    ran = subprocess.run(  # noqa: S603  this module, in this Python
        [sys.executable, "-m", __name__],
        input=json.dumps(task),
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(ran.stdout)


def _run_in_process(task: dict[str, Any]) -> int | None:
    torch.set_num_threads(task["threads"])
    sae = None if task["sae"] is None else _blank_sae(task["sae"], getattr(torch, task["sae_dtype"]))
    config = CLIPConfig.from_dict(task["clip"])
    clip = CLIPModel._from_config(
        config, dtype=getattr(torch, task["dtype"]), attn_implementation=task["attention"]
    ).eval()
    if sae is None:
        pixels, classes = _inputs(clip, task["batch_size"], task["num_classes"])
        for _ in range(WARM_UP):
            with torch.no_grad():
                normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1) @ classes.T
    else:
        with init.no_init_weights():  # the wrapper would give this SAE the random start that was avoided
            model, pixels, classes = _setting(clip, sae, task["batch_size"], task["num_classes"])
        for _ in range(WARM_UP):
            _scores(model, pixels, classes)
    return _largest_resident_set()


def _blank_sae(config: dict[str, Any], dtype: torch.dtype) -> SAEModel:
    """An SAE of that size, made without the memory that a random start needs for a moment."""
    with torch.device("meta"):
        sae = SAEModel(SAEConfig.from_dict(config | {"base_model_fingerprint": None}))  # of weights which are not here
    sae = sae.to(dtype).to_empty(device="cpu").eval()
    with torch.no_grad():
        for tensor in (*sae.parameters(), *sae.buffers()):
            tensor.normal_(std=0.02)
    return sae


def _largest_resident_set() -> int | None:
    """Bytes. Linux hands getrusage's figure down from the process that started this one, so the kernel's own is read
    there."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


# What is run


def _setting(
    clip: CLIPModel, sae: SAEModel, batch_size: int, num_classes: int
) -> tuple[VS2CLIPForZeroShot, torch.Tensor, torch.Tensor]:
    pixels, classes = _inputs(clip, batch_size, num_classes)
    return VS2CLIPForZeroShot(clip, sae), pixels, classes


def _inputs(clip: CLIPModel, batch_size: int, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = clip.config.vision_config.image_size
    channels = clip.config.vision_config.num_channels
    pixels = torch.randn(batch_size, channels, size, size, generator=generator)
    classes = torch.randn(num_classes, embedding_width(clip), generator=generator)
    return pixels.to(clip.device, clip.dtype), normalize(classes, dim=-1).to(clip.device, clip.dtype)


@torch.no_grad()
def _scores(model: VS2CLIPForZeroShot, pixels: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    (features, *_) = model.image_features(pixels).to_tuple()
    return normalize(features, dim=-1) @ classes.T


if __name__ == "__main__":
    print(json.dumps(_run_in_process(json.load(sys.stdin))))
