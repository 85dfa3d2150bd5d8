"""How CLS rows are steered: the settings, and what each can be. Light to import, for the command line's help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .latent_edits import LatentEdits
from .schema import FLAG, Kind, check_fields, number, one_of, optional, setting, whole


if TYPE_CHECKING:
    from ..methods import Method

FINITE = number()
QUANTILE = number(above=0, below=1)
GAMMA = Kind(
    f"{FINITE.says}, or one a latent",
    lambda value: (isinstance(value, (tuple, list)) and len(value) > 0) or FINITE.accepts(value),
    lambda value, name: (
        tuple(FINITE.read(factor, name) for factor in value) if isinstance(value, (tuple, list)) else value
    ),
)
POSITIVES = ("majority", "query")
"""As [`select_positives`] has them."""


@dataclass(frozen=True)
class Steering:
    """How CLS rows are steered. Immutable: change one with `dataclasses.replace`.

    Args:
        method (`str`): one of [`METHODS`], by default the paper's `"vs2"`; docs/methods.md says what each does.
            Methods that fit something to a label set change scores, not image features: see
            `VS2CLIPForZeroShot.class_logits`.
        gamma (`float` or one a latent): amplification of the active latents.
        lambda_ (`float`): size of the step.
        gate (`float`, *optional*): quantile above which a row is left alone: of the FVU, or of [`row_distance`] for
            methods that do not read the SAE.
        fvu_threshold (`float`, *optional*): the gate's threshold tau itself, instead of a quantile.
        enabled (`bool`): off means plain CLIP, bit for bit.
        num_neighbors (`int`): of `"vs2++"`, the paper's N.
        positives (`str`): of `"vs2++"`, whose latents are amplified: those of the neighbours with the `"majority"`
            pseudo-label, or with the `"query"`'s own (eq. 4).
        coefficient (`float`): of `"distribution_norm"`, how much of both means is subtracted, 0 to 1.
        edits ([`LatentEdits`] or `dict` of its fields, *optional*): latents changed by hand, on top of any method; for
            edits alone use `gamma=1`. The gate holds for them too.
    """

    method: str = setting(
        help="vs2, centroid, distribution_norm, balanced_norm, prototypes and others: docs/methods.md.",
        default="vs2",
    )
    gamma: float | tuple[float, ...] = setting(GAMMA, help="Amplification of the active latents.", default=1.5)
    lambda_: float = setting(FINITE, help="Size of the step.", default=2.1)
    gate: float | None = setting(
        optional(FINITE),
        help="Quantile of FVU (or distance) above which an image is left to plain CLIP, or none.",
        default=None,
    )
    fvu_threshold: float | None = setting(
        optional(number(0, infinite=True)), help="That threshold itself, instead of a quantile.", default=None
    )
    enabled: bool = setting(FLAG, default=True)
    num_neighbors: int = setting(whole(1), default=50)
    positives: str = setting(one_of(POSITIVES), default="majority")
    edits: LatentEdits | None = None
    coefficient: float = setting(
        number(0, 1), help="Of distribution_norm: how much of both means is subtracted.", default=0.25
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", LatentEdits.of(self.edits))
        rule = self.rule
        check_fields(self)
        if self.gate is not None and self.fvu_threshold is not None:
            raise ValueError(
                f"gate={self.gate} (a quantile) and fvu_threshold={self.fvu_threshold} (the threshold itself) exclude "
                "each other. Give one; set the other to None."
            )
        if self.gate is not None and not QUANTILE.accepts(self.gate):
            raise ValueError(
                f"gate={self.gate} must be a quantile between 0 and 1. To give the FVU threshold itself, use "
                "fvu_threshold=."
            )
        if rule.one_direction and isinstance(self.gamma, tuple):
            raise ValueError(
                f"method={self.method!r} steers along one direction: gamma must be one number, not one a latent."
            )
        if self.fvu_threshold is not None and not self.measures_fvu:
            raise ValueError(
                f"method={self.method!r} does not read the SAE, so it has no FVU to compare with "
                f"fvu_threshold={self.fvu_threshold}. Give gate=, a quantile of the distance to the training rows."
            )

    @property
    def rule(self) -> Method:
        """The method itself, by its name."""
        from ..methods import method_named  # not at import: it needs torch

        return method_named(self.method)

    @property
    def measures_fvu(self) -> bool:
        """Whether the SAE is asked, so that the gate goes by FVU."""
        return self.rule.reads_latents or self.edits is not None

    @property
    def gamma_factors(self) -> tuple[float, ...]:
        """gamma as a tuple: one number, or one a latent."""
        return self.gamma if isinstance(self.gamma, tuple) else (self.gamma,)


def changed(before: Steering, settings: Mapping[str, Any]) -> Steering:
    """Settings with some changed. Tensors and arrays become a number or a tuple of them."""
    return replace(before, **excluding({name: _plain_value(value) for name, value in settings.items()}))


def excluding(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of which a gate takes an earlier threshold away, and the other way round."""
    for name, other in (("gate", "fvu_threshold"), ("fvu_threshold", "gate")):
        if settings.get(name) is not None:
            settings.setdefault(other, None)
    return settings


def refuse_settings_of_plain(name: str, steered: Any, settings: Mapping[str, Any]) -> None:
    """Raises `ValueError` on settings beside an option `name` that turns steering off."""
    if settings and steered is not None and not steered:
        raise ValueError(f"{name}=False and {next(iter(settings))}= exclude each other: plain CLIP has no settings.")


def _plain_value(setting: Any) -> Any:
    setting = setting.tolist() if hasattr(setting, "tolist") else setting
    return tuple(float(factor) for factor in setting) if isinstance(setting, (list, tuple)) else setting
