"""Whose words a model card holds: ours may be written anew, a user's are kept and only the metadata are brought up to
date.

A card that this package wrote or uploaded ends in a comment with two digests, one of its text and one of its metadata.
Where they no longer match, somebody has edited that part.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from typing import Any

from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import yaml_dump

from ..yaml_files import read_yaml


# Facts that the checkpoint records: where they changed, the card must follow.
_FACTS = ("base_model", "base_model_relation")
_MARKER = re.compile(r"\n*<!-- hf_vs2 (wrote|uploaded) this card: ([0-9a-f]{16}) ([0-9a-f]{16})\.[^>]*-->\s*$")
_MARKER_TEXT = "\n\n<!-- hf_vs2 {how} this card: {text} {data}. Edit it as you like: your text is kept. -->\n"


class CardError(ValueError):
    """A card whose metadata can't be read."""


@dataclass(frozen=True)
class Card:
    """
    A model card taken apart.

    Args:
        data (`dict`): the metadata. text (`str`): the Markdown, without our marker.
        author (`str`): `"wrote"` for a text of ours, `"uploaded"` for a user's that we brought to the Hub, `""` for
            any other.
        text_changed, data_changed (`bool`): whether that part was edited since; always true without a marker.
        source (`str`): the file as it is.
    """

    data: dict[str, Any]
    text: str
    author: str = ""
    text_changed: bool = True
    data_changed: bool = True
    source: str = ""

    @classmethod
    def parse(cls, source: str, name: str = "README.md") -> Card:
        """Take a file apart; a [`CardError`] if its metadata block is not a YAML mapping."""
        block = REGEX_YAML_BLOCK.search(source)
        try:
            data = (read_yaml(block.group(2), f"The metadata at the top of {name}") or {}) if block else {}
        except ValueError as error:
            raise CardError(f"{error}.") from error
        if not isinstance(data, dict):
            raise CardError(
                f"The metadata at the top of {name} must be 'name: value' lines, not {type(data).__name__}."
            )
        text = source[block.end() :] if block else source
        marker = _MARKER.search(text)
        if marker is None:
            return cls(data, text, source=source)
        text = text[: marker.start()]
        changed = (_digest(_normal(text)) != marker.group(2), _digest(data) != marker.group(3))
        return cls(data, text, marker.group(1), *changed, source=source)

    @property
    def is_users(self) -> bool:
        """Whether the text is a user's."""
        return self.author != "wrote" or self.text_changed

    def with_data(self, data: dict[str, Any]) -> Card:
        """The same card with other metadata; not one other character is changed."""
        return self if data == self.data else replace(self, data=data, source=_assemble(data, self.source))

    def signed(self, how: str, generated: dict[str, Any] | None = None) -> Card:
        """The same card with our marker, `"wrote"` or `"uploaded"`. `generated`: the metadata to take the digest of,
        where a user's have been merged in since; so the user's go on counting as an edit."""
        digests = {"text": _digest(_normal(self.text)), "data": _digest(self.data if generated is None else generated)}
        unsigned = _MARKER.sub("", self.source).rstrip()
        return Card.parse(unsigned + _MARKER_TEXT.format(how=how, **digests))


def refresh_card(ours: str, found: str | None, name: str = "README.md") -> str:
    """What a card file should hold now: `ours`, just generated, or the text that a user wrote in `found` with our
    metadata."""
    if found is None:
        return ours
    return _refreshed(Card.parse(ours), Card.parse(found, name)).source


def card_to_upload(ours: str, local: str | None, remote: str | None) -> tuple[str, bool]:
    """
    The card to put on the Hub, from the one just generated, the one in the folder and the one on the Hub.

    A text edited on the Hub stays. Otherwise the folder's goes up if a user wrote it, else what a user had uploaded
    stays, else ours is written anew. Metadata are merged, a user's values first.

    Returns:
        The file's content, and whether a user's text in the folder had to stand back for one on the Hub.
    """
    mine = generated = Card.parse(ours)
    if local is not None:
        mine = _refreshed(generated, Card.parse(local))
    if mine.is_users:
        mine = mine.signed("uploaded")
    if remote is None:
        return mine.source, False
    there = Card.parse(remote, "README.md on the Hub")
    edited_there = not there.author or there.text_changed
    if mine.is_users and not edited_there:
        merged = mine.with_data(merge_metadata(mine.data, there.data)) if there.data_changed else mine
        return merged.signed("uploaded", generated=mine.data).source, False
    stands_back = mine.is_users and _normal(mine.text) != _normal(there.text)
    refreshed = _refreshed(mine, there)
    if not refreshed.is_users:
        refreshed = refreshed.signed("wrote", generated=generated.data)
    return refreshed.source, stands_back


def _refreshed(new: Card, old: Card) -> Card:
    is_ours = old.author == "wrote" and not old.data_changed
    data = new.data if is_ours else merge_metadata(new.data, old.data)
    if is_ours and old.data.get("tags"):  # given in an earlier push, perhaps
        data = data | {"tags": _united(new.data.get("tags") or [], old.data["tags"])}
    if old.is_users:
        return old.with_data(data)
    return new.with_data(data).signed("wrote", generated=new.data)


def merge_metadata(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """A user's metadata brought up to date: their values stay, in their order; lists are united; what they lack is
    added.

    Facts that the checkpoint records (its base model) and figures measured anew replace the old ones.
    """
    merged = dict(theirs)
    for key, value in ours.items():
        old = theirs.get(key)
        if key == "model-index" and old:
            merged[key] = _merge_model_index(value, old)
        elif isinstance(old, list) and isinstance(value, list):
            merged[key] = _united(old, value)
        elif old is None or key in _FACTS:
            merged[key] = value
    return merged


def license_of(source: str | None) -> str | None:
    """The licence that a card names."""
    license = None if source is None else Card.parse(source).data.get("license")
    return license if isinstance(license, str) else None


def _united(first: list[Any], second: list[Any]) -> list[Any]:
    return first + [item for item in second if item not in first]


def _merge_model_index(ours: list[dict[str, Any]], theirs: Any) -> Any:
    try:
        name, old = model_index_to_eval_results(theirs)
    except (KeyError, TypeError, AttributeError):
        return theirs  # not in the Hub's form: whatever it is, it is the user's
    _, new = model_index_to_eval_results(ours)
    measured = {_which(result) for result in new}
    return eval_results_to_model_index(name, [result for result in old if _which(result) not in measured] + new)


def _which(result: EvalResult) -> tuple[Any, ...]:
    return (*result.unique_identifier, result.metric_type, result.metric_name)


def _assemble(data: dict[str, Any], source: str) -> str:
    """`source` with its metadata block replaced, or put before it where there was none."""
    block = REGEX_YAML_BLOCK.search(source)
    newline = "\r\n" if "\r\n" in source else "\n"
    lines = ["---", *yaml_dump(data, sort_keys=False).rstrip().split("\n"), "---", ""]
    return newline.join(lines) + (source[block.end() :] if block else source)


def _normal(text: str) -> str:
    # Editors and the Hub's web page change line ends and blank lines at either end; that is no edit.
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def _digest(content: Any) -> str:
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
