"""Names for latents: the words whose text embeddings a decoder direction moves an image towards.

A decoder direction `d_i` lives in the space of CLS rows, before `post_layernorm`; words live in the projected space.
What joins them is the model's own tail: moving a row `x` a little along `d_i` moves its unit image embedding `e(x)`
along the derivative `J(x) d_i`, through LayerNorm, projection and normalisation, taken here at the mean of the
training rows. LayerNorm's affine part and the projection alone would keep what the tail takes away: the component
along the row itself, which changes no score. (With the ViT-Ti of docs/atlas.md the two name nearly alike; the
derivative at the rows that activate the latent, in place of the mean, names them worse.)

Text embeddings share a large common part (the modality gap), to which a direction is near or far whatever it means. So
the vocabulary's mean embedding is subtracted from each word before the cosine: a name says what sets a word apart from
the others in the vocabulary, and a score depends on the vocabulary. There is always a nearest word, so a name must
score more than the nearest word of directions without a meaning ([`chance_score`]).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import normalize

from ..data.labels.lists import names_in, read_list
from ..data.labels.names import clean_class_names, clean_name
from ..data.labels.prompts import class_embeddings
from ..encoders.families import family_of


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


NUM_MIXTURES, CHANCE = 1000, 0.99


class LatentNames(NamedTuple):
    """The words of each latent, best first."""

    words: list[str]
    """The vocabulary, as it was read in the prompts."""
    indices: torch.Tensor
    """Which words they are, int64 `(num_latents, top)`, on the CPU."""
    scores: torch.Tensor
    """Their cosines with the latent's direction, float32 `(num_latents, top)`, on the CPU."""
    floor: float = -math.inf
    """What the best word of a direction without a meaning scores (see [`chance_score`]): a word with less names
    nothing."""

    def of(self, latent: int) -> list[tuple[str, float]]:
        """The words of one latent with their scores, best first, below the floor too."""
        pairs = zip(self.indices[latent].tolist(), self.scores[latent].tolist(), strict=True)
        return [(self.words[index], score) for index, score in pairs]

    def name(self, latent: int) -> str | None:
        """The best word of a latent, or `None` where even that one lies below the floor."""
        return next((word for word, score in self.of(latent)[:1] if score >= self.floor), None)


@torch.no_grad()
def name_latents(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Sequence[str],
    *,
    templates: str | Path | Sequence[str] = "single",
    top: int = 5,
    clean: bool = True,
    progress: bool = False,
) -> LatentNames:
    """
    The words of a vocabulary that each latent of the last layer's SAE points to.

    A latent that only ever has positive values (`activation="relu"`) moves images towards its words; of one that may
    be negative the words are those of its positive side. A zero direction has scores of 0.

    Args:
        model: a [`VS2CLIPForZeroShot`] with an SAE on the last layer, or its `steerer`. It is left as it was found.
        tokenizer: the tokenizer of its CLIP.
        vocabulary: two or more different words, such as class names, [`common_words`], or the lines of a file
            ([`read_vocabulary`]).
        templates: prompts around a word, anything [`resolve_templates`] takes.
        top: words a latent, at most as many as there are.
        clean: read words by [`clean_class_names`].
        progress: show a progress bar while words are encoded.

    Raises:
        ValueError, TypeError: fewer than two words, or a fault in the words or templates.
    """
    words, embeds = embed_words(model, tokenizer, vocabulary, templates=templates, clean=clean, progress=progress)
    directions = embedding_directions(model)
    indices, scores = closest_words(directions, embeds, top)
    return LatentNames(words, indices.cpu(), scores.cpu(), chance_score(directions, embeds))


