"""A checkpoint of another library: two files that are read, and refused, before they are believed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers.utils.hub import extract_commit_hash

from ..json_files import read_object
from ..place import HUB_ARGUMENTS, at_one_commit, look_for
from ..weight_files import check_numbers, read_tensors


CFG_NAME = "cfg.json"
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_KINDS = {int: "a whole number", str: "text", bool: "true or false", dict: "an object"}


@dataclass(frozen=True)
class Told:
    """What the files of another library may not say, and a user does."""

    layer: int | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class ForeignCheckpoint:
    """A configuration that has been read, the two files, for messages, and what they may not say."""

    config: dict[str, Any]
    config_path: str
    weights_path: str
    origin: dict[str, Any]
    """What a converted SAE records: format, name, commit, subfolder."""
    told: Told

    @classmethod
    def find(
        cls, library: str, name_or_path: str | os.PathLike, options: Mapping[str, Any], config: str, weights: str
    ) -> ForeignCheckpoint:
        """
        The configuration, read, and the place of the weights, in a folder or on the Hub (both of one commit).

        Raises:
            `OSError`: if a file is missing or can't be reached. `ValueError`: if the configuration is no JSON object.
                `TypeError`: on an option that is neither of a place nor of [`Told`].
        """
        place = dict(options)
        told = Told(**{name: place.pop(name) for name in Told.__dataclass_fields__ if name in place})
        strange = place.keys() - set(HUB_ARGUMENTS)
        if strange:
            raise TypeError(f"{sorted(strange)[0]}= is not known. Known places: {', '.join(HUB_ARGUMENTS[:-1])}.")
        place = at_one_commit(name_or_path, place, config)
        paths = {name: look_for(name_or_path, name, place) for name in (config, weights)}
        for name, path in paths.items():
            if path is None:
                where = f" in {place['subfolder']!r}" if place.get("subfolder") else ""
                raise OSError(
                    f"{name_or_path} has no {name}{where}: a checkpoint of {library} is a folder with {config} and "
                    f"{weights}. If it lies in a folder below, name that (on the Hub with subfolder=)."
                )
        config_path, weights_path = map(str, paths.values())
        is_local = os.path.isdir(name_or_path)
        origin = {
            "format": library,
            "name": Path(name_or_path).resolve().name
            if is_local
            else str(name_or_path),  # tells no place of this machine
            "revision": None if is_local else extract_commit_hash(config_path, None),
            "subfolder": place.get("subfolder") or None,
        }
        known = {name: value for name, value in origin.items() if value is not None}
        return cls(read_object(config_path), config_path, weights_path, known, told)

    def setting(self, name: str, kind: type, default: Any = None) -> Any:
        """A value of the configuration; `default` where there is none, or null. One of another kind, or missing
        without a default, is a `ValueError`."""
        value = self.config.get(name)
        if value is None:
            if default is None:
                raise ValueError(f"{self.config_path} lacks {name!r}, {_KINDS[kind]}. Save or download it again.")
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{self.config_path}: {name} is {repr(value)[:80]}, expected {_KINDS[kind]}.")
        return value

    def refuse(self, name: str, why: str) -> NoReturn:
        """Say that a setting has no exact counterpart here."""
        raise ValueError(
            f"{self.config_path}: {name}={repr(self.config.get(name))[:80]} can't be converted exactly: {why}."
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the weights file, in memory; see [`as_weights`]."""
        tensors, _ = read_tensors(self.weights_path)
        return as_weights({name: tensor.clone() for name, tensor in tensors.items()}, self.weights_path)

    def check(self, tensors: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse other tensors than these, and other shapes, by a `ValueError` with file, tensor and both shapes."""
        missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        if missing or extra:
            what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}, which has no place in a top-k SAE"
            raise ValueError(f"{self.weights_path} {what}. Expected {', '.join(expected)}.")
        for name, shape in expected.items():
            if tuple(tensors[name].shape) != shape:
                raise ValueError(
                    f"{self.weights_path}: {name} is {tuple(tensors[name].shape)}, by {self.config_path} it is "
                    f"{shape}."
                )


def as_weights(tensors: Mapping[str, Any], path: str) -> dict[str, torch.Tensor]:
    """Tensors in float32, or float64 where they are that: half precision loses nothing. What is no tensor of finite
    floats is a `ValueError`."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in _DTYPES:
            kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{path}: {name} is {kind}; weights are floats of 16, 32 or 64 bits.")
    check_numbers(tensors.items(), path)
    return {name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in tensors.items()}
