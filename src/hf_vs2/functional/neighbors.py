"""Exact nearest neighbours by cosine in blocks, and what their pseudo-labels say (VS2++, section 3.3 of arXiv
2506.01247)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import normalize

from .finite import first_broken_row


BLOCK_ROWS = 2048

# Unit rows are rounded to multiples of 2^-24. Products of two are multiples of 2^-48 and their sums stay near 1, so
# that float64 adds them up without any error, in whatever order: the same neighbours for every block size and thread
# count.
_GRID = 2.0**24
_INDEX_BITS = 32
_LAST_INDEX = 2**_INDEX_BITS - 1
_NEVER = torch.iinfo(torch.int64).min
# How many more neighbours faiss is asked for than are wanted, to tell its rounding error from a real difference.
_SPARE = 16


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """`rows` `(n, d)` scaled to unit length and rounded to multiples of `2^-24`, float32. A zero row stays zero.

    Raises:
        ValueError: a row holds NaN or infinity.
    """
    device = _search_device(rows.device)
    units = [_on_grid(block.to(device)).float() for block in rows.split(BLOCK_ROWS)]
    out = torch.cat(units) if units else rows.float()
    broken = first_broken_row(out)
    if broken is not None:
        raise ValueError(f"Row {broken} of the corpus holds NaN or infinity: leave it out.")
    return out


@torch.no_grad()
def nearest_neighbors(
    queries: torch.Tensor,
    corpus: torch.Tensor,
    k: int,
    *,
    block_rows: int = BLOCK_ROWS,
    exclude: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The `k` rows of `corpus` with the largest cosine to each query: exact, and the same whatever the block size.

    Both are taken in blocks, so that beyond the result no more than `block_rows x block_rows` similarities are held.
    With faiss installed (and rows on the CPU) its `IndexFlatIP` does the search, on a float32 copy of the corpus; the
    result is the same, bit for bit.

    Args:
        queries: `(q, d)`, of any length and floating dtype.
        corpus: `(n, d)`.
        k: at most `n`, or `n - 1` with `exclude`.
        block_rows: rows of a block, of queries and of the corpus.
        exclude: int64 `(q,)`, for each query one row of the corpus that is not its neighbour (itself), or -1.

    Returns:
        `(similarity, indices)`, float32 and int64, each `(q, k)`, on the device of the queries. Similarity is
        descending; of rows whose float32 similarity is equal, the one with the lower index comes first.

    Raises:
        ValueError: shapes that do not fit, a `k` the corpus is too small for, a corpus with NaN or infinity.
    """
    _check(queries, corpus.shape, k, exclude)
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}.")
    if _use_faiss(corpus.device):
        return NeighborIndex(corpus).search(queries, k, exclude=exclude, block_rows=block_rows)
    return _decoded(_search(queries, corpus, k, exclude, block_rows, _on_grid), queries.device)


