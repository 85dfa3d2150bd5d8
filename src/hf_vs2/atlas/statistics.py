"""What each latent does over a set of rows, gathered block by block: nothing here grows as rows times latents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn.functional import normalize

from ..clip.modeling import VS2CLIPForZeroShot
from ..data.stores.rows import Rows
from ..files.progress import progress_bar
from ..training.calibration import refuse_overflow


NUM_BINS = 24
NUM_INTERVALS, EXAMPLES = 4, 4


class Largest:
    """
    The largest of many scores for each of `num_owners`, merged block by block.

    Attributes:
        scores, rows (`torch.Tensor`): `(num_owners, top)`, largest first, the earlier row first where two are equal;
            `-inf` and -1 where there are fewer.
    """

    def __init__(self, num_owners: int, top: int):
        self.scores = torch.full((num_owners, top), -torch.inf)
        self.rows = torch.full((num_owners, top), -1)

    def add(self, owner: torch.Tensor, score: torch.Tensor, row: torch.Tensor) -> None:
        """Merges (owner, score, row) triples, each `(n,)`, in: one sort of all that compete, no matrix of them."""
        num_owners, top = self.rows.shape
        kept = self.rows.flatten() >= 0
        score = torch.cat([self.scores.flatten()[kept], score])
        owner = torch.cat([torch.arange(num_owners).repeat_interleave(top)[kept], owner])
        row = torch.cat([self.rows.flatten()[kept], row])
        # Stable sorts, the last key first: by owner, in it by score, and equal scores in the order of the rows.
        order = score.argsort(descending=True, stable=True)
        order = order[owner[order].argsort(stable=True)]
        owner = owner[order]
        size = owner.bincount(minlength=num_owners)
        place = torch.arange(len(owner)) - (size.cumsum(0) - size)[owner]
        winners = place < top
        place, owner, order = place[winners], owner[winners], order[winners]
        self.scores[owner, place] = score[order]
        self.rows[owner, place] = row[order]

    def of(self, owner: int) -> list[int]:
        """The rows of one owner, its largest score first."""
        rows = self.rows[owner]
        return rows[rows >= 0].tolist()


@dataclass
class LatentStatistics:
    """
    Counts of each latent, and the rows where it is strongest; [`LatentStatistics.add`] takes codes block by block.

    Attributes:
        count (`torch.Tensor`): rows on which the latent is active (its value is not 0), int64 `(num_latents,)`.
        total, low, high: sum, smallest and largest of its values, `(num_latents,)`; `low` and `high` count 0 in, so
            that every histogram has its zero.
        strongest ([`Largest`]): its largest values and the rows that have them.
        active: the active latents of each block's rows, int32 `(batch, top_k)`; `num_latents` where there are fewer.
        by_class: active rows of each class, int64 `(num_latents, num_classes)`; no columns without labels.
        num_rows (`int`): rows seen.
        fvu: per-sample FVU of each block's rows.
    """

    num_latents: int
    top: int
    num_classes: int = 0
    num_rows: int = 0
    fvu: list[torch.Tensor] = field(default_factory=list)
    active: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.count = torch.zeros(self.num_latents, dtype=torch.int64)
        self.total = torch.zeros(self.num_latents, dtype=torch.float64)
        self.low, self.high = torch.zeros(self.num_latents), torch.zeros(self.num_latents)
        self.strongest = Largest(self.num_latents, self.top)
        self.by_class = torch.zeros(self.num_latents, self.num_classes, dtype=torch.int64)

    def add(self, values: torch.Tensor, indices: torch.Tensor, labels: torch.Tensor | None = None) -> None:
        """The codes of the next rows: `values`, `indices` `(batch, top_k)`, `labels` `(batch,)` int64."""
        rows = torch.arange(self.num_rows, self.num_rows + len(values)).unsqueeze(-1).expand_as(indices)
        self.num_rows += len(values)
        active = values != 0
        value, latent, row = values[active].float(), indices[active], rows[active]
        self.count += latent.bincount(minlength=self.num_latents)
        self.total.index_add_(0, latent, value.double())
        self.low.scatter_reduce_(0, latent, value, "amin")
        self.high.scatter_reduce_(0, latent, value, "amax")
        if labels is not None:
            cells = latent * self.num_classes + labels.unsqueeze(-1).expand_as(indices)[active]
            self.by_class += cells.bincount(minlength=self.by_class.numel()).view_as(self.by_class)
        self.strongest.add(latent, value, row)
        self.active.append(torch.where(active, indices, self.num_latents).to(torch.int32))

    @property
    def share(self) -> torch.Tensor:
        """Share of the rows on which each latent is active, float64 `(num_latents,)`."""
        return self.count.double() / max(self.num_rows, 1)

    @property
    def mean(self) -> torch.Tensor:
        """Mean value over the rows on which it is active, float64; 0 for a latent that never is."""
        return self.total / self.count.clamp(min=1)

    def class_frequencies(self, support: torch.Tensor) -> torch.Tensor:
        """Share of each class's rows on which the latent is active, float64 `(num_latents, num_classes)`; `support`
        counts the rows of each class."""
        return self.by_class.double() / support.clamp(min=1)


@torch.no_grad()
def gather(
    model: VS2CLIPForZeroShot,
    rows: Rows,
    labels: torch.Tensor | None,
    num_classes: int,
    top: int,
    batch_size: int,
    progress: bool = False,
) -> LatentStatistics:
    """One pass over the rows with the model's SAE; `labels` `(n,)` int64, each below `num_classes`."""
    statistics = LatentStatistics(len(model.sae.W_dec), top, num_classes if labels is not None else 0)
    for start, code in codes(model, rows, batch_size, "Latents", progress):
        block = None if labels is None else labels[start : start + len(code.fvu)]
        statistics.add(code.latent_values.cpu(), code.latent_indices.cpu(), block)
        statistics.fvu.append(code.fvu.cpu())
    return statistics


