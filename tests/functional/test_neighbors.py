"""Nearest neighbours: exact, the same in blocks of any size, and never a matrix of all pairs."""

import numpy as np
import pytest
import torch
from recorders import Recorder

from hf_vs2.functional import neighbors
from hf_vs2.functional.neighbors import NeighborIndex, nearest_neighbors, pseudo_labels, select_positives


def brute_force(queries, corpus, k, exclude=None):
    """All cosines in float64; ties, which are rounding apart, by the lower index."""
    units = [rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300) for rows in (queries, corpus)]
    cosine = np.round(units[0] @ units[1].T, 7)
    if exclude is not None:
        for query, row in enumerate(exclude):
            if row >= 0:
                cosine[query, row] = -np.inf
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(cosine, order, axis=1), order


def draw(kind, n, d, seed):
    generator = np.random.default_rng(seed)
    if kind == "gaussian":
        return generator.normal(size=(n, d)) * generator.uniform(0.1, 50, size=(n, 1))
    if kind == "ties":  # equally long rows of few values: many equal cosines, of rows that differ
        return generator.permuted(np.tile(np.arange(d) % 3 - 1.0, (n, 1)), axis=1)
    return generator.normal(size=(5, d))[generator.integers(0, 5, size=n)]  # "copies" of five rows


@pytest.mark.parametrize("backend", ["blocks", "faiss"])
@pytest.mark.parametrize("kind", ["gaussian", "ties", "copies"])
@pytest.mark.parametrize("block_rows", [1, 7, 33, 1000])
def test_equals_brute_force_for_every_block_size(backend, kind, block_rows, monkeypatch):
    """Duplicates are common in image corpora. If a block border or a library decided among them, no study could be repeated."""
    if backend == "faiss":
        pytest.importorskip("faiss")
    monkeypatch.setattr(neighbors, "_use_faiss", lambda device: backend == "faiss")
    for seed, (q, n, d, k) in enumerate([(10, 70, 6, 10), (5, 30, 33, 30), (33, 33, 3, 1)]):
        queries, corpus = draw(kind, q, d, seed), draw(kind, n, d, 100 + seed)
        exclude = None if k == n else np.arange(q) - 1  # the first query excludes nothing
        expected, order = brute_force(queries, corpus, k, exclude)
        similarity, indices = nearest_neighbors(
            torch.tensor(queries),
            torch.tensor(corpus),
            k,
            block_rows=block_rows,
            exclude=None if exclude is None else torch.tensor(exclude),
        )
        np.testing.assert_array_equal(indices.numpy(), order)
        np.testing.assert_allclose(similarity.numpy(), expected, atol=3e-7)
        assert similarity.dtype == torch.float32 and (similarity.diff(dim=1) <= 0).all()
        again = NeighborIndex(torch.tensor(corpus)).search(
            torch.tensor(queries), k, exclude=None if exclude is None else torch.tensor(exclude)
        )
        assert torch.equal(again[0], similarity) and torch.equal(again[1], indices)


def test_bits_do_not_depend_on_blocks_or_threads():
    """Half of a study's cells are made on one machine and half on another; float32 sums differ with the blocking."""
    generator = torch.Generator().manual_seed(0)
    queries, corpus = torch.randn(9, 700, generator=generator), torch.randn(900, 700, generator=generator)
    found = [nearest_neighbors(queries, corpus, 20, block_rows=rows) for rows in (3, 100, 901)]
    for similarity, indices in found[1:]:
        assert torch.equal(similarity, found[0][0]) and torch.equal(indices, found[0][1])


def test_no_tensor_is_larger_than_a_block(monkeypatch):
    """30,000 queries and a million images would be 120 GB of similarities, whichever of the two is the long one."""
    monkeypatch.setattr(neighbors, "_use_faiss", lambda device: False)
    for q, n in ((1000, 60), (60, 1000)):
        queries, corpus = torch.ones(q, 2), torch.ones(n, 2)
        with Recorder() as made:
            nearest_neighbors(queries, corpus, 3, block_rows=50, exclude=torch.arange(q))
        assert made.largest <= max(50 * 50, 3 * q)


