"""A corpus asked for neighbours, as VS2++ needs them."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple, TypedDict, cast

import torch
from transformers import CLIPModel

from ..encoders.families import embedding_width
from ..encoders.tail import clip_embeds, tail_parameters
from ..files.weight_state import weights_state
from ..functional.neighbors import BLOCK_ROWS, NeighborIndex, pseudo_labels, select_positives
from ..methods import NeighborCodes
from ..sae.modeling import SAEModel
from .corpus import RetrievalCorpus


class RetrievalInputs(TypedDict, total=False):
    """What VS2++ needs to know of a batch of images beside the images."""

    class_embeds: torch.Tensor | None
    """`(num_classes, projection_dim)`: text embeddings of the classes that pseudo-labels are chosen from."""
    retrieval_embeds: torch.Tensor | None
    """`(batch, d)`: the images in the space of the corpus' encoder, where that is not the CLIP itself."""
    exclude: torch.Tensor | None
    """int64 `(batch,)`: for images that are in the corpus their row there, -1 for others."""


def pop_retrieval_inputs(kwargs: dict[str, Any]) -> RetrievalInputs:
    """Takes the arguments of [`RetrievalInputs`] out of `kwargs`."""
    found = {name: kwargs.pop(name) for name in RetrievalInputs.__annotations__ if name in kwargs}
    return cast(RetrievalInputs, found)


class _LabelledClasses(NamedTuple):
    class_embeds: torch.Tensor
    labels: torch.Tensor


