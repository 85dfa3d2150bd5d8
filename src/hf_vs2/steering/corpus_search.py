"""A corpus asked for neighbours, as VS2++ needs them."""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict, cast

import torch
from transformers import CLIPModel

from ..encoders.families import embedding_width
from ..encoders.tail import clip_embeds, tail_parameters
from ..files.weight_state import Kept, weights_state
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
    inputs = {name: kwargs.pop(name) for name in RetrievalInputs.__annotations__ if name in kwargs}
    return cast(RetrievalInputs, inputs)


class _Indexed(NamedTuple):
    """A corpus under one CLIP and SAE."""

    embeds: NeighborIndex
    """Plain CLIP embeddings."""
    searched: NeighborIndex
    """Those that neighbours are looked for in: of the corpus' other encoder, else the same."""
    values: torch.Tensor
    """Of the latents, `(n, top_k)`."""
    indices: torch.Tensor
    """int32 `(n, top_k)`."""


class Prepared(NamedTuple):
    """A corpus with pseudo-labels, int64 `(n,)`, among the classes of a call."""

    corpus: _Indexed
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
        self._indexed: Kept[_Indexed] = Kept(1)
        self._labels: Kept[torch.Tensor] = Kept(self.max_label_sets)

    def __reduce__(self) -> tuple[type[CorpusSearch], tuple[RetrievalCorpus]]:
        return type(self), (self.corpus,)

    @torch.compiler.disable  # a compiled model breaks its graph here: locks, caches and a search are nothing to trace
    @torch.no_grad()
    def prepared(self, clip: CLIPModel, sae: SAEModel, class_embeds: torch.Tensor | None) -> Prepared:
        """The corpus for a call with these classes, `(num_classes, projection_dim)`. Without them, or with others, a
        `ValueError`."""
        if class_embeds is None:
            raise ValueError(
                "method='vs2++' labels the neighbours itself and needs to know the classes: give class_embeds=, a "
                "text embedding a class, as hf_vs2.data.labels.prompts.class_embeddings(clip, tokenizer, names) makes "
                "them. (The model called with input_ids takes those.)"
            )
        width, classes = embedding_width(clip), class_embeds.detach()
        if classes.ndim != 2 or classes.shape[1] != width or not len(classes):
            raise ValueError(f"class_embeds must be (num_classes, {width}), not {tuple(classes.shape)}.")
        weights = weights_state([*tail_parameters(clip), sae.W_enc, sae.b_enc, sae.b_pre])
        state = weights, sae.config.top_k, sae.config.activation
        corpus = self._indexed.get(state, None, lambda: self._index(clip, sae))
        content = classes.dtype, classes.device, tuple(classes.shape), classes.float().cpu().numpy().tobytes()
        return Prepared(corpus, self._labels.get(state, content, lambda: pseudo_labels(corpus.embeds.units, classes)))

    @torch.compiler.disable
    @torch.no_grad()
    def neighbors(
        self,
        prepared: Prepared,
        clip: CLIPModel,
        rows: torch.Tensor,
        num_neighbors: int,
        positives: str,
        *,
        class_embeds: torch.Tensor,
        retrieval_embeds: torch.Tensor | None = None,
        exclude: torch.Tensor | None = None,
    ) -> NeighborCodes:
        """The N (section 4.2) neighbours of CLS rows `(batch, hidden_size)` in a [`CorpusSearch.prepared`] of the
        CLIP, an SAE and these classes, found by their plain CLIP embedding or by `retrieval_embeds`; `positives`: see
        [`select_positives`], the others: see [`RetrievalInputs`].

        Raises:
            `ValueError`: if embeddings are missing that the corpus' encoder calls for; on shapes that do not fit; or
                if the corpus has too few rows.
        """
        self._check(rows, retrieval_embeds)
        (_, index, values, indices), labels = prepared
        queries = clip_embeds(clip, rows)
        looked_for = queries if retrieval_embeds is None else retrieval_embeds
        _, nearest = index.search(looked_for, num_neighbors, exclude=exclude)
        own = pseudo_labels(queries, class_embeds).to(labels.device) if positives == "query" else None
        positive = select_positives(labels[nearest.to(labels.device)], positives, own)
        nearest = nearest.to(values.device)
        return NeighborCodes(values[nearest], indices[nearest].long(), positive.to(values.device))

    def _check(self, rows: torch.Tensor, retrieval_embeds: torch.Tensor | None) -> None:
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

    def _index(self, clip: CLIPModel, sae: SAEModel) -> _Indexed:
        blocks = self.corpus.rows.split(BLOCK_ROWS)
        embeds = NeighborIndex(torch.cat([clip_embeds(clip, block) for block in blocks]))
        values, indices = zip(*(sae.encode(block.to(sae.device).float()) for block in blocks), strict=True)
        other = self.corpus.embeddings
        searched = embeds if other is None else NeighborIndex(other.to(sae.device))
        return _Indexed(embeds, searched, torch.cat(values), torch.cat([block.int() for block in indices]))
