"""What a method is, and the registry of all methods.

A method says how a CLS row moves (`step`), what it fits to a label set from unlabelled rows (`fit`), or both.
Everything else (the gate, edits of latents, explanations, evaluation, the study, saving and loading) works from these
and asks for no method's name. docs/methods.md shows how to write one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, NamedTuple, Protocol

import torch

from ..functional.equations import keep_norm
from ..functional.label_free import LabelFit, RowStatistics, label_scores
from ..functional.sparse_ops import sparse_decode


ENTRY_POINTS = "hf_vs2.methods"
"""The group of entry points in which an installed package names modules that register methods."""


# What a method is given


class Statistics(Protocol):
    """What a step or a view may read of [`DomainStatistics`], on the rows' device."""

    @property
    def mean(self) -> torch.Tensor: ...
    @property
    def latent_mean(self) -> torch.Tensor: ...
    @property
    def latent_frequency(self) -> torch.Tensor: ...
    @property
    def of_rows(self) -> RowStatistics: ...


class NeighborCodes(NamedTuple):
    """The codes of each row's neighbours in the corpus, as eq. 5 takes them."""

    values: torch.Tensor
    """`(batch, N, top_k)`."""
    indices: torch.Tensor
    """`(batch, N, top_k)` int64."""
    positive: torch.Tensor
    """`(batch, N)` bool."""


@dataclass(frozen=True)
class Batch:
    """
    CLS rows and what a step may ask of them.

    Args:
        x (`torch.Tensor` of shape `(batch, hidden_size)`): the rows, in float32 or finer.
        code ([`SAEOutput`], *optional*): what the SAE says of them; `None` of methods that do not read it. Its
            `values` and `indices` `(batch, top_k)`, the active latents, and its `reconstruction` `(batch,
            hidden_size)` are properties of the batch.
        decoder (`torch.Tensor` of shape `(num_latents, hidden_size)`): a direction `d_j` a latent.
        mean (`torch.Tensor` of shape `(hidden_size,)`): of the SAE's training rows.
        gamma (`float` or `torch.Tensor` of shape `(num_latents,)`), lambda_ (`float`): the settings.
        statistics (`() -> Statistics`), neighbors (`() -> NeighborCodes`): read when called; a `ValueError` says what
            is missing.
    """

    x: torch.Tensor
    code: Any
    decoder: torch.Tensor
    mean: torch.Tensor
    gamma: float | torch.Tensor
    lambda_: float
    statistics: Callable[[], Statistics]
    neighbors: Callable[[], NeighborCodes]

    @property
    def alpha(self) -> float:
        """`lambda (gamma - 1)`.

        Raises:
            `ValueError`: there is one gamma a latent, which a method without `one_direction` has to take.
        """
        if isinstance(self.gamma, torch.Tensor):
            raise ValueError("gamma is one number a latent here: there is no one alpha. See Method's one_direction.")
        return self.lambda_ * (self.gamma - 1)

    @property
    def values(self) -> torch.Tensor:
        return self.code.latent_values

    @property
    def indices(self) -> torch.Tensor:
        return self.code.latent_indices

    @property
    def reconstruction(self) -> torch.Tensor:
        return self.code.reconstruction

    def moved(
        self,
        change: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        start: torch.Tensor | None = None,
        keeps_norm: bool = True,
    ) -> LatentStep:
        """A [`LatentStep`] from `start` (by default the rows themselves) by `change` of `latents` (by default
        none)."""
        if change is None or latents is None:
            change, latents = self.values[:, :0], self.indices[:, :0]
        return LatentStep(self.x if start is None else start.to(self.x.dtype), change, latents, keeps_norm)


class LatentStep(NamedTuple):
    """`x` becomes `start + sum_j change_j d_j`, then, where `keeps_norm`, as long as `x` was. Steering, edits and
    explanations all work on this form."""

    start: torch.Tensor
    """`(batch, hidden_size)`: `x` itself, or what the method puts in its place."""
    change: torch.Tensor
    """`(batch, m)`: what is added to the code, the size of the step included."""
    latents: torch.Tensor
    """`(batch, m)` int64. One may occur twice."""
    keeps_norm: bool

    def move(self, x: torch.Tensor, decoder: torch.Tensor) -> torch.Tensor:
        """The moved rows, `(batch, hidden_size)`."""
        moved = self.start
        if self.change.shape[1]:
            moved = moved + sparse_decode(self.change, self.latents, decoder).to(x.dtype)
        return keep_norm(moved, x) if self.keeps_norm else moved


class UnlabelledRows(Protocol):
    """The unlabelled images that a fit may look at, under the method's own step."""

    def mean(self) -> torch.Tensor:
        """Mean unit embedding `(projection_dim,)`."""

    def embeds(self) -> torch.Tensor:
        """Unit embeddings `(n, projection_dim)`."""

    def views(self) -> tuple[torch.Tensor, ...]:
        """The method's views of the same rows, `(n, d_v)` each."""

    @property
    def coefficient(self) -> float:
        """The setting of that name."""

    def temperature(self) -> float:
        """`exp(logit_scale)` of the CLIP. `ValueError`: its scores are no softmax."""