class NeighborIndex:
    """
    A corpus prepared for many searches: unit rows are made once.

    Args:
        corpus: `(n, d)`.

    Raises:
        ValueError: a row holds NaN or infinity.
    """

    def __init__(self, corpus: torch.Tensor):
        self.units = unit_rows(corpus)
        self._faiss = _faiss_index(self.units) if _use_faiss(self.units.device) else None

    def __len__(self) -> int:
        return len(self.units)

    @torch.no_grad()
    def search(
        self, queries: torch.Tensor, k: int, *, exclude: torch.Tensor | None = None, block_rows: int = BLOCK_ROWS
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`nearest_neighbors`]."""
        _check(queries, self.units.shape, k, exclude)
        if self._faiss is not None and k + _SPARE < len(self):
            keys = _faiss_search(self._faiss, queries, self.units, k, exclude, block_rows)
        else:
            keys = _search(queries, self.units, k, exclude, block_rows, torch.Tensor.double)
        return _decoded(keys, queries.device)


def pseudo_labels(image_embeds: torch.Tensor, class_embeds: torch.Tensor) -> torch.Tensor:
    """CLIP's own guess for each image: the class of largest cosine, int64 `(n,)`; of equal ones the first.

    `image_embeds` is `(n, d)` and `class_embeds` `(num_classes, d)`, of any length. Nothing of `n x num_classes` is
    held.

    Raises:
        ValueError: no classes.
    """
    if not len(class_embeds):
        raise ValueError("There are no classes to label images with: class_embeds is empty.")
    classes = normalize(class_embeds.float(), dim=-1).to(image_embeds.device)
    found = [(block.float() @ classes.T).argmax(-1) for block in image_embeds.split(BLOCK_ROWS)]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=image_embeds.device)


POSITIVES = ("majority", "query")


def select_positives(
    neighbor_labels: torch.Tensor, rule: str = "majority", query_labels: torch.Tensor | None = None
) -> torch.Tensor:
    """Which neighbours are positives, bool `(batch, N)`; the rest are negatives.

    Args:
        neighbor_labels: int64 `(batch, N)`, nearest first.
        rule: `"majority"`, those with the commonest label among the neighbours (section 4.2; of equally common ones
            that of the nearest neighbour), or `"query"`, those with the query's own (eq. 4), which may be none.
        query_labels: int64 `(batch,)`, for `"query"`.

    Raises:
        ValueError: an unknown rule, or `"query"` without the queries' labels.
    """
    if rule == "query":
        if query_labels is None:
            raise ValueError('rule="query" needs query_labels, the pseudo-label of each query.')
        return neighbor_labels == query_labels.unsqueeze(1)
    if rule != "majority":
        raise ValueError(f"rule={rule!r} is not known. Use one of {list(POSITIVES)}.")
    counts = (neighbor_labels.unsqueeze(2) == neighbor_labels.unsqueeze(1)).sum(-1)
    # The first of the largest counts is the nearest neighbour's among the tied.
    return neighbor_labels == neighbor_labels.gather(1, counts.argmax(-1, keepdim=True))


# --------------------------------------------------------------------------------------------------------------------
# Search. A key is a similarity and an index in one int64: larger is nearer, equal similarities go by the lower index,
# and no two keys are equal, so that top-k has one answer.
# --------------------------------------------------------------------------------------------------------------------


def _search(
    queries: torch.Tensor,
    corpus: torch.Tensor,
    k: int,
    exclude: torch.Tensor | None,
    block_rows: int,
    units_of: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Keys `(q, k)`, nearest first. `units_of` makes float64 unit rows of a block of the corpus."""
    device = _search_device(corpus.device)
    found = [torch.empty(0, k, dtype=torch.int64, device=device)]
    for first in range(0, len(queries), block_rows):
        units = _on_grid(queries[first : first + block_rows].to(device))
        skip = None if exclude is None else exclude[first : first + block_rows].to(device)
        best = torch.empty(len(units), 0, dtype=torch.int64, device=device)
        for start in range(0, len(corpus), block_rows):
            block = units_of(corpus[start : start + block_rows].to(device))
            broken = first_broken_row(block)
            if broken is not None:
                raise ValueError(f"Row {start + broken} of the corpus holds NaN or infinity: leave it out.")
            keys = _keys(units @ block.T, torch.arange(start, start + len(block), device=device), skip)
            best = torch.cat([best, keys.topk(min(k, len(block)), dim=-1).values], dim=1)
            best = best.topk(min(k, best.shape[1]), dim=-1).values
        found.append(best)
    return torch.cat(found)


def _on_grid(rows: torch.Tensor) -> torch.Tensor:
    """Unit rows on the grid, float64."""
    rows = rows.double()
    length = rows.norm(dim=-1, keepdim=True)
    return (rows / torch.where(length > 0, length, torch.ones_like(length)) * _GRID).round_() / _GRID