def embed_words(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Sequence[str],
    *,
    templates: str | Path | Sequence[str] = "single",
    clean: bool = True,
    progress: bool = False,
) -> tuple[list[str], torch.Tensor]:
    """The words of [`name_latents`] as prompts read them, and their unit text embeddings `(num_words,
    projection_dim)`."""
    words = clean_class_names(vocabulary, clean, "the vocabulary")
    if len(words) < 2:
        raise ValueError(
            f"a vocabulary of one word, {words[0]!r}, gives every latent the same name: give two or more words."
        )
    embeds = class_embeddings(
        model.clip, tokenizer, words, templates, progress=progress, clean=False, refuse_same=False
    )
    return words, embeds


def chance_score(directions: torch.Tensor, word_embeds: torch.Tensor) -> float:
    """
    The score that the best word of a direction without a meaning stays below in 99 of 100 cases.

    Such directions are random mixtures of all the latents' own, with weights from a normal distribution and a fixed
    seed. docs/atlas.md tells how often names above and below are right.

    Args:
        directions: `(num_latents, projection_dim)`, of [`embedding_directions`].
        word_embeds: unit text embeddings `(num_words, projection_dim)`.
    """
    generator = torch.Generator().manual_seed(0)
    weights = (torch.randn(NUM_MIXTURES // 10, len(directions), generator=generator) for _ in range(10))
    mixtures = torch.cat([some.to(directions) @ directions for some in weights])
    return closest_words(mixtures, word_embeds, 1)[1].quantile(CHANCE).item()


@torch.no_grad()
def embedding_directions(model: Any, at: torch.Tensor | None = None) -> torch.Tensor:
    """Where each latent moves the unit image embedding: `J(at) d_i`, float32 `(num_latents, projection_dim)`, on the
    CLIP's device.

    `at` is the row `(hidden_size,)` at which the derivative is taken, by default the mean of the SAE's training rows.
    """
    clip, sae = model.clip, model.sae
    # In float32 whatever the CLIP's dtype; the tail is small.
    norm = copy.deepcopy(family_of(clip).norm(clip)).float()
    projection = copy.deepcopy(family_of(clip).projection(clip)).float()
    directions = sae.W_dec.detach().to(clip.device, torch.float32)
    # Not expanded: forward-mode differentiation writes beside each row.
    point = (sae.mean if at is None else at).to(directions).repeat(len(directions), 1)
    found = torch.func.jvp(lambda x: normalize(projection(norm(x)), dim=-1), (point,), (directions,))
    return found[1]


def closest_words(
    directions: torch.Tensor, word_embeds: torch.Tensor, top: int, block: int = 1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top` words of largest cosine with each direction, as `(indices, scores)`, each `(n, min(top, num_words))`.

    Args:
        directions: `(n, projection_dim)`, of any length.
        word_embeds: unit text embeddings `(num_words, projection_dim)`; their mean is subtracted here.
        top: at least 1.
        block: directions at a time, so that a large vocabulary takes little memory.
    """
    centred = centre(word_embeds)
    found = [
        (normalize(some, dim=-1) @ centred.T).topk(min(top, len(centred)), dim=-1) for some in directions.split(block)
    ]
    return torch.cat([one.indices for one in found]), torch.cat([one.values for one in found])


def centre(word_embeds: torch.Tensor) -> torch.Tensor:
    """Unit text embeddings `(num_words, projection_dim)` without what all words share, unit rows again."""
    return normalize(word_embeds - word_embeds.mean(0), dim=-1)


def common_words() -> list[str]:
    """About 2,900 words for things that photographs show: nouns of WordNet, ImageNet's classes, colours and textures.

    Their licences are in `words_licence.txt` beside this file; `scripts/vocabulary.py` chose them.
    """
    return (files(__package__) / "words.txt").read_text(encoding="utf-8").splitlines()


def read_vocabulary(path: str | PathLike) -> list[str]:
    """The words of a file, text with one a line (see [`read_list`]); a word that comes again counts once.

    Raises:
        ValueError: the file is not text, or holds no word. OSError: it cannot be read.
    """
    return list(dict.fromkeys(map(clean_name, names_in(read_list(path, "the vocabulary")))))
