"""Measuring the statistics of unlabelled rows that methods beyond VS2 need."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import CLIPModel

from ..data.stores.rows import RowSource, chosen_rows
from ..encoders.families import embedding_width
from ..encoders.tail import plain_embeds
from ..functional.label_free import exact, row_distance
from ..sae.modeling import SAEModel
from ..sae.statistics import DomainStatistics
from .calibration import conformal_quantiles, refuse_overflow, rows_of_sae


SKETCH_ROWS = 4096
"""Rows kept for what is fitted to a label set. More are not better: measured in docs/label-free.md."""

# A second digit of the variances needs no more, and a million rows would take minutes.
_MOST_ROWS = 131_072


@torch.no_grad()
def measure_statistics(
    sae: SAEModel,
    rows: RowSource,
    indices: torch.Tensor | None = None,
    held_out: torch.Tensor | None = None,
    *,
    clip: CLIPModel | None = None,
    sketch_rows: int = SKETCH_ROWS,
    seed: int = 0,
) -> DomainStatistics:
    """
    [`DomainStatistics`] of unlabelled rows, in one pass of float64 sums.

    Args:
        sae ([`SAEModel`]): whose code is measured. It is not changed: `sae.set_domain_statistics(...)` keeps them.
        rows (`ActivationStore` or `torch.Tensor` of shape `(n, hidden_size)`): CLS rows of the SAE's layer. Of more
            than 131,072 a random choice is taken.
        indices (`torch.LongTensor`, *optional*): use only these rows; by default all that are not held out.
        held_out (`torch.LongTensor`, *optional*): rows for the thresholds of the gate by distance, none of them in
            `indices`. Without them that gate can't be used.
        clip (`CLIPModel`, *optional*): to measure the mean image embedding on all rows, where the SAE reads its last
            layer. By default the sketch gives it when it is needed.
        sketch_rows (`int`): how many rows are kept, at random; 0 keeps none, and then `clip` is needed.

    Raises:
        `ValueError`: on no rows, rows of another width or that are not finite, or nothing to take the mean image from.
    """
    rows = rows_of_sae(sae, rows)
    held_out = None if held_out is None else chosen_rows(held_out, len(rows))
    if indices is None and held_out is not None:
        chosen = torch.ones(len(rows), dtype=torch.bool)
        chosen[held_out] = False
        indices = chosen.nonzero().squeeze(-1)
    indices = chosen_rows(indices, len(rows))
    if not len(indices):
        raise ValueError("There are no rows to measure statistics on. Give unlabelled activations.")
    if sketch_rows < 0 or (sketch_rows == 0 and clip is None):
        raise ValueError(
            "sketch_rows=0 leaves nothing to take the mean image from: give clip= too, or keep some rows."
        )
    order = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))]
    sketch, chosen = order[:sketch_rows].sort().values, order[:_MOST_ROWS].sort().values
    sums = _Sums(rows.take(chosen[:1])[0], sae)
    total = None if clip is None else torch.zeros(embedding_width(clip), dtype=torch.float64)
    for block in rows.batches(indices=chosen):
        sums.add(block, chosen[sums.count :])
        if total is not None and clip is not None:
            total += exact(plain_embeds(clip, block)).sum(0).cpu()
    statistics = DomainStatistics(
        **sums.results(),
        num_rows=len(chosen),
        rows=rows.take(sketch).to(torch.bfloat16) if len(sketch) else None,
        image_mean=None if total is None else (total / len(chosen)).float(),
    )
    if held_out is None or not len(held_out):
        return statistics
    known = statistics.of_rows
    distances = torch.cat([row_distance(block, known) for block in rows.batches(indices=held_out)])
    return replace(statistics, distance_quantiles=conformal_quantiles(distances))


class _Sums:
    """First and second moments of rows, and first ones of their code. Around one of the rows: CLIP's mean is large."""

    def __init__(self, origin: torch.Tensor, sae: SAEModel):
        num_latents, width = sae.config.weight_shape
        self.sae, self.origin, self.count = sae, origin.double(), 0
        self.first = torch.zeros(width, dtype=torch.float64)
        self.second = torch.zeros(width, width, dtype=torch.float64)
        self.values = exact(torch.zeros(num_latents, device=sae.device))
        self.active = self.values.clone()

    def add(self, block: torch.Tensor, numbers: torch.Tensor) -> None:
        code = self.sae.encode(block.to(self.sae.device))  # which refuses rows of another width
        refuse_overflow(code[0], numbers)
        moved = block.double() - self.origin
        self.first += moved.sum(0)
        self.second += moved.T @ moved
        values, indices = exact(code[0].flatten()), code[1].flatten().to(self.values.device)
        self.values.index_put_((indices,), values, accumulate=True)
        self.active.index_put_((indices,), (values != 0).double(), accumulate=True)
        self.count += len(block)

    def results(self) -> dict[str, Any]:
        shift = self.first / self.count
        variances, directions = torch.linalg.eigh(self.second / self.count - torch.outer(shift, shift))
        return {
            "mean": (self.origin + shift).float(),
            "components": directions.T.flip(0).float().contiguous(),
            "variances": variances.flip(0).clamp_min(0).float(),
            "latent_mean": (self.values / self.count).float().cpu(),
            "latent_frequency": ((self.active + 1) / (self.count + 1)).float().cpu(),
        }
