"""YAML of anybody's, read without code, without keys that stand twice, and without growing beyond what a person would
write."""

from __future__ import annotations

import re
from typing import Any

import yaml


_MOST_LETTERS, _MOST_VALUES, _LONGEST_NUMBER = 1_000_000, 100_000, 100


class _Loader(yaml.SafeLoader):
    """Plain values; `5e-4` is a number, as in YAML 1.2."""


_Loader.yaml_implicit_resolvers = {key: list(found) for key, found in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+0123456789.")
)


def read_yaml(source: Any, name: Any, as_text: bool = False) -> Any:
    """The content of YAML, from a text or a file on disk or in a package; with `as_text` every single value stays
    text, as on a command line. What is no YAML, has a key twice, or stands for more values than anybody writes
    (aliases of aliases) is a `ValueError`, which calls it `name`."""
    loader: Any = None
    try:
        text = source if isinstance(source, str) else source.read_text(encoding="utf-8")
        if len(text) > _MOST_LETTERS:
            raise ValueError(f"it has {len(text):,} letters, more than the {_MOST_LETTERS:,} that are read")
        loader = (yaml.BaseLoader if as_text else _Loader)(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:300]
        raise ValueError(f"{name} is not a YAML file that can be used: {why}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _count(node: Any, counted: dict[int, int]) -> int:
    """How many values a node stands for, with all aliases written out."""
    if id(node) in counted:
        if not counted[id(node)]:
            raise ValueError(f"line {node.start_mark.line + 1} holds itself")
        return counted[id(node)]
    counted[id(node)] = 0
    if isinstance(node, yaml.ScalarNode):
        if not node.tag.endswith(":str") and node.tag.startswith("tag:") and len(node.value) > _LONGEST_NUMBER:
            raise ValueError(f"line {node.start_mark.line + 1} has a number of {len(node.value):,} letters")
        total = 1
    elif isinstance(node, yaml.MappingNode):
        _refuse_doubled(node)
        total = 1 + sum(_count(key, counted) + _count(value, counted) for key, value in node.value)
    else:
        total = 1 + sum(_count(item, counted) for item in node.value)
    if total > _MOST_VALUES:
        raise ValueError(f"line {node.start_mark.line + 1} stands for more than {_MOST_VALUES:,} values")
    counted[id(node)] = total
    return total


def _refuse_doubled(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value != "<<":
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ValueError(f"{key.value[:80]!r} stands twice, in lines {lines[key.value]} and {line}")
            lines[key.value] = line