class Spread(NamedTuple):
    """How the values of each latent are spread from its `low` to its `high`; values of exactly 0 are left out."""

    counts: torch.Tensor
    """int64 `(num_latents, NUM_BINS)`: rows in each of equal bins."""
    examples: Largest
    """Up to `EXAMPLES` rows of each of [`NUM_INTERVALS`] equal intervals of each latent, drawn at random: owner
    `latent * NUM_INTERVALS + interval`."""


@torch.no_grad()
def spread(
    model: VS2CLIPForZeroShot,
    rows: Rows,
    low: torch.Tensor,
    high: torch.Tensor,
    batch_size: int,
    progress: bool = False,
) -> Spread:
    """A second pass over the rows, because the range `low`, `high` `(num_latents,)` is known only after the first."""
    counts = torch.zeros(len(low), NUM_BINS, dtype=torch.int64)
    examples = Largest(len(low) * NUM_INTERVALS, EXAMPLES)
    draw = torch.rand(len(rows), generator=torch.Generator().manual_seed(0))
    width = (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    for start, code in codes(model, rows, batch_size, "Histograms", progress):
        values, indices = code.latent_values.cpu().float(), code.latent_indices.cpu()
        row = torch.arange(start, start + len(values)).unsqueeze(-1).expand_as(indices)
        active = values != 0
        value, latent, row = values[active], indices[active], row[active]
        bins = ((value - low[latent]) / width[latent] * NUM_BINS).long().clamp_(0, NUM_BINS - 1)
        counts += (latent * NUM_BINS + bins).bincount(minlength=counts.numel()).view_as(counts)
        interval = bins * NUM_INTERVALS // NUM_BINS
        examples.add(latent * NUM_INTERVALS + interval, draw[row], row)
    return Spread(counts, examples)


def companions(active: torch.Tensor, num_latents: int, number: int) -> list[list[tuple[int, int]]]:
    """
    The latents that fire together with each one: `(latent, rows on which both are active)`, the largest cosine of the
    two sets of rows first, where that is more than chance gives.

    Args:
        active: active latents of each row, int32 `(n, top_k)`; `num_latents` where there are fewer.
        number: companions a latent, at most.
    """
    flat = active.flatten().long()
    count = flat.bincount(minlength=num_latents + 1)[:num_latents]
    order = flat.argsort(stable=True) // max(active.shape[1], 1)
    found = []
    for own, rows in enumerate(order[: int(count.sum())].split(count.tolist())):
        both = active[rows].flatten().long().bincount(minlength=num_latents + 1)[:num_latents]
        both[own] = 0
        both[both * max(len(active), 1) <= count * count[own]] = (
            0  # no more often than two that know nothing of each other
        )
        best = (both / (count * count[own]).clamp(min=1).double().sqrt()).topk(min(number, num_latents))
        found.append([(other, int(both[other])) for other in best.indices.tolist() if both[other] > 1])
    return found


def nearest_latents(decoder: torch.Tensor, number: int, block: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents whose decoder directions have the largest cosine with each one's, without itself: `(indices,
    cosines)`, each `(num_latents, number)` or fewer columns where there are fewer latents."""
    unit = normalize(decoder.detach().float(), dim=-1)
    number = min(number, len(unit) - 1)
    indices, cosines = [], []
    for start in range(0, len(unit), block):
        cosine = unit[start : start + block] @ unit.T
        own = torch.arange(len(cosine), device=unit.device)
        cosine[own, own + start] = -torch.inf
        found = cosine.topk(number, dim=-1)
        indices.append(found.indices.cpu())
        cosines.append(found.values.cpu())
    return torch.cat(indices), torch.cat(cosines)


def blocks(
    rows: Rows, batch_size: int, what: str, progress: bool, indices: torch.Tensor | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """The rows (of `indices`, *optional*) block by block, each with the number of those before it, under a progress
    bar."""
    start = 0
    with progress_bar(shown=progress, total=len(rows), desc=what, unit=" rows") as bar:
        for batch in rows.batches(batch_size, indices):
            yield start, batch
            start += len(batch)
            bar.update(len(batch))


def codes(
    model: VS2CLIPForZeroShot,
    rows: Rows,
    batch_size: int,
    what: str,
    progress: bool,
    indices: torch.Tensor | None = None,
) -> Iterator[tuple[int, Any]]:
    """[`blocks`] as SAE outputs, in at least float32, as `steer_cls` has them."""
    sae = model.sae
    for start, batch in blocks(rows, batch_size, what, progress, indices):
        # As the tail has them: the rows pass through the CLIP's dtype before the SAE sees them.
        x = batch.to(model.clip.device, model.clip.dtype)
        code = sae(x.to(sae.b_pre.device, torch.promote_types(x.dtype, torch.float32)))
        refuse_overflow(code.latent_values, range(start, start + len(x)))
        yield start, code
