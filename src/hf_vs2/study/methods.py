"""The methods that a study compares: each scores the images of a cell, batch by batch, so that memory stays flat."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import normalize

from ..encoders.tail import unit_embeds
from ..functional.equations import centroid_steer, contrastive_direction, steer
from ..functional.label_free import distribution_norm_scores
from ..functional.neighbors import select_positives
from ..methods import method_named
from ..steering.retrieval import contrastive_embedding_steer, knn_vote, linear_probe, weighted_rag
from .results.catalog import STEERED_LAYERS, study_methods
from .results.cells import Cell


if TYPE_CHECKING:
    from .bench import Bench


class Scored(NamedTuple):
    """A batch of images as a method sees them."""

    scores: torch.Tensor
    """`(batch, num_classes)`."""
    fvu: torch.Tensor | None = None
    """`(batch,)`: per-sample FVU, from methods that ask an SAE."""
    steered: torch.Tensor | None = None
    """bool `(batch,)`: which images the method touched; `None`: all."""


Run = Callable[["Bench", Cell], Iterator[Scored]]


# Without an SAE


def clip(bench: Bench, cell: Cell) -> Iterator[Scored]:
    classes = bench.classes(cell)
    for rows in bench.batches(cell):
        nothing = torch.zeros(len(rows), dtype=torch.bool)
        yield Scored(bench.embed(cell.encoder, rows) @ classes.T, steered=nothing)


def centroid(bench: Bench, cell: Cell) -> Iterator[Scored]:
    """Proposition 3.1 without the SAE; with a `share`, the mean of that share of the training rows."""
    classes = bench.classes(cell)
    mean = bench.mean(cell.encoder, cell.dataset, cell.params.get("share", 1.0), cell.seed or 0)
    for rows in bench.batches(cell):
        moved = centroid_steer(rows, mean.to(rows), _alpha(cell))
        yield Scored(bench.embed(cell.encoder, moved) @ classes.T)


def distribution_norm(coefficient: float, score: str) -> Run:
    """With coefficient 1 and dot products this is mean-logit debiasing: the mean logit of each class over the training
    rows is subtracted (the text mean shifts all classes alike)."""

    def run(bench: Bench, cell: Cell) -> Iterator[Scored]:
        classes, image_mean = bench.classes(cell), bench.image_mean(cell.encoder, cell.dataset)
        text_mean = classes.mean(0)
        for rows in bench.batches(cell):
            images = bench.embed(cell.encoder, rows)
            yield Scored(distribution_norm_scores(images, classes, image_mean, text_mean, coefficient, score))

    return run


# With an SAE on the last layer


def steered(method: str, dictionary: str | None = None, **fixed: float) -> Run:
    """A method of the library, with a dictionary one of its controls; `fixed` settings take the place of the
    study's."""
    rule = method_named(method)

    def run(bench: Bench, cell: Cell) -> Iterator[Scored]:
        fitted = rule.needs_statistics or dictionary is not None
        model = bench.adapted_model(cell, dictionary) if fitted else bench.model(cell)
        classes, gate = bench.classes(cell), cell.params.get("gate")
        if gate is not None and rule.reads_latents:
            gate = model.sae.config.usable_gate(gate)
        steerer = model.steerer.with_(method=method, gate=gate, **fixed).for_one_call()
        for rows in bench.batches(cell):
            out = steerer.features_from_cls(rows)
            yield Scored(steerer.scores(out, unit_embeds(out.features), classes), out.fvu, out.steered)

    return run


