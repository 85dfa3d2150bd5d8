"""Retrieval for VS2++ and for what it is compared with: neighbours, embeddings of any vision model, and label-free
baselines.

Neighbours and the corpus are made in [`hf_vs2.neighbors`] and [`hf_vs2.corpus`]; their names are here too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from ..config.schema import COUNT
from ..data.batches import Columns, ImageReader, Span, StreamSpans, read_batches, spans_of_dataset
from ..data.images import UnreadableImageError
from ..data.load import prepared
from ..data.pixels import Normalizer
from ..encoders.loading import load_vision_model
from ..encoders.processing import load_image_processor
from ..encoders.tail import unit_embeds
from ..encoders.vision_tower import best_device, evaluating
from ..files.progress import progress_bar
from ..functional.finite import first_broken_row
from ..functional.label_free import exact
from ..functional.neighbors import NeighborIndex, nearest_neighbors, pseudo_labels, select_positives
from .corpus import RetrievalCorpus


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


# Embeddings of another encoder


def embed_images(
    model: nn.Module | str | os.PathLike,
    dataset: Dataset | IterableDataset,
    *,
    image_column: str = "image",
    image_processor: Any = None,
    revision: str | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """
    Unit embeddings of every image of `dataset` by any vision model of transformers, such as DINOv2.

    A CLIP or SigLIP gives its `get_image_features`; a vision model its `pooler_output`, or where it has none the CLS
    token (the first of `last_hidden_state`). Of a [`VS2CLIPForZeroShot`] it is the plain CLIP inside.

    Args:
        model: a model, a Hub id or a path.
        dataset: from [`load_images`], or any map-style or streaming data set with a column of images.
        image_column (`str`): paths, encoded bytes, PIL images or arrays.
        image_processor (*optional*): default: that of the model.
        revision (`str`, *optional*): of a Hub model given by id.
        batch_size (`int`): images per forward pass.
        num_workers (`int`, *optional*): processes that decode, resize and crop the next batches; 0 does it in this
            one, when a batch's turn comes. By default threads read ahead, as many as there are processors to have.
        device (*optional*): for a model given by name; default: a GPU if there is one. A model object stays where it
            is.
        progress (`bool`): show a progress bar.

    Returns:
        `torch.Tensor`: float32 `(len(dataset), d)` on the CPU, unit rows in the order of the data set.

    Raises:
        UnreadableImageError: (a `ValueError`) naming an image that cannot be read.
        ValueError: a data set without images, a model without image embeddings, a revision or device for a loaded
            model.
    """
    encoder: Any = _vision_model(model, revision, device)
    if image_processor is None:
        name = encoder.config._name_or_path
        if not name:
            raise ValueError("The model has no name to load its image processor by: pass image_processor=...")
        image_processor = load_image_processor(name, {"revision": revision or "main"}, of_clip=False)
    processor = getattr(image_processor, "image_processor", image_processor)  # of a CLIPProcessor
    parameter = next(encoder.parameters())
    normalizer = Normalizer(processor, parameter.device)
    rows = []
    total = len(dataset) if hasattr(dataset, "__len__") else None
    bar = progress_bar(shown=progress, total=total, unit=" images", desc="Embeddings")
    batches = image_batches(dataset, image_column, processor, batch_size, parameter.device, num_workers)
    with evaluating(encoder), torch.inference_mode(), bar, contextlib.closing(batches):
        for pixels, names in batches:
            features = _image_embeddings(encoder, normalizer(pixels).to(parameter.dtype))
            rows.append(unit_embeds(features, names.__getitem__).cpu())
            bar.update(len(names))
    if not rows:
        raise ValueError("The data set is empty: there is nothing to embed.")
    return torch.cat(rows)


def _vision_model(
    model: nn.Module | str | os.PathLike, revision: str | None, device: str | torch.device | None
) -> nn.Module:
    if isinstance(model, (str, os.PathLike)):
        loaded = load_vision_model(os.fspath(model), {"revision": revision})
        return getattr(loaded, "clip", loaded).to(device or best_device()).eval()
    for name, value in (("revision", revision), ("device", device)):
        if value is not None:
            raise ValueError(
                f"{name}={value!r} is for a model given by its Hub id or path; this one is already loaded."
            )
    return getattr(model, "clip", model)


def image_batches(
    dataset: Any,
    image_column: str,
    processor: Any,
    batch_size: int,
    device: torch.device,
    num_workers: int | None = None,
) -> Generator[tuple[torch.Tensor, list[str]], None, None]:
    """The images of a data set or stream in order, read as an extraction reads them: uint8 pixels `(batch, channels,
    height, width)`, and how messages name each. One that cannot be read is an [`UnreadableImageError`]."""
    import datasets

    COUNT.read(batch_size, "batch_size")
    dataset = prepared(dataset, image_column)
    columns = Columns.of(dataset, image_column)
    spans: Iterable[Span]
    if isinstance(dataset, datasets.IterableDataset):
        dataset, spans = None, StreamSpans(dataset, columns, batch_size, batch_size, lambda shard: True)
    else:
        spans = list(spans_of_dataset(len(dataset), batch_size, max(1, len(dataset)), lambda shard: True))
    batches = read_batches(ImageReader(dataset, columns, processor), spans, num_workers, device)
    with contextlib.closing(batches):
        for batch in batches:
            if batch.unreadable or batch.pixels is None:
                raise UnreadableImageError(f"{batch.unreadable[0]['error']}. Mend or remove it.")
            yield batch.pixels, batch.names


def _image_embeddings(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """`(batch, d)`, not normalised."""
    if hasattr(model, "get_image_features"):
        features = model.get_image_features(pixel_values=pixel_values)
        return getattr(features, "pooler_output", features)
    outputs = model(pixel_values=pixel_values)
    embeds = getattr(outputs, "image_embeds", None)  # of a tower with its projection
    embeds = getattr(outputs, "pooler_output", None) if embeds is None else embeds
    if embeds is None:
        embeds = outputs.last_hidden_state[:, 0] if outputs.last_hidden_state.ndim == 3 else None
    if embeds is None or embeds.flatten(1).ndim != 2:
        raise ValueError(f"{type(model).__name__} has neither image features, nor a pooled output, nor a CLS token.")
    return embeds.flatten(1)  # convolutional models keep (batch, d, 1, 1)


# What VS2++ is compared with: nothing here asks an SAE. `query_embeds` is `(batch, d)`, `neighbor_embeds` `(batch, N,
# d)`, and `similarity` `(batch, N)`.


def weighted_rag(
    query_embeds: torch.Tensor, neighbor_embeds: torch.Tensor, similarity: torch.Tensor, a: float
) -> torch.Tensor:
    """Weighted RAG: `a q + (1 - a) sum_j w_j r_j` with `w_j = s_j / sum s`, scaled to unit length, `(batch, d)`.

    A similarity below 0 counts as 0; where none is above 0, the weights are 0 and the query stays.
    """
    weights = similarity.clamp(min=0)
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total > 0, total, torch.ones_like(total))
    retrieved = (weights.unsqueeze(1) @ neighbor_embeds).squeeze(1)
    return normalize(a * query_embeds + (1 - a) * retrieved, dim=-1)


def contrastive_embedding_steer(
    query_embeds: torch.Tensor, neighbor_embeds: torch.Tensor, positive: torch.Tensor, lambda_: float
) -> torch.Tensor:
    """CLIP-space steering: `q + lambda (mean of the positives' embeddings - mean of the negatives')`, unit, `(batch,
    d)`.

    `positive` is bool `(batch, N)`; an empty set has mean 0. The contrast of eq. 5 without the SAE.
    """
    size = positive.sum(-1, keepdim=True)
    size = torch.where(positive, size, size - positive.shape[-1])  # the negatives' count, negative as their weight
    contrast = (size.to(neighbor_embeds.dtype).reciprocal().unsqueeze(1) @ neighbor_embeds).squeeze(1)
    return normalize(query_embeds + lambda_ * contrast, dim=-1)


def knn_vote(neighbor_labels: torch.Tensor, similarity: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Each neighbour votes for its label with its similarity: scores `(batch, num_classes)`."""
    votes = similarity.new_zeros(len(similarity), num_classes)
    return votes.scatter_add_(1, neighbor_labels, similarity)


