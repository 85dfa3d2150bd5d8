"""Words for the latents of an atlas: those a direction moves towards, those it moves away from, and what a search
finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import normalize

from ..clip.modeling import VS2CLIPForZeroShot
from ..data.labels.names import clean_class_names
from ..explain.latent_names import (
    LatentNames,
    centre,
    chance_score,
    closest_words,
    common_words,
    embed_words,
    embedding_directions,
)


NUM_WORDS = 5
NUM_FOUND = 200


@dataclass
class Words:
    """
    Words of all latents.

    Attributes:
        names ([`LatentNames`]): the words that each direction moves towards, best first, and the floor for a name.
        away ([`LatentNames`]): those that it moves away from, the largest cosine with the opposite direction first.
        of_word: for each word, the latents with a cosine of at least the floor, largest first; where there are none,
            the nearest one. Pairs `(latent, score)`.
        source (`str`): what the vocabulary is.
    """

    names: LatentNames
    away: LatentNames
    of_word: list[list[tuple[int, float]]]
    source: str


@torch.no_grad()
def words_of(
    model: VS2CLIPForZeroShot,
    tokenizer: Any,
    vocabulary: Sequence[str] | None,
    class_names: Sequence[str],
    templates: Any,
    progress: bool,
) -> Words:
    """Words from the vocabulary; without one, from [`common_words`] and the class names; none without a tokenizer."""
    if tokenizer is None:
        nothing = torch.zeros(len(model.sae.W_dec), 0)
        none = LatentNames([], nothing.long(), nothing, 0.0)
        return Words(none, none, [], "nothing: the model has no texts")
    if vocabulary is None:
        common = common_words()
        own = {name.casefold() for name in class_names}
        given = [*class_names, *(word for word in clean_class_names(common) if word.casefold() not in own)]
        source = f"{len(common):,} common words (WordNet, ImageNet; see words_licence.txt of hf_vs2)"
        source += " and the names of the classes" if class_names else ""
        words, embeds = embed_words(model, tokenizer, given, templates=templates, clean=False, progress=progress)
    else:
        words, embeds = embed_words(model, tokenizer, vocabulary, templates=templates, progress=progress)
        source = f"{len(words):,} words that were given"
    directions = embedding_directions(model)
    floor = chance_score(directions, embeds)
    towards, away = (closest_words(sign * directions, embeds, NUM_WORDS) for sign in (1, -1))
    names, opposite = (LatentNames(words, indices.cpu(), scores.cpu(), floor) for indices, scores in (towards, away))
    return Words(names, opposite, _latents_of_words(directions, embeds, floor), source)


def _latents_of_words(directions: torch.Tensor, embeds: torch.Tensor, floor: float) -> list[list[tuple[int, float]]]:
    unit = normalize(directions, dim=-1)
    found = []
    for some in centre(embeds).split(256):
        best = (some @ unit.T).topk(min(NUM_FOUND, len(unit)), dim=-1)
        for latents, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            above = sum(score >= floor for score in scores)
            found.append(list(zip(latents, scores, strict=True))[: max(above, 1)])
    return found