class CorpusSearch:
    """
    A corpus at work in a model: its latents and embeddings are computed once for a state of the weights, its
    pseudo-labels once a class matrix. Safe to use from several threads; a copy, and what another process receives,
    computes them anew.

    Args:
        corpus ([`RetrievalCorpus`]): not copied.
    """

    max_label_sets = 8
    """How many class matrices the pseudo-labels are kept for; the least recently used go first."""

    def __init__(self, corpus: RetrievalCorpus):
        self.corpus = corpus
        self._lock = threading.Lock()
        self._codes: tuple[Any, torch.Tensor, torch.Tensor] | None = None
        self._embeds: tuple[Any, NeighborIndex] | None = None
        self._other: tuple[torch.device, NeighborIndex] | None = None  # in the other encoder's space
        self._labels: list[_LabelledClasses] = []

    def __reduce__(self) -> tuple[type[CorpusSearch], tuple[RetrievalCorpus]]:
        return type(self), (self.corpus,)

    @torch.compiler.disable  # a compiled model breaks its graph here: locks, caches and a search are nothing to trace
    @torch.no_grad()
    def neighbors(
        self,
        clip: CLIPModel,
        sae: SAEModel,
        rows: torch.Tensor,
        num_neighbors: int,
        positives: str,
        *,
        class_embeds: torch.Tensor | None = None,
        retrieval_embeds: torch.Tensor | None = None,
        exclude: torch.Tensor | None = None,
    ) -> NeighborCodes:
        """
        The neighbours of CLS rows `(batch, hidden_size)`, found by their plain CLIP embedding or by
        `retrieval_embeds`.

        Args:
            clip, sae: the model's; the corpus' embeddings and latents are made with them.
            num_neighbors: N of section 4.2.
            positives: the rule, see [`select_positives`].
            class_embeds, retrieval_embeds, exclude: see [`RetrievalInputs`].

        Raises:
            `ValueError`: if the classes are missing, or the embeddings that the corpus' encoder calls for; on shapes
                that do not fit; or if the corpus has too few rows.
        """
        classes = self._check(clip, rows, class_embeds, retrieval_embeds)
        # Kept tensors may serve a training step after an inference: they must not be inference tensors. Leaving the
        # mode switches gradients on, and a graph must not be kept either.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            embeds = self._embeddings(clip)
            values, indices = self._latents(sae)
            labels = self._pseudo_labels(embeds, classes)
            index = embeds if self.corpus.embeddings is None else self._other_index(sae.device)
        queries = clip_embeds(clip, rows)
        found = index.search(
            queries if retrieval_embeds is None else retrieval_embeds, num_neighbors, exclude=exclude
        )[1]
        own = pseudo_labels(queries, classes).to(labels.device) if positives == "query" else None
        positive = select_positives(labels[found.to(labels.device)], positives, own)
        found = found.to(values.device)
        return NeighborCodes(values[found], indices[found].long(), positive.to(values.device))

    def _check(
        self,
        clip: CLIPModel,
        rows: torch.Tensor,
        class_embeds: torch.Tensor | None,
        retrieval_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        if class_embeds is None:
            raise ValueError(
                "method='vs2++' labels the neighbours itself and needs to know the classes: give class_embeds=, a "
                "text embedding a class, as hf_vs2.data.labels.prompts.class_embeddings(clip, tokenizer, names) makes "
                "them. (The model called with input_ids takes those.)"
            )
        width = embedding_width(clip)
        if class_embeds.ndim != 2 or class_embeds.shape[1] != width or not len(class_embeds):
            raise ValueError(f"class_embeds must be (num_classes, {width}), not {tuple(class_embeds.shape)}.")
        if self.corpus.embeddings is None and retrieval_embeds is not None:
            raise ValueError(
                "retrieval_embeds= is for a corpus with embeddings of another encoder; this one is searched in the "
                "CLIP's own space."
            )
        if self.corpus.embeddings is not None:
            shape = (len(rows), self.corpus.embeddings.shape[1])
            if retrieval_embeds is None or retrieval_embeds.shape != shape:
                got = "none were given" if retrieval_embeds is None else f"these are {tuple(retrieval_embeds.shape)}"
                raise ValueError(
                    f"This corpus is searched in the space of {self.corpus.encoder}: give the images' embeddings by "
                    f"that model in retrieval_embeds=, {shape}; {got}. hf_vs2.steering.retrieval.embed_images makes "
                    "them."
                )
        return class_embeds

    # What is kept

    def _embeddings(self, clip: CLIPModel) -> NeighborIndex:
        """Plain CLIP embeddings of the corpus."""
        state = weights_state(tail_parameters(clip))
        if self._embeds is None or self._embeds[0] != state:
            blocks = [clip_embeds(clip, block) for block in self.corpus.rows.split(BLOCK_ROWS)]
            self._embeds = state, NeighborIndex(torch.cat(blocks))
            self._labels = []
        return self._embeds[1]

    def _latents(self, sae: SAEModel) -> tuple[torch.Tensor, torch.Tensor]:
        """values `(n, top_k)` and indices `(n, top_k)` int32."""
        state = weights_state([sae.W_enc, sae.b_enc, sae.b_pre]), sae.config.top_k, sae.config.activation
        if self._codes is None or self._codes[0] != state:
            values, indices = zip(
                *(sae.encode(block.to(sae.device).float()) for block in self.corpus.rows.split(BLOCK_ROWS)),
                strict=True,
            )
            self._codes = state, torch.cat(values), torch.cat([block.int() for block in indices])
        return self._codes[1:]

    def _other_index(self, device: torch.device) -> NeighborIndex:
        assert self.corpus.embeddings is not None
        if self._other is None or self._other[0] != device:
            self._other = device, NeighborIndex(self.corpus.embeddings.to(device))
        return self._other[1]

    def _pseudo_labels(self, embeds: NeighborIndex, class_embeds: torch.Tensor) -> torch.Tensor:
        for place, known in enumerate(self._labels):
            same = known.class_embeds.shape == class_embeds.shape and known.class_embeds.device == class_embeds.device
            if same and torch.equal(known.class_embeds, class_embeds):
                self._labels.append(self._labels.pop(place))
                return known.labels
        labels = pseudo_labels(embeds.units, class_embeds)
        self._labels = [*self._labels, _LabelledClasses(class_embeds.clone(), labels)][-self.max_label_sets :]
        return labels


__all__ = ["CorpusSearch", "RetrievalInputs", "pop_retrieval_inputs"]