def linear_probe(
    embeds: torch.Tensor, labels: torch.Tensor, num_classes: int, *, l2: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Multinomial logistic regression: the minimum of `sum cross-entropy + l2 / 2 ||weight||^2`, by full-batch L-BFGS
    from zero.

    Deterministic; summed in float64, in blocks, so that no `n x num_classes` matrix is held. `l2` is scikit-learn's `1
    / C`.

    Args:
        embeds: `(n, d)`.
        labels: int64 `(n,)`, from 0 to `num_classes - 1`; a class may have none.
        num_classes: rows of the weight.
        l2: strength of the penalty on the weight; the bias has none.

    Returns:
        weight `(num_classes, d)` and bias `(num_classes,)` in the dtype of `embeds`.

    Raises:
        ValueError: shapes or labels that do not fit, or embeddings with NaN or infinity.
    """
    if embeds.ndim != 2 or labels.shape != embeds.shape[:1] or not len(labels):
        raise ValueError(f"embeds (n, d) and labels (n,) do not fit: {tuple(embeds.shape)} and {tuple(labels.shape)}.")
    if not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise ValueError(f"labels must lie in [0, {num_classes}); they reach from {labels.min()} to {labels.max()}.")
    broken = first_broken_row(embeds)
    if broken is not None:
        raise ValueError(f"Row {broken} of embeds holds NaN or infinity: leave it out.")
    weight = exact(embeds.new_zeros(num_classes, embeds.shape[1])).requires_grad_()
    bias = weight.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=200, tolerance_grad=1e-6, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )
    block = max(1, 2**24 // num_classes)

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        loss = l2 / 2 * weight.square().sum()
        loss.backward()
        for rows, targets in zip(embeds.split(block), labels.split(block), strict=True):
            part = cross_entropy(exact(rows) @ weight.T + bias, targets.to(bias.device), reduction="sum")
            part.backward()
            loss = loss.detach() + part.detach()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    return weight.detach().to(embeds), bias.detach().to(embeds)


__all__ = [
    "NeighborIndex",
    "RetrievalCorpus",
    "contrastive_embedding_steer",
    "embed_images",
    "knn_vote",
    "linear_probe",
    "nearest_neighbors",
    "pseudo_labels",
    "select_positives",
    "weighted_rag",
]