def oracle_prototypes(bench: Bench, cell: Cell) -> Iterator[Scored]:
    """Appendix L's upper bound: each image is steered to the mean latents of its TRUE class, taken over the ten
    training images of that class that CLIP is surest of."""
    classes, sae = bench.classes(cell), bench.sae(cell.encoder, bench.spec(cell))
    values, indices = bench.corpus_codes(cell.encoder, cell.dataset, bench.spec(cell))
    labels = bench.corpus_labels(cell.encoder, cell.dataset, cell.prompts, True)
    confidence = bench.corpus_confidence(cell.encoder, cell.dataset, cell.prompts)
    directions = torch.zeros(len(classes), sae.config.hidden_size, device=sae.device)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        best = members[confidence[members].topk(min(10, len(members))).indices]
        everyone = torch.ones(1, len(best), dtype=torch.bool, device=best.device)
        directions[label] = contrastive_direction(
            values[best][None], indices[best][None], everyone, sae.W_dec, cell.params["gamma"]
        )[0]
    start, targets = 0, bench.labels(cell.encoder, cell.dataset)
    for rows in bench.batches(cell):
        true = targets[start : start + len(rows)].to(rows.device)
        start += len(rows)
        moved = steer(rows, directions[true], cell.params["lambda"])
        yield Scored(bench.embed(cell.encoder, moved) @ classes.T)


# The whole model on images


def inner_layers(method: str, num_layers: int | None) -> Run:
    """SAEs on the last layers; `None`: on all."""

    def run(bench: Bench, cell: Cell) -> Iterator[Scored]:
        found = bench.deep_features(cell.encoder, bench.spec(cell), num_layers, method)
        yield Scored(found.features @ bench.classes(cell).T, found.fvu)

    return run


# Augmented views


def views(method: str | None) -> Run:
    """The mean embedding of an image and its augmented views, each steered when a method is given."""

    def run(bench: Bench, cell: Cell) -> Iterator[Scored]:
        classes = bench.classes(cell)
        model = None
        if method is not None:
            model = bench.model(cell)
            model.set_steering(method=method)

        def embed(rows: torch.Tensor) -> torch.Tensor:
            return (
                bench.embed(cell.encoder, rows)
                if model is None
                else unit_embeds(model.image_features_from_cls(rows)[0])
            )

        numbers = [None, *range(1, cell.params["views"] + 1)]
        for batches in zip(*(bench.batches(cell, view) for view in numbers), strict=True):
            mean = torch.stack([embed(rows) for rows in batches]).mean(0)
            yield Scored(normalize(mean, dim=-1) @ classes.T)

    return run


# Retrieval: VS2++ and what it must beat