@dataclass(frozen=True)
class View:
    """
    Something else that prototypes look at beside the embedding.

    Args:
        of (`(Batch) -> torch.Tensor`): unit rows `(batch, d_v)`.
        width (`(num_latents, hidden_size) -> int`): `d_v`.
        reads_latents (`bool`): whether it needs the code.
    """

    of: Callable[[Batch], torch.Tensor]
    width: Callable[[int, int], int]
    reads_latents: bool = False


# A method


def prototype_scores(
    embeds: torch.Tensor, classes: torch.Tensor, fit: LabelFit, views: Sequence[torch.Tensor]
) -> torch.Tensor:
    """By the fitted prototypes alone, see [`label_scores`]."""
    return label_scores(embeds, fit, views)


@dataclass(frozen=True)
class Method:
    """
    Args:
        name (`str`): as settings, flags and result files have it.
        label (`str`): as tables and figures have it.
        summary (`str`): one sentence for lists of methods.
        step (`(Batch) -> LatentStep`, *optional*): how a row moves; without it rows stay.
        fit (`(classes, UnlabelledRows) -> LabelFit`, *optional*): what is fitted for unit class embeddings
            `(num_classes, projection_dim)`; without it scores are cosines, as in CLIP.
        score (`(embeds, classes, LabelFit, views) -> scores`): how the fit scores unit embeddings `(batch,
            projection_dim)`, on the scale of cosines, `(batch, num_classes)`; by default [`label_scores`].
        views (`tuple[View, ...]`): of methods with a fit.
        needs_statistics (`bool`): of unlabelled rows; a method with a fit always does. needs_rows (`bool`): the rows
            themselves, not only their means. needs_corpus (`bool`): for neighbours.
        needs_softmax (`bool`): whether its fit reads the probabilities of a softmax, which SigLIP does not give.
        last_layer_only (`bool`): whether it has no meaning at an inner layer.
        one_direction (`bool`): whether it needs one gamma for all latents.
        explains (`bool`): whether its scores are sums over the latents that it changes.
        shows (`tuple[str, ...]`): which of the settings `"gamma"`, `"lambda"` and `"coefficient"` it reads, which a
            result has to name.
        controls (mapping `str -> str`): rows of a comparison that run this method with another dictionary in the SAE's
            place, see [`control_model`]: the row's name -> the dictionary.
        compared (`bool`): whether [`evaluate`] has it in its table when nobody names methods; compared_gated (`bool`):
            its gated row too; headline (`bool`): whether a terminal shows these without being asked for all.
        candidate (`bool`): whether [`recommend`] compares it where there are labels.
    """

    name: str
    label: str
    summary: str = ""
    step: Callable[[Batch], LatentStep] | None = None
    fit: Callable[[torch.Tensor, UnlabelledRows], LabelFit] | None = None
    score: Callable[..., torch.Tensor] = prototype_scores
    views: tuple[View, ...] = ()
    needs_statistics: bool = False
    needs_rows: bool = False
    needs_corpus: bool = False
    needs_softmax: bool = False
    last_layer_only: bool = False
    one_direction: bool = False
    explains: bool = False
    shows: tuple[str, ...] = ()
    controls: Mapping[str, str] = field(default_factory=dict)
    compared: bool = False
    compared_gated: bool = False
    headline: bool = False
    candidate: bool = False

    def __post_init__(self) -> None:
        if not self.name or not self.label or any(mark.isspace() for mark in self.name):
            raise ValueError(
                f"A method needs a name without blanks, and a label; these are {self.name!r} and {self.label!r}."
            )
        if self.name.endswith(GATE):
            raise ValueError(
                f"A method's name must not end in {GATE!r}, which tables add to gated rows: {self.name!r}."
            )
        for part in ("step", "fit", "score"):
            value = getattr(self, part)
            if not (callable(value) or (value is None and part != "score")):
                raise ValueError(f"Method {self.name!r}: {part} must be a function, not {value!r}.")
        if self.step is None and self.fit is None and self.name != PLAIN:
            raise ValueError(
                f"Method {self.name!r} has neither a step nor a fit: it would be plain CLIP under another name."
            )
        if self.views and self.fit is None:
            raise ValueError(f"Method {self.name!r} has views, which prototypes look at, but no fit that makes any.")
        if self.fit is not None:
            object.__setattr__(self, "needs_statistics", True)
        if self.needs_statistics or self.needs_corpus:
            object.__setattr__(self, "last_layer_only", True)

    @property
    def acts(self) -> bool:
        """Whether it is anything but plain CLIP."""
        return self.step is not None or self.fit is not None

    @property
    def reads_latents(self) -> bool:
        """Whether it needs the SAE, whose FVU then is the gate's measure; else that is the distance to the training
        rows."""
        return self.step is not None or self.fit is None or any(view.reads_latents for view in self.views)

    def view_widths(self, num_latents: int, hidden_size: int) -> list[int]:
        return [view.width(num_latents, hidden_size) for view in self.views]


