"""Latents changed by hand: amplified, suppressed, or set to a value."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

from .schema import is_finite, shown


if TYPE_CHECKING:
    import torch


class EditTable(NamedTuple):
    """Edits as the equations take them: an edited latent's value becomes `factor * c + target`. Each is
    `(num_edits,)`."""

    latents: torch.Tensor
    """int64."""
    factors: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class LatentEdits:
    """
    What an image's code is changed to, latent by latent, on every image. Immutable.

    An edit takes the place of whatever the method does with that latent: VS2 makes `c` of an active latent
    `(1 + lambda (gamma - 1)) c`, and an edited one what is said here.

    Args:
        amplify (mapping `int -> float`): multiply the latent's value. Nothing happens where it is not active.
        suppress (sequence of `int`): make its value 0.
        set (mapping `int -> float`): make it this value, whether or not it is active.

    Raises:
        `ValueError`: on a latent that is no whole number of at least 0 or is named twice, and on a value
            that is not finite.
    """

    amplify: Any = ()
    suppress: Any = ()
    set: Any = ()

    def __post_init__(self) -> None:
        # Kept as sorted tuples, so that edits can be compared and nobody can change them.
        object.__setattr__(self, "amplify", _pairs("amplify", self.amplify))
        object.__setattr__(self, "set", _pairs("set", self.set))
        if isinstance(self.suppress, (str, Mapping)) or not isinstance(self.suppress, Iterable):
            raise ValueError(f"suppress must be a list of latents, such as [4, 9]; it is {self.suppress!r}.")
        latents = tuple(sorted(_latent("suppress", latent) for latent in self.suppress))
        object.__setattr__(self, "suppress", latents)
        twice = [latent for latent, count in Counter(self.latents).items() if count > 1]
        if twice:
            raise ValueError(f"Latent {twice[0]} has two edits: give it one of amplify, suppress and set.")

    @classmethod
    def of(cls, edits: LatentEdits | Mapping[str, Any] | None) -> LatentEdits | None:
        """From a mapping with the keys `amplify`, `suppress` and `set`, as a `config.json` holds it. `None` for no
        edit at all."""
        if edits is None or isinstance(edits, LatentEdits):
            return edits or None
        if not isinstance(edits, Mapping):
            raise ValueError(f"edits must be LatentEdits or a dict of its fields, not {edits!r}.")
        known = [field.name for field in fields(cls)]
        for name in edits:
            if name not in known:
                raise ValueError(f"edits has {name!r}; expected some of {known}, as in {{'amplify': {{17: 3.0}}}}.")
        return cls(**edits) or None

    def __bool__(self) -> bool:
        return bool(self.latents)

    @property
    def latents(self) -> list[int]:
        """The edited latents."""
        return [*(latent for latent, _ in self.amplify), *self.suppress, *(latent for latent, _ in self.set)]

    def table(self, device: torch.device) -> EditTable:
        """The edits as tensors on a device."""
        import torch

        rest = len(self.suppress)
        factors = [*(factor for _, factor in self.amplify), *[0.0] * (rest + len(self.set))]
        targets = [*[0.0] * (len(self.amplify) + rest), *(target for _, target in self.set)]
        return EditTable(
            torch.tensor(self.latents, dtype=torch.int64, device=device),
            torch.tensor(factors, dtype=torch.float32, device=device),
            torch.tensor(targets, dtype=torch.float32, device=device),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; what is empty is left out."""
        found = {
            "amplify": {str(latent): factor for latent, factor in self.amplify},
            "suppress": list(self.suppress),
            "set": {str(latent): value for latent, value in self.set},
        }
        return {name: value for name, value in found.items() if value}


def _pairs(name: str, given: Any) -> tuple[tuple[int, float], ...]:
    try:
        found = dict(given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must map latents to numbers, such as {{17: 3.0}}; it is {given!r}.") from error
    if isinstance(given, Sequence) and len(found) < len(given):
        raise ValueError(f"{name} names a latent twice: {given!r}.")
    pairs = []
    for latent, value in found.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not is_finite(value):
            raise ValueError(f"{name} of latent {latent} must be a finite number, not {shown(value)}.")
        pairs.append((_latent(name, latent), float(value)))
    return tuple(sorted(pairs))


def _latent(name: str, latent: Any) -> int:
    """A latent's number; JSON has text for the keys of an object."""
    if isinstance(latent, str) and latent.isascii() and latent.isdigit():
        return int(latent)
    try:
        index = -1 if isinstance(latent, bool) else operator.index(latent)
    except TypeError as error:
        raise ValueError(f"{name} names the latent {latent!r}; expected its number.") from error
    if index < 0:
        raise ValueError(f"{name} names the latent {latent!r}; latents are counted from 0.")
    return index
