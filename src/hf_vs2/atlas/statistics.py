"""What each latent does over a set of rows, gathered block by block: nothing here grows as rows times latents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import normalize

from ..clip.modeling import VS2CLIPForZeroShot
from ..data.rows import Rows
from ..files.progress import progress_bar
from ..training.calibration import refuse_overflow


NUM_BINS = 24


@dataclass
class LatentStatistics:
    """
    Counts of each latent, and the rows where it is strongest; [`LatentStatistics.add`] takes codes block by block.

    Attributes:
        count (`torch.Tensor`): rows on which the latent is active (its value is not 0), int64 `(num_latents,)`.
        total, low, high: sum, smallest and largest of its values, `(num_latents,)`; `low` and `high` count 0 in, so
            that every histogram has its zero.
        top_values, top_rows: its largest values and the rows that have them, `(num_latents, top)`, largest first, the
            earlier row first where two are equal; `-inf` and -1 where it is active on fewer rows.
        by_class: active rows of each class, int64 `(num_latents, num_classes)`; no columns without labels.
        num_rows (`int`): rows seen.
        fvu: per-sample FVU of each block's rows.
    """

    num_latents: int
    top: int
    num_classes: int = 0
    num_rows: int = 0
    fvu: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.count = torch.zeros(self.num_latents, dtype=torch.int64)
        self.total = torch.zeros(self.num_latents, dtype=torch.float64)
        self.low, self.high = torch.zeros(self.num_latents), torch.zeros(self.num_latents)
        self.top_values = torch.full((self.num_latents, self.top), -torch.inf)
        self.top_rows = torch.full((self.num_latents, self.top), -1)
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
        self._keep_largest(value, latent, row)

    def _keep_largest(self, value: torch.Tensor, latent: torch.Tensor, row: torch.Tensor) -> None:
        """Merges (value, latent, row) triples into the running top: one sort of all that compete, no matrix of
        them."""
        owner = torch.arange(self.num_latents).repeat_interleave(self.top)
        kept = self.top_rows.flatten() >= 0
        value = torch.cat([self.top_values.flatten()[kept], value])
        latent = torch.cat([owner[kept], latent])
        row = torch.cat([self.top_rows.flatten()[kept], row])
        # Stable sorts, the last key first: by latent, in it by value, and equal values in the order of the rows.
        order = value.argsort(descending=True, stable=True)
        order = order[latent[order].argsort(stable=True)]
        latent = latent[order]
        size = latent.bincount(minlength=self.num_latents)
        place = torch.arange(len(latent)) - (size.cumsum(0) - size)[latent]
        winners = place < self.top
        place, latent, order = place[winners], latent[winners], order[winners]
        self.top_values[latent, place] = value[order]
        self.top_rows[latent, place] = row[order]

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
    for start, code in _codes(model, rows, batch_size, "Latents", progress):
        block = None if labels is None else labels[start : start + len(code.fvu)]
        statistics.add(code.latent_values.cpu(), code.latent_indices.cpu(), block)
        statistics.fvu.append(code.fvu.cpu())
    return statistics


@torch.no_grad()
def histograms(
    model: VS2CLIPForZeroShot,
    rows: Rows,
    low: torch.Tensor,
    high: torch.Tensor,
    batch_size: int,
    progress: bool = False,
) -> torch.Tensor:
    """How often each latent's value falls into each of [`NUM_BINS`] equal bins from `low` to `high`: int64
    `(num_latents, NUM_BINS)`.

    Values of exactly 0 are left out. A second pass over the rows, because the range is known only after the first.
    """
    counts = torch.zeros(len(low), NUM_BINS, dtype=torch.int64)
    width = (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    for _, code in _codes(model, rows, batch_size, "Histograms", progress):
        values, indices = code.latent_values.cpu().float(), code.latent_indices.cpu()
        active = values != 0
        value, latent = values[active], indices[active]
        bins = ((value - low[latent]) / width[latent] * NUM_BINS).long().clamp_(0, NUM_BINS - 1)
        counts += (latent * NUM_BINS + bins).bincount(minlength=counts.numel()).view_as(counts)
    return counts


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


def blocks(rows: Rows, batch_size: int, what: str, progress: bool) -> Iterator[tuple[int, torch.Tensor]]:
    """The rows block by block, each with the number of its first row, under a progress bar."""
    start = 0
    with progress_bar(shown=progress, total=len(rows), desc=what, unit=" rows") as bar:
        for batch in rows.batches(batch_size):
            yield start, batch
            start += len(batch)
            bar.update(len(batch))


def _codes(
    model: VS2CLIPForZeroShot, rows: Rows, batch_size: int, what: str, progress: bool
) -> Iterator[tuple[int, Any]]:
    """First row and SAE output of each block, in at least float32, as `steer_cls` has it."""
    sae = model.sae
    for start, batch in blocks(rows, batch_size, what, progress):
        # As the tail has them: the rows pass through the CLIP's dtype before the SAE sees them.
        x = batch.to(model.clip.device, model.clip.dtype)
        code = sae(x.to(sae.b_pre.device, torch.promote_types(x.dtype, torch.float32)))
        refuse_overflow(code.latent_values, range(start, start + len(x)))
        yield start, code