def _keys(similarity: torch.Tensor, indices: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
    """`similarity` is float64 `(q, n)`, `indices` `(n,)` or `(q, n)`; pairs to skip get the lowest key of all."""
    bits = (similarity.float() + 0.0).view(torch.int32)  # + 0.0: the two zeros become one
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # integers in the order of the floats
    keys = (ordered << _INDEX_BITS) + (_LAST_INDEX - indices)
    return keys if skip is None else keys.masked_fill_(indices == skip.unsqueeze(1), _NEVER)


def _decoded(keys: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    ordered = (keys >> _INDEX_BITS).int()
    similarity = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)
    return similarity.to(device), (_LAST_INDEX - (keys & _LAST_INDEX)).to(device)


def _search_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device  # Apple's GPUs have no float64


def _check(queries: torch.Tensor, shape: torch.Size, k: int, exclude: torch.Tensor | None) -> None:
    if queries.ndim != 2 or len(shape) != 2 or queries.shape[1] != shape[1]:
        raise ValueError(
            f"Queries (q, d) and corpus (n, d) must be of one width; these are {tuple(queries.shape)} and "
            f"{tuple(shape)}."
        )
    if exclude is not None and not isinstance(exclude, torch.Tensor):
        raise TypeError(
            f"exclude must be a tensor of row numbers, one a query, not {exclude!r}: use torch.tensor(...)."
        )
    if exclude is not None and exclude.shape != queries.shape[:1]:
        raise ValueError(
            f"exclude must hold one row number a query, {tuple(queries.shape[:1])}, not {tuple(exclude.shape)}."
        )
    most = shape[0] - (exclude is not None)
    if not 1 <= k <= most:
        raise ValueError(f"{k} neighbours were asked for; the corpus of {shape[0]} rows can give 1 to {most}.")


# faiss


def _use_faiss(device: torch.device) -> bool:
    return device.type == "cpu" and importlib.util.find_spec("faiss") is not None


def _faiss_index(units: torch.Tensor) -> Any:
    import faiss

    index = faiss.IndexFlatIP(units.shape[1])
    index.add(units.numpy())
    return index


def _faiss_search(
    index: Any,
    queries: torch.Tensor,
    units: torch.Tensor,
    k: int,
    exclude: torch.Tensor | None,
    block_rows: int,
) -> torch.Tensor:
    """Keys as of `_search`: faiss' candidates, ranked by their exact similarity.

    faiss sums in float32, whose error is at most `tolerance`. A query whose candidates end within that of its k-th
    neighbour (many rows alike) may have others: it is searched in blocks.
    """
    wanted = k + _SPARE
    tolerance = units.shape[1] * 2.0**-23
    found = [torch.empty(0, k, dtype=torch.int64)]
    for first in range(0, len(queries), block_rows):
        chosen = queries[first : first + block_rows].cpu()
        rows = _on_grid(chosen)
        skip = None if exclude is None else exclude[first : first + block_rows].cpu()
        approximate, candidates = map(torch.from_numpy, index.search(rows.float().numpy(), wanted))
        candidates = candidates.clamp_(min=0)  # -1 for a query with NaN, which has no neighbours
        step = max(1, block_rows**2 // (wanted * units.shape[1]))
        exact = [
            (units[some].double() @ row.unsqueeze(2)).squeeze(2)
            for some, row in zip(candidates.split(step), rows.split(step), strict=True)
        ]
        keys = _keys(torch.cat(exact), candidates, skip).topk(k, dim=-1).values
        unsure = ~(approximate[:, -1] + tolerance < _decoded(keys[:, -1], keys.device)[0])
        if unsure.any():
            some_skip = None if skip is None else skip[unsure]
            keys[unsure] = _search(chosen[unsure], units, k, some_skip, block_rows, torch.Tensor.double)
        found.append(keys)
    return torch.cat(found)


__all__ = ["NeighborIndex", "POSITIVES", "nearest_neighbors", "pseudo_labels", "select_positives", "unit_rows"]
