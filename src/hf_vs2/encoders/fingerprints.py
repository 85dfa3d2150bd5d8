"""Short marks by which a CLIP is known again: a few weights, a sample of all of them, a hash of every byte."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .families import family_of, tower_of
from .wrapped import weights_of


_FINGERPRINT_SIZE = 8
# Fields of a vision configuration that change the rows although the weights are the same.
_VISION_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels"),
    *("image_size", "patch_size", "hidden_act", "layer_norm_eps"),
)
_SAMPLED_ROWS = 8
_TOLERANCE = 0.008
"""Share of a weight's typical entry by which its sample may be off. Rounding to bfloat16, the coarsest precision,
moves it by 0.001."""


@torch.no_grad()
def vision_fingerprint(clip: Any) -> list[float]:
    """A few weights of the vision tower, enough to tell one CLIP from another and the same in float32 and bfloat16.

    Eight evenly spaced entries of each vector that its family names; of CLIP the class embedding and the two layer
    norms around the encoder.
    """
    tower = tower_of(clip)
    parts = (name.rpartition(".") for name in family_of(tower).fingerprint)
    return entries(weights_of(tower.get_submodule(module), name)[0] for module, _, name in parts)


def entries(vectors: Iterable[torch.Tensor]) -> list[float]:
    """Eight of each vector, evenly spaced."""
    picks = []
    for vector in vectors:
        step = max(1, len(vector) // _FINGERPRINT_SIZE)
        picks += vector.detach()[::step][:_FINGERPRINT_SIZE].float().tolist()
    return picks


def same_fingerprint(left: list[float], right: list[float]) -> bool:
    """Whether two fingerprints are of the same weights, be it in another precision."""
    # bfloat16 keeps 8 bits: the same weights agree to 0.4 %.
    return len(left) == len(right) and torch.allclose(torch.tensor(left), torch.tensor(right), rtol=0.01, atol=1e-6)


def model_fingerprint(tower: nn.Module) -> str:
    """16 hexadecimal digits of every weight of a vision tower and of the settings it runs with. All bytes are hashed:
    about a second for a ViT-L, and no fine-tuning, however small, goes unnoticed."""
    digest = hashlib.sha256()
    config: Any = tower.config
    digest.update(json.dumps({field: getattr(config, field, None) for field in _VISION_FIELDS}).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


# A sample of all weights, the same in every precision


def weight_samples(clip: nn.Module) -> dict[str, str]:
    """
    Two numbers for each weight of a CLIP (`"vision"`: of the vision tower, `"other"`: of the rest), or of a vision
    tower alone, in base64 (float16, little-endian): entries of eight of its rows, evenly spaced, or all of a vector,
    summed with two sets of coefficients. Weights are in the order of their names. One that can't be read here (of 8
    bits, on another process, not in memory) has NaN.
    """
    found = {part: np.array([sample.sums for sample in samples]) for part, samples in _samples(clip).items()}
    with np.errstate(over="ignore"):  # infinity, which like NaN is not compared
        return {part: base64.b64encode(sums.astype("<f2").tobytes()).decode() for part, sums in found.items()}


def other_weight(clip: nn.Module, recorded: Mapping[str, str]) -> str | None:
    """The first weight of `clip` that is not the one that [`weight_samples`] recorded, be it in another precision;
    `None` where all that can be compared are the same."""
    for part, samples in _samples(clip).items():
        before = np.frombuffer(base64.b64decode(recorded.get(part, "")), dtype="<f2").reshape(-1, 2).tolist()
        if len(before) != len(samples):  # quantised: layers of another kind hold its weights
            continue
        for sample, known in zip(samples, before, strict=True):
            for now, then in zip(sample.sums, known, strict=True):
                if math.isfinite(then) and abs(now - then) > _TOLERANCE * sample.size + 1e-6:  # not with NaN
                    return sample.name
    return None


def adapter_weight(clip: nn.Module) -> str | None:
    """A weight of an adapter, such as a LoRA, inside a CLIP and not merged into its weights; `None` where there is
    none."""
    return next((name for name, _, is_own in _unwrapped(clip) if not is_own), None)


class _Sample(NamedTuple):
    name: str
    sums: list[float]
    size: float
    """Root mean square of the entries."""


@torch.no_grad()
def _samples(clip: Any) -> dict[str, list[_Sample]]:
    """By part of the model, the vision tower's first."""
    vision = tower_of(clip)
    weights = {f"vision_model.{name}": weight for name, weight, is_own in _unwrapped(vision) if is_own}
    parts = {"vision": sorted(weights)}
    if vision is not clip and hasattr(clip, "text_model"):
        weights |= {name: weight for name, weight, is_own in _unwrapped(clip) if is_own}
        parts["other"] = sorted(set(weights) - set(parts["vision"]))
    return {part: [_sample(name, weights[name]) for name in names] for part, names in parts.items()}


def _sample(name: str, weight: torch.Tensor) -> _Sample:
    plain = type(weight) in (torch.Tensor, nn.Parameter) and weight.is_floating_point() and not weight.is_meta
    if not plain or not weight.numel():
        return _Sample(name, [math.nan, math.nan], math.nan)
    rows = weight if weight.ndim < 2 else weight[:: max(1, len(weight) // _SAMPLED_ROWS)][:_SAMPLED_ROWS]
    chosen = rows.reshape(-1).float()
    found = torch.cat([_waves(len(chosen), weight.device) @ chosen, chosen.norm()[None]]) / math.sqrt(len(chosen))
    *sums, size = found.tolist()
    return _Sample(name, sums, size)


@functools.cache
def _waves(count: int, device: torch.device) -> torch.Tensor:
    """Coefficients `(2, count)` of mean square 1. Their pitch rises all the way, so that a change of any shape, a
    constant or a wave, moves one of the two sums."""
    golden = (math.sqrt(5) - 1) / 2
    places = torch.arange(count, dtype=torch.float64)
    phases = math.pi * golden * places.square()
    return (math.sqrt(2) * torch.stack([phases.cos(), phases.sin()])).float().to(device)


def _unwrapped(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Name and weight of each parameter, and whether it is the model's own, not an adapter's. Layers of peft keep the
    one in whose place they are as `base_layer`; its weights have the names that they have without peft."""
    adapters = tuple(f"{name}." for name, part in module.named_modules() if hasattr(part, "base_layer"))
    for name, weight in module.named_parameters():
        is_own = not name.startswith(adapters) or ".base_layer." in name
        yield name.replace(".base_layer.", ".") if is_own else name, weight, is_own
