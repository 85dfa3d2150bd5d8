"""Our docstrings, which are in Hugging Face's style, as Markdown that mkdocstrings shows as it is."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import griffe


SOURCES = Path(__file__).parents[1] / "src" / "hf_vs2"
SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields|Example|Examples|Note):(.*)$")
# `name (type): text`, `name: text`, `name (type), other (type): text`; in Raises also `ValueError`.
ITEM = re.compile(r"^(?P<head>(?:`[^`]*`|\((?:[^()]|\([^()]*\))*\)|\[[^\]]*\]|[^:`()\[\]])+):(?:\s+(?P<text>.*))?$")
REFERENCE = re.compile(r"\[`~?([\w.]+)(\(\))?`\](?![(\[])")


class MarkdownDocstrings(griffe.Extension):
    """Rewrites every docstring when it is collected. A dataclass field's help is its documentation."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        call = ast.parse(str(attr.value), mode="eval").body if str(attr.value).startswith("field(") else None
        if not isinstance(call, ast.Call):
            return
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if "metadata" in given:
            attr.docstring = griffe.Docstring(ast.literal_eval(given["metadata"])["help"], parent=attr)
        attr.value = ast.unparse(given["default"]) if "default" in given else None


def to_markdown(docstring: str) -> str:
    """Sections become a bold title and a list with one item an argument; references become links."""
    lines = inspect.cleandoc(docstring).splitlines()
    out: list[str] = []
    index = 0
    while index < len(lines):
        section = SECTION.match(lines[index])
        if section is None:
            out.append(lines[index])
            index += 1
            continue
        body = [section[2].strip()] if section[2].strip() else []
        index += 1
        while index < len(lines) and (not lines[index].strip() or lines[index].startswith(" ")):
            body.append(lines[index])
            index += 1
        out += ["", f"**{section[1]}**", "", *_section(section[1], inspect.cleandoc("\n".join(["", *body]))), ""]
    return with_references("\n".join(_fenced(out)))


def _section(name: str, body: str) -> list[str]:
    if name in ("Returns", "Yields", "Example", "Examples", "Note"):
        return body.splitlines()
    items: list[str] = []
    head = ""  # of an item whose names and types take several lines
    for line in body.splitlines():
        if not head and (not line or line.startswith(" ")):  # the item goes on
            items.append(f"    {line.strip()}".rstrip())
            continue
        head = f"{head} {line.strip()}".strip()
        item = ITEM.match(head)
        if item is not None:
            items.append(
                f"- {item['head'] if name == 'Raises' else _head(item['head'])}: {item['text'] or ''}".rstrip()
            )
            head = ""
    return [*items, head]


def _head(head: str) -> str:
    """The names of arguments in code, their types as they are."""
    depth, names, out = 0, "", ""
    for character in head:
        depth += (character in "([") - (character in ")]")
        if depth == 0 and (character.isalnum() or character in "_*."):
            names += character
            continue
        out += f"`{names}`" if names else ""
        names = ""
        out += character
    return out + (f"`{names}`" if names else "")


def _fenced(lines: list[str]) -> list[str]:
    """A paragraph that is indented by four is a block of code: said with a fence, so that no list swallows it."""
    out: list[str] = []
    inside = in_item = False
    for line in lines:
        if line.startswith("- "):
            in_item = True
        elif line and not line.startswith(" "):
            in_item = False
        code = line.startswith("    ") and not in_item
        if code and not inside:
            out.append("```text")
        elif inside and line.strip() and not code:
            while out and not out[-1].strip():
                out.pop()
            out += ["```", ""]
        inside = code or (inside and not line.strip())
        out.append(line[4:] if inside and line.strip() else line)
    return [*out, "```"] if inside else out


def with_references(text: str) -> str:
    """[`Name`] becomes a link to where the reference shows that name, or code where it does not."""
    return REFERENCE.sub(lambda found: _reference(found[1], found[2] or ""), text)


def _reference(name: str, call: str) -> str:
    shown = shown_names()
    short = name.removeprefix("hf_vs2.").split(".")
    for length in range(len(short)):
        path = ".".join(short[length:])
        first = path.split(".")[0]
        if first in shown:
            return f"[`{path}{call}`][{shown[first]}{path.removeprefix(first)}]"
    return f"`{name.removeprefix('hf_vs2.')}{call}`"


@cache
def shown_names() -> dict[str, str]:
    """Last part -> full path, of everything that docs/reference/api.md shows."""
    page = Path(__file__).parent / "reference" / "api.md"
    paths = re.findall(r"^::: ([\w.]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {path.split(".")[-1]: path for path in paths}
