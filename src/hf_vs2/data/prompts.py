"""Class prompts for zero-shot classification: templates, and the matrix of class embeddings made from them.

A template is a sentence with `{}` where the class name goes. Several templates form an ensemble, which is averaged in
embedding space, as OpenAI's CLIP does it: encode, normalise, mean over templates, normalise again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import normalize
from tqdm.auto import tqdm
from transformers.utils import logging


if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase


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
        templates: `"single"` (`"a photo of a {}."`), `"ensemble"` (OpenAI's seven), the path of a text file with one
            template a line (empty lines are skipped), or the templates themselves as a sequence.

    Raises:
        ValueError: a template has no `{}`, there is none at all, or the string is neither a built-in nor a file.
        TypeError: something in the sequence is not a string.
    """
    if isinstance(templates, (str, Path)):
        name = str(templates)
        if name in BUILT_IN_TEMPLATES:
            return BUILT_IN_TEMPLATES[name]
        source = f"the template file {name}"
        found: Sequence[str] = _read_template_file(name)
    else:
        source, found = "the list of templates", list(templates)
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


def _read_template_file(name: str) -> list[str]:
    path = Path(name)
    if not path.is_file():
        hint = "; to use it as a template, put it in a list" if "{}" in name else ""
        raise ValueError(
            f"templates={name!r} is neither one of {sorted(BUILT_IN_TEMPLATES)} nor a text file with one prompt a line{hint}."
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the template file {name} is not UTF-8 text ({error.reason} at byte {error.start})."
        ) from error
    return [line.strip() for line in lines if line.strip()]


def clean_class_names(class_names: Sequence[str]) -> list[str]:
    """Class names as they are read in a prompt: `_` becomes a space, outer white space goes.

    Raises:
        ValueError: no name, an empty one, or one that occurs twice (its two classes could not be told apart).
        TypeError: one string in place of a list, or a name that is not a string.
    """
    if isinstance(class_names, str):
        raise TypeError(f"class_names must be a list of strings, not the single string {class_names!r}.")
    first_index: dict[str, int] = {}
    for index, name in enumerate(class_names):
        if not isinstance(name, str):
            raise TypeError(f"class_names[{index}] is {name!r}, a {type(name).__name__}: every name must be a string.")
        cleaned = " ".join(name.replace("_", " ").split())
        if not cleaned:
            raise ValueError(f"class_names[{index}] is empty: every class needs a name to make a prompt of.")
        if cleaned in first_index:
            raise ValueError(
                f"class_names has {cleaned!r} twice (at {first_index[cleaned]} and {index}): "
                "two classes with one name get the same prompts; tell them apart, as in 'crane (bird)'."
            )
        first_index[cleaned] = index
    if not first_index:
        raise ValueError("class_names is empty: give the names of the classes to choose from.")
    return list(first_index)


@torch.no_grad()
def class_embeddings(
    clip: CLIPModel,
    tokenizer: PreTrainedTokenizerBase,
    class_names: Sequence[str],
    templates: str | Path | Sequence[str] = "single",
    batch_size: int = 256,
    progress: bool = False,
    clean: bool = True,
) -> torch.Tensor:
    """The zero-shot classifier of a label set: one unit row a class, float32 `(num_classes, projection_dim)`.

    Each prompt is encoded and normalised; a class is the normalised mean over its templates. Distinct prompts are
    encoded once. Prompts longer than the text tower's `max_position_embeddings` are cut, with a warning.

    Args:
        clip: any `CLIPModel`; the rows are on its device.
        tokenizer: the tokenizer of that model.
        class_names: the label set, in the order of the labels.
        templates: anything [`resolve_templates`] takes.
        batch_size: prompts encoded at a time.
        progress: show a progress bar.
        clean: read names by [`clean_class_names`]; `False` puts them into the templates as they are.

    Raises:
        ValueError, TypeError: see [`resolve_templates`] and [`clean_class_names`].
    """
    templates = resolve_templates(templates)
    names = clean_class_names(class_names) if clean else list(class_names)
    # str.replace, not str.format: names and templates may hold braces of their own.
    prompts = [template.replace("{}", name) for name in names for template in templates]
    distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    encoded = _encode(clip, tokenizer, list(distinct), batch_size, progress)
    rows = torch.tensor([distinct[prompt] for prompt in prompts], device=encoded.device)
    return normalize(encoded[rows].unflatten(0, (len(names), len(templates))).mean(1), dim=-1)


def _encode(
    clip: CLIPModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], batch_size: int, progress: bool
) -> torch.Tensor:
    """Unit text embeddings, float32 `(len(prompts), projection_dim)`."""
    table = clip.text_model.embeddings
    positions = table.position_embedding.num_embeddings
    embeddings, full = [], []
    for start in tqdm(range(0, len(prompts), batch_size), desc="Encoding prompts", disable=not progress):
        batch = prompts[start : start + batch_size]
        tokens = tokenizer(
            batch, padding=True, truncation=True, max_length=positions, return_attention_mask=True, return_tensors="pt"
        )
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        if ids.max() >= table.token_embedding.num_embeddings:
            raise ValueError(
                f"the tokenizer gives token {int(ids.max())}, but the text tower knows "
                f"{table.token_embedding.num_embeddings}: this is not the tokenizer of this CLIP."
            )
        full += [prompt for prompt, used in zip(batch, mask.sum(-1).tolist(), strict=True) if used == positions]
        output = clip.get_text_features(input_ids=ids.to(clip.device), attention_mask=mask.to(clip.device))
        embeddings.append(normalize(output.pooler_output.float(), dim=-1))
    if full:
        logger.warning(
            f"{len(full)} of {len(prompts)} prompts fill all {positions} positions of the text tower; "
            f"what goes beyond was cut. The first: {full[0]!r}"
        )
    return torch.cat(embeddings)