def _with_neighbors(
    score: Callable[[Bench, Cell, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> Run:
    """`score(bench, cell, rows, similarity, indices)` for each batch and its neighbours, as embeddings or final
    scores."""

    def run(bench: Bench, cell: Cell) -> Iterator[Scored]:
        found, wanted = bench.neighbors(cell.encoder, cell.dataset), cell.params["num_neighbors"]
        start = 0
        for rows in bench.batches(cell):
            chosen = slice(start, start + len(rows))
            start += len(rows)
            similarity, indices = (part[chosen, :wanted].to(rows.device) for part in found)
            yield Scored(score(bench, cell, rows, similarity, indices))

    return run


def _positives(bench: Bench, cell: Cell, rows: torch.Tensor, indices: torch.Tensor, rule: str, true: bool) -> Any:
    labels = bench.corpus_labels(cell.encoder, cell.dataset, cell.prompts, true)[indices]
    if rule == "majority":
        return select_positives(labels, "majority")
    own = (bench.embed(cell.encoder, rows) @ bench.classes(cell).T).argmax(-1)
    return select_positives(labels, "query", own)


def vs2pp(rule: str, true: bool = False) -> Run:
    """VS2++ (eq. 5): from the latents of the neighbours that share a label, away from those of the others."""

    def score(
        bench: Bench, cell: Cell, rows: torch.Tensor, similarity: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor:
        values, latents = bench.corpus_codes(cell.encoder, cell.dataset, bench.spec(cell))
        decoder = bench.sae(cell.encoder, bench.spec(cell)).W_dec
        positive = _positives(bench, cell, rows, indices, rule, true)
        direction = contrastive_direction(values[indices], latents[indices], positive, decoder, cell.params["gamma"])
        moved = steer(rows, direction, cell.params["lambda"])
        return bench.embed(cell.encoder, moved) @ bench.classes(cell).T

    return _with_neighbors(score)


def rag(rule: str | None, true: bool = False) -> Run:
    """Weighted RAG over all neighbours, or over those that share the majority's label."""

    def score(
        bench: Bench, cell: Cell, rows: torch.Tensor, similarity: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor:
        weight = similarity
        if rule is not None:
            weight = similarity * _positives(bench, cell, rows, indices, rule, true)
        neighbours = bench.corpus_embeds(cell.encoder, cell.dataset)[indices]
        query = bench.embed(cell.encoder, rows)
        return weighted_rag(query, neighbours, weight, cell.params["rag_weight"]) @ bench.classes(cell).T

    return _with_neighbors(score)


def clip_steering(true: bool = False) -> Run:
    """The same contrast as VS2++, of embeddings instead of latents."""

    def score(
        bench: Bench, cell: Cell, rows: torch.Tensor, similarity: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor:
        positive = _positives(bench, cell, rows, indices, "majority", true)
        neighbours = bench.corpus_embeds(cell.encoder, cell.dataset)[indices]
        query = bench.embed(cell.encoder, rows)
        return contrastive_embedding_steer(query, neighbours, positive, _alpha(cell)) @ bench.classes(cell).T

    return _with_neighbors(score)


def _vote(
    bench: Bench, cell: Cell, rows: torch.Tensor, similarity: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    labels = bench.corpus_labels(cell.encoder, cell.dataset, cell.prompts, False)[indices]
    return knn_vote(labels, similarity, len(bench.classes(cell)))


def probe(bench: Bench, cell: Cell) -> Iterator[Scored]:
    """Logistic regression on the corpus' embeddings and CLIP's own guesses."""
    embeds, labels = (
        bench.corpus_embeds(cell.encoder, cell.dataset),
        bench.corpus_labels(cell.encoder, cell.dataset, cell.prompts, False),
    )
    weight, bias = linear_probe(embeds, labels, len(bench.classes(cell)))
    for rows in bench.batches(cell):
        yield Scored(bench.embed(cell.encoder, rows) @ weight.T + bias)


def _alpha(cell: Cell) -> float:
    """`lambda (gamma - 1)`, the step of proposition 3.1."""
    return cell.params["lambda"] * (cell.params["gamma"] - 1)


RUNS: dict[str, Run] = {
    "clip": clip,
    "centroid": centroid,
    "distribution_norm_0.5": distribution_norm(0.5, "dot"),
    "distribution_norm_1": distribution_norm(1.0, "cosine"),
    "mean_logit": distribution_norm(1.0, "dot"),
    "rec_a": inner_layers("reconstruct", None),
    # The code is edited and the change decoded, no more: lambda 1.
    "zero_out": steered("vs2", gamma=0.0, lambda_=1.0),
    "negate": steered("vs2", gamma=-1.0, lambda_=1.0),
    **{name: inner_layers("vs2", layers) for name, layers in STEERED_LAYERS.items()},
    "ens_aug": views(None),
    "vs2_ens_aug": views("vs2"),
    "vs2_pass": steered("vs2"),
    "oracle_prototypes": oracle_prototypes,
    "vs2++": vs2pp("majority"),
    "vs2++query": vs2pp("query"),
    "vs2++oracle": vs2pp("majority", true=True),
    "rag": rag(None),
    "rag_pseudo": rag("majority"),
    "rag_oracle": rag("majority", true=True),
    "clip_steering_pseudo": clip_steering(),
    "clip_steering_oracle": clip_steering(true=True),
    "knn_vote": _with_neighbors(_vote),
    "linear_probe": probe,
}
"""How each of [`hf_vs2.study.results.catalog.OWN`] scores a cell."""


def run_of(name: str) -> Run:
    """How a method of [`hf_vs2.study.results.catalog.study_methods`] scores a cell."""
    if name in RUNS:
        return RUNS[name]
    method = study_methods()[name]
    assert method.rule is not None
    return steered(method.rule, method.dictionary)