def test_half_precision_zero_and_broken_rows():
    """A black image (zero row) is near nothing, a NaN among the queries spoils no other, one in the corpus would be everybody's
    neighbour and is refused by its number."""
    generator = torch.Generator().manual_seed(0)
    queries, corpus = torch.randn(4, 8, generator=generator), torch.randn(30, 8, generator=generator)
    exact = nearest_neighbors(queries.bfloat16().float(), corpus.bfloat16().float(), 3)
    half = nearest_neighbors(queries.bfloat16(), corpus.bfloat16(), 3)
    assert torch.equal(exact[0], half[0]) and torch.equal(exact[1], half[1])
    broken = queries.clone()
    broken[1] = float("nan")
    broken[2] = 0
    similarity, indices = nearest_neighbors(broken, corpus, 3)
    expected = nearest_neighbors(queries, corpus, 3)
    assert torch.equal(indices[[0, 3]], expected[1][[0, 3]])
    assert similarity[1].isnan().all() and similarity[2].tolist() == [0, 0, 0] and indices[2].tolist() == [0, 1, 2]
    corpus[17, 2] = float("inf")
    for search in (lambda: nearest_neighbors(queries, corpus, 3, block_rows=4), lambda: NeighborIndex(corpus)):
        with pytest.raises(ValueError, match="Row 17 of the corpus holds NaN or infinity"):
            search()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 6}, r"6 neighbours were asked for; the corpus of 5 rows can give 1 to 5"),
        ({"k": 5, "exclude": torch.tensor([1, 2])}, r"can give 1 to 4"),
        ({"k": 0}, r"can give 1 to 5"),
        ({"k": 2, "exclude": torch.tensor([1])}, r"exclude must hold one row number a query, \(2,\), not \(1,\)"),
        ({"k": 2, "exclude": [1, 2]}, r"must be a tensor of row numbers, one a query, not \[1, 2\]"),
        ({"k": 2, "queries": torch.ones(2, 4)}, r"of one width; these are \(2, 4\) and \(5, 3\)"),
        ({"k": 2, "block_rows": 0}, r"block_rows must be at least 1"),
    ],
)
def test_refused_searches_say_why(arguments, message):
    """A negative index or a silent repetition would only show as a strange accuracy."""
    with pytest.raises((TypeError, ValueError), match=message):
        nearest_neighbors(**{"queries": torch.ones(2, 3), "corpus": torch.ones(5, 3), **arguments})


def test_pseudo_labels_are_the_nearest_classes():
    """Text embeddings come unnormalised from CLIP: a long one must not attract every image."""
    images = torch.tensor([[3.0, 0.1], [0.2, 0.1], [0.0, 5.0], [1.0, 1.0]])
    classes = torch.tensor([[1.0, 0.0], [0.0, 100.0], [2.0, 0.0]])
    assert pseudo_labels(images, classes).tolist() == [0, 0, 1, 0]
    assert pseudo_labels(images[:0], classes).tolist() == []


def test_positives_by_majority_and_by_query():
    """Section 4.2 and eq. 4. With a tie among labels the nearest neighbour's side wins, or the result would depend on class order."""
    labels = torch.tensor([[4, 2, 2, 4, 7], [1, 1, 1, 1, 1], [3, 5, 6, 7, 8]])
    majority = select_positives(labels)
    assert majority.int().tolist() == [[1, 0, 0, 1, 0], [1] * 5, [1, 0, 0, 0, 0]]
    query = select_positives(labels, "query", torch.tensor([2, 0, 8]))
    assert query.int().tolist() == [[0, 1, 1, 0, 0], [0] * 5, [0, 0, 0, 0, 1]]
    with pytest.raises(ValueError, match="needs query_labels"):
        select_positives(labels, "query")
    with pytest.raises(ValueError, match=r"rule='most' is not known. Use one of \['majority', 'query'\]"):
        select_positives(labels, "most")