PLAIN = "none"
"""The method that is no method."""
GATE = "+gate"
"""What the name of a gated row of a comparison ends in."""
BEFORE = {"distribution_norm": "full_distribution_norm"}
"""What a method's name means in files that say no `coefficient`: another rule had it when they were saved."""
DICTIONARIES = {"random": "random directions", "pca": "principal components"}
"""What can stand in an SAE's place for a control, and what tables call it."""
METHODS: dict[str, Method] = {}
"""All methods by name, in the order of tables."""


def register(method: Method, exist_ok: bool = False) -> Method:
    """
    Make a method known everywhere by its name.

    Args:
        method ([`Method`]): the method.
        exist_ok (`bool`): let it take the place of another of its name, as when a cell of a notebook is run again.

    Raises:
        `ValueError`: another method, or another row of a comparison, has the name.
    """
    there = METHODS.get(method.name)
    if there is None and method.name in rows_by_name():
        raise ValueError(f"{method.name!r} is a row of every comparison already. Give your method another name.")
    if there not in (None, method) and not exist_ok:
        raise ValueError(
            f"There is a method {method.name!r} already: {there.label}. Give yours another name, or exist_ok=True to "
            "put it in the place of that one."
        )
    METHODS[method.name] = method
    return method


def method_named(name: Any) -> Method:
    """
    The method of that name; modules that installed packages list as entry points `hf_vs2.methods` are imported when it
    is missing.

    Raises:
        `ValueError`: there is none.
    """
    if not isinstance(name, str):
        raise ValueError(f"method must be a name, one of {list(METHODS)}, not {name!r}.")
    method = find_method(name)
    if method is None:
        raise ValueError(
            f"method={name!r} is not known. Use one of {list(METHODS)}. A method of your own is known once the module "
            "that registers it is imported."
        )
    return method


def find_method(name: str) -> Method | None:
    """The same, or `None`."""
    if name not in METHODS:
        for entry in entry_points(group=ENTRY_POINTS):
            entry.load()
    return METHODS.get(name)


class Row(NamedTuple):
    """What a row of a comparison runs."""

    rule: Method
    gated: bool = False
    dictionary: str | None = None
    """Of a control, what stands in the SAE's place."""

    @property
    def label(self) -> str:
        """As tables and figures have it."""
        parts = [self.rule.label, DICTIONARIES.get(self.dictionary or "", self.dictionary), self.gated and "gated"]
        return ", ".join(part for part in parts if part)


def rows_by_name() -> dict[str, Row]:
    """Every row that a comparison can have: each method, its gated row, its controls; `"clip"` is plain CLIP."""
    rows = {"clip": Row(METHODS[PLAIN])} if PLAIN in METHODS else {}  # which is registered first
    for rule in METHODS.values():
        if rule.acts:
            controls = {name: Row(rule, dictionary=dictionary) for name, dictionary in rule.controls.items()}
            rows |= {rule.name: Row(rule), rule.name + GATE: Row(rule, gated=True), **controls}
    return rows


def row_label(name: str) -> str:
    """What tables and figures call a row of a comparison; a name that no method has stays as it is."""
    row = rows_by_name().get(name)
    return name if row is None else row.label


def then(step_of: str, fit_of: str, **facts: Any) -> Method:
    """The method that moves rows as `step_of` does and scores them as `fit_of` does, registered as `"step_of+fit_of"`
    if no other name is given."""
    step, fit = method_named(step_of), method_named(fit_of)
    if step.needs_corpus or step.step is None or fit.fit is None:
        raise ValueError(
            f"{step_of!r} then {fit_of!r} is no method: the first must have a step that needs no corpus, the second a "
            "fit."
        )
    given = {name: getattr(step, name) for name in ("step", "one_direction")}
    given |= {name: getattr(fit, name) for name in ("fit", "score", "views", "needs_softmax")}
    given["shows"] = tuple(dict.fromkeys([*step.shows, *fit.shows]))
    given["needs_rows"] = True  # the mean of the images as they were is not that of the moved ones
    label = f"{step.label}, then {fit.label}"
    return register(Method(**{"name": f"{step_of}+{fit_of}", "label": label, **given, **facts}))


def markdown_table() -> str:
    """All methods as the Markdown table of docs/methods.md."""
    lines = ["| `method=` | in tables | what it does | gate | needs |", "|---|---|---|---|---|"]
    for method in METHODS.values():
        needs = {"corpus": method.needs_corpus, "rows": method.needs_rows, "statistics": method.needs_statistics}
        needed = next((name for name, needed in needs.items() if needed), "")
        gate = ("FVU" if method.reads_latents else "distance") if method.acts else ""
        lines.append(f"| `{method.name}` | {method.label} | {method.summary} | {gate} | {needed} |")
    return "\n".join(lines)
