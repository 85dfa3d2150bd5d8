"""Class prompts for zero-shot classification: templates, and the matrix of class embeddings made from them.

A template is a sentence with `{}` where the class name goes. Several templates form an ensemble, which is averaged in
embedding space, as OpenAI's CLIP does it: encode, normalise, mean over templates, normalise again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import normalize
from transformers import CLIPModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ...encoders.families import embedding_width, family_of, refuse_without_texts
from ...encoders.tail import unit_embeds
from ...encoders.wrapped import device_of
from ...files.progress import progress_bar
from .lists import names_in, read_list
from .names import clean_class_names


logger = logging.get_logger(__name__)

SINGLE_TEMPLATE = ("a photo of a {}.",)
# The seven that sequential forward selection kept of OpenAI's 80 ImageNet templates, in the order it chose them:
# openai/CLIP (MIT), notebooks/Prompt_Engineering_for_ImageNet.ipynb.
ENSEMBLE_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
BUILT_IN_TEMPLATES = {"single": SINGLE_TEMPLATE, "ensemble": ENSEMBLE_TEMPLATES}


def resolve_templates(templates: str | Path | Sequence[str]) -> tuple[str, ...]:
    """The prompt templates that a user's choice stands for.

    Args:
        templates: `"single"` (`"a photo of a {}."`), `"ensemble"` (OpenAI's seven), the path of a file of templates
            (text with one a line, a JSON list, or a table with a column `template`), or the templates themselves as a
            sequence.

    Raises:
        ValueError: a template has no `{}`, there is none at all, or the string is neither a built-in nor a file.
        TypeError: something in the sequence is not a string.
    """
    if isinstance(templates, (str, Path)):
        name = str(templates)
        if name in BUILT_IN_TEMPLATES:
            return BUILT_IN_TEMPLATES[name]
        if not os.path.isfile(os.path.expanduser(name)):
            hint = (
                "; to use it as a template, put it in a list (in a file, for the command line)" if "{}" in name else ""
            )
            raise ValueError(
                f"templates={name!r} is neither one of {sorted(BUILT_IN_TEMPLATES)} nor a file of prompts{hint}."
            )
        source = f"the template file {name}"
        found = names_in(read_list(name, "the template file"))
    else:
        source, found = "the list of templates", names_in(templates, "templates")
    if not found:
        raise ValueError(f"{source} is empty: give at least one prompt with {{}} where the class name goes.")
    for template in found:
        if not isinstance(template, str):
            raise TypeError(
                f"{source} holds {template!r}, a {type(template).__name__}: every template must be a string."
            )
        if "{}" not in template:
            raise ValueError(f"{source} holds {template!r}, which has no {{}} where the class name goes.")
    return tuple(found)


@torch.no_grad()
def class_embeddings(
    clip: CLIPModel,
    tokenizer: PreTrainedTokenizerBase | Mapping[str, torch.Tensor],
    class_names: Sequence[str],
    templates: str | Path | Sequence[str] = "single",
    batch_size: int = 256,
    progress: bool = False,
    clean: bool = True,
    refuse_same: bool = True,
    tokenizer_kwargs: Mapping[str, Any] | None = None,
    by_length: bool = False,
) -> torch.Tensor:
    """The zero-shot classifier of a label set: one unit row a class, float32 `(num_classes, projection_dim)`.

    Each prompt is encoded and normalised; a class is the normalised mean over its templates. Distinct prompts are
    encoded once. Prompts longer than the text tower's `max_position_embeddings` are cut, with a warning.

    Args:
        clip: any `CLIPModel`; the rows are on its device.
        tokenizer: the tokenizer of that model; or the embeddings themselves, `(projection_dim,)` of any length by
            name, which is the one way for a model without texts.
        class_names: the label set, in the order of the labels.
        templates: anything [`resolve_templates`] takes.
        batch_size: prompts encoded at a time.
        progress: show a progress bar.
        clean: read names by [`clean_class_names`]; `False` puts them into the templates as they are.
        refuse_same: refuse names that are the same to this CLIP; a vocabulary may have such.
        tokenizer_kwargs: further arguments of the tokenizer.
        by_length: batches of prompts of as many tokens, without padding: the same to float rounding, and the same bits
            where there is one batch.

    Raises:
        ValueError, TypeError: see [`resolve_templates`] and [`clean_class_names`]; and for two names whose prompts are
            the same to this CLIP, such as `Cat` and `cat`.
    """
    names = clean_class_names(class_names, clean)
    if isinstance(tokenizer, Mapping):
        return _given_embeddings(clip, tokenizer, class_names, names)
    options = (batch_size, refuse_same, tokenizer_kwargs, by_length)
    prompts, batches, rows = _read_prompts(clip, tokenizer, names, resolve_templates(templates), *options)
    encoded = _encode(clip, prompts, batches, progress)
    return normalize(encoded[rows.to(encoded.device)].mean(1), dim=-1)


def check_prompts(
    clip: CLIPModel,
    tokenizer: PreTrainedTokenizerBase | Mapping[str, torch.Tensor],
    class_names: Sequence[str],
    templates: str | Path | Sequence[str] = "single",
    clean: bool = True,
) -> None:
    """Refuse what [`class_embeddings`] refuses, without encoding a text: for use before images are read."""
    names = clean_class_names(class_names, clean)
    if isinstance(tokenizer, Mapping):
        _given_embeddings(clip, tokenizer, class_names, names)
    else:
        _read_prompts(clip, tokenizer, names, resolve_templates(templates))


def _read_prompts(
    clip: CLIPModel,
    tokenizer: PreTrainedTokenizerBase,
    names: list[str],
    templates: Sequence[str],
    batch_size: int = 256,
    refuse_same: bool = True,
    options: Mapping[str, Any] | None = None,
    by_length: bool = False,
) -> tuple[list[str], list[TokenBatch], torch.Tensor]:
    """Distinct prompts in the order of their batches of tokens, and the place of each name's prompts among them,
    `(number of names, number of templates)`."""
    refuse_without_texts(clip)
    # str.replace, not str.format: names and templates may hold braces of their own.
    prompts = [template.replace("{}", name) for name in names for template in templates]
    distinct = list(dict.fromkeys(prompts))
    by_length = by_length and len(distinct) > batch_size
    batches = tokenized(clip, tokenizer, distinct, batch_size, options or {}, by_length)
    encoded_as = [distinct[number] for batch in batches for number in batch.numbers]
    row_of = {prompt: row for row, prompt in enumerate(encoded_as)}
    rows = torch.tensor([row_of[prompt] for prompt in prompts]).unflatten(0, (len(names), len(templates)))
    if refuse_same:
        _refuse_same(names, rows.tolist(), _read_tokens(clip, batches))
    return encoded_as, batches, rows


def _given_embeddings(
    clip: CLIPModel, given: Mapping[str, Any], as_written: Sequence[str], names: Sequence[str]
) -> torch.Tensor:
    """Of each class what was given under its name, as written or read."""
    width, found = embedding_width(clip), []
    for keys in zip(names, as_written, strict=True):
        rows = [torch.as_tensor(given[key]).float() for key in keys if key in given]
        if not rows or rows[0].shape != (width,):
            what = f"of shape {tuple(rows[0].shape)}" if rows else "missing"
            raise ValueError(f"The embedding of the label {keys[0]!r} is {what}; expected one of shape ({width},).")
        found.append(rows[0])
    return unit_embeds(torch.stack(found).to(device_of(clip)), lambda row: f"the label {names[row]!r}")


class TokenBatch(NamedTuple):
    """Which of the prompts these are, and their token ids and attention mask, `(batch, length)` each."""

    numbers: Sequence[int]
    ids: torch.Tensor
    mask: torch.Tensor


def tokenized(
    clip: CLIPModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    batch_size: int,
    options: Mapping[str, Any],
    by_length: bool = False,
) -> list[TokenBatch]:
    """The batches of prompts, in their order; `by_length` each of prompts of as many tokens, the short ones first."""
    refuse_without_texts(clip)
    positions = _num_positions(clip)
    given = {"padding": family_of(clip).padding, "truncation": True, "max_length": positions, **options}
    if by_length and given["padding"] is True:
        batches = _by_length(tokenizer(prompts, **given | {"padding": False}, return_attention_mask=True), batch_size)
    else:
        batches = []
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            tokens = tokenizer(batch, **given, return_attention_mask=True, return_tensors="pt")
            batches.append(TokenBatch(range(start, start + len(batch)), tokens["input_ids"], tokens["attention_mask"]))
    full = []
    for numbers, ids, mask in batches:
        if ids.max() >= clip.config.text_config.vocab_size:
            raise ValueError(
                f"the tokenizer gives token {int(ids.max())}, but the text tower knows "
                f"{clip.config.text_config.vocab_size}: this is not the tokenizer of this CLIP."
            )
        used = mask.sum(-1).tolist()
        full += [prompts[number] for number, count in zip(numbers, used, strict=True) if count == positions]
    if full:
        logger.warning_once(
            f"{len(full)} of {len(prompts)} prompts fill all {positions} positions of the text tower; "
            f"what goes beyond was cut. The first: {full[0]!r}"
        )
    return batches


def _by_length(tokens: Mapping[str, list[list[int]]], batch_size: int) -> list[TokenBatch]:
    ids, masks = tokens["input_ids"], tokens["attention_mask"]
    batches = []
    for _, group in groupby(sorted(range(len(ids)), key=lambda row: len(ids[row])), key=lambda row: len(ids[row])):
        same = list(group)
        for start in range(0, len(same), batch_size):
            rows = same[start : start + batch_size]
            batches.append(
                TokenBatch(rows, torch.tensor([ids[row] for row in rows]), torch.tensor([masks[row] for row in rows]))
            )
    return batches


def _num_positions(clip: CLIPModel) -> int:
    """How many tokens of a text its text tower reads."""
    for name, part in clip.text_model.named_modules():
        if isinstance(part, nn.Embedding) and "position_embedding" in name:
            # RoBERTa's first position is the one behind that of its padding.
            return part.num_embeddings - (0 if part.padding_idx is None else part.padding_idx + 1)
    return clip.config.text_config.max_position_embeddings


def _read_tokens(clip: CLIPModel, batches: list[TokenBatch]) -> list[bytes]:
    """What of each prompt decides its embedding: of a CLIP the tokens up to the one that is pooled, which sees none
    behind it."""
    if not family_of(clip).reads_mask:  # all positions are seen
        return [row.numpy().tobytes() for batch in batches for row in batch.ids]
    if not family_of(clip).reads_to_end:
        pairs = ((row, seen) for batch in batches for row, seen in zip(batch.ids, batch.mask.bool(), strict=True))
        return [row[seen].numpy().tobytes() for row, seen in pairs]
    end = clip.config.text_config.eos_token_id
    # As CLIP's text model has it: in old checkpoints the token of the highest number, else the first end token.
    pooled = [(ids if end == 2 else (ids == end).int()).argmax(-1).tolist() for _, ids, _ in batches]
    return [
        ids[row, : place + 1].numpy().tobytes()
        for (_, ids, _), places in zip(batches, pooled, strict=True)
        for row, place in enumerate(places)
    ]


def _refuse_same(names: list[str], rows: list[list[int]], tokens: list[bytes]) -> None:
    """Two classes with the same tokens in every template can't be told apart: one of them would never be answered."""
    first: dict[tuple[bytes, ...], str] = {}
    for name, prompts in zip(names, rows, strict=True):
        other = first.setdefault(tuple(tokens[prompt] for prompt in prompts), name)
        if other is not name:
            raise ValueError(
                f"the names {_short(other)} and {_short(name)} are one to this CLIP, whose tokenizer reads the same "
                "in their prompts: letter case, blanks and what stands beyond its last position or an end token do "
                "not count. Leave one out, or tell them apart, as in 'crane (bird)'."
            )


def _short(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:30]} ... {name[-40:]}")


def _encode(clip: CLIPModel, prompts: list[str], batches: list[TokenBatch], progress: bool) -> torch.Tensor:
    """Unit text embeddings, float32 `(number of prompts, projection_dim)`."""
    embeddings: list[torch.Tensor] = []
    named = iter(prompts)
    for _, ids, mask in progress_bar(batches, shown=progress and len(batches) > 1, desc="Encoding prompts"):
        names = [f"the prompt {prompt!r}" for prompt in islice(named, len(ids))]
        embeddings.append(unit_embeds(text_features(clip, ids, mask), names.__getitem__))
    return torch.cat(embeddings)


def text_features(clip: CLIPModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Text features `(batch, projection_dim)`, not normalised, of what [`tokenized`] gives, `(batch, length)` each."""
    device = device_of(clip)
    inputs = {"attention_mask": mask.to(device)} if family_of(clip).reads_mask else {}
    return clip.get_text_features(input_ids=ids.to(device), **inputs).pooler_output
