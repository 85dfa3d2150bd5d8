"""
Hooks of the documentation's build: files from outside docs/, links out of it, formulas, a page for each entry of the
Python reference, names of the library, help of the commands.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File


REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))
from griffe_docstrings import with_references  # noqa: E402  it stands beside us, outside any package


PREFIX = "project/"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
FENCE = re.compile(r"(^ *(`{3,}).*?^ *\2 *$)", re.MULTILINE | re.DOTALL)
COMMAND_HELP = "<!-- help of all commands -->"
REFERENCE = "reference/api.md"
# `::: hf_vs2.SAEModel` and the options below it.
ENTRY = re.compile(r"^::: ([\w.]+)\n((?: +\S.*\n)*)", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Formulas become MathML, which browsers show without a script. The reference's pages stand in the navigation."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": formula})
    for tab in config.nav:
        for place, entry in enumerate(next(iter(tab.values()))):
            if isinstance(entry, dict) and REFERENCE in entry.values():
                next(iter(tab.values()))[place] = {"Python": reference_nav()}
    return config


def formula(source: str, *_: Any, **__: Any) -> str:
    """A block of `math`, which GitHub shows too: one formula in LaTeX."""
    return convert(source.strip(), display="block")


def reference_nav() -> list[Any]:
    """The overview, and under each of its headings the pages of the entries there."""
    found: list[Any] = [REFERENCE]
    for line in (REPOSITORY / "docs" / REFERENCE).read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            found.append({line[3:]: []})
        elif line.startswith("::: "):
            next(iter(found[-1].values())).append({line.rpartition(".")[2]: page_of(line[4:].strip())})
    return found


def overview(path: str) -> str:
    """A link to the page of an entry, and the first sentence of its docstring."""
    parent, _, name = path.rpartition(".")
    try:
        found = importlib.import_module(path)
    except ModuleNotFoundError:
        found = getattr(importlib.import_module(parent), name)
    first = inspect.getdoc(found).split("\n\n")[0].replace("\n", " ")
    return f"- [`{name}`][{path}]: {first}"


def page_of(path: str) -> str:
    """Of an entry of the reference, by its full name."""
    return f"reference/python/{path.rpartition('.')[2]}.md"


def on_files(files: Any, config: Any) -> Any:
    """The site shows some files of the repository where they stand: nothing is copied into docs/."""
    for pattern in config.extra["included"]:
        found = sorted(REPOSITORY.glob(pattern))
        if not found:
            raise PluginError(f"mkdocs.yml includes {pattern}, and there is no such file")
        for path in found:
            uri = PREFIX + path.relative_to(REPOSITORY).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    reference = (REPOSITORY / "docs" / REFERENCE).read_text(encoding="utf-8")
    for path, options in ENTRY.findall(reference):
        files.append(File.generated(config, page_of(path), content=f"::: {path}\n{options}"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    if COMMAND_HELP in markdown:
        markdown = markdown.replace(COMMAND_HELP, command_help())
    if page.file.src_uri == REFERENCE:
        markdown = re.sub(r"\n+(?=\n- )", "", ENTRY.sub(lambda entry: overview(entry[1]), markdown))
    parts = FENCE.split(markdown)
    for index in range(0, len(parts), 3):  # text, block, its fence, text, ...
        text = LINK.sub(lambda link: rewritten(link, page.file.src_uri, config, files), parts[index])
        parts[index] = with_references(text)
    return "".join(part for index, part in enumerate(parts) if index % 3 != 2)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """A corner of a table that says nothing is no heading."""
    return re.sub(r"<th([^>]*)></th>", r"<td\1></td>", html)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Names for what the theme leaves nameless to those who hear a page: one dialog, and one navigation, not dozens."""
    inside: list[str] = []

    def tag(found: re.Match[str]) -> str:
        if found[0] == "</nav>":
            return f"</{inside.pop()}>"
        inside.append("div" if inside else "nav")
        return f'<div role="group"{found[1]}>' if len(inside) > 1 else found[0]

    return re.sub(r"<nav\b([^>]*)>|</nav>", tag, output.replace('role="dialog"', 'role="dialog" aria-label="Search"'))


def rewritten(link: re.Match[str], uri: str, config: Any, files: Any) -> str:
    """A link of a page, where it leads out of the page's own tree: to the page that shows that file, or to the repository."""
    image, label, target = link.groups()
    path, hash_mark, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", path):
        return link[0]
    own = uri.removeprefix(PREFIX) if uri.startswith(PREFIX) else f"docs/{uri}"
    there = posixpath.normpath(posixpath.join(posixpath.dirname(own), path))
    if there.startswith("..") or not (REPOSITORY / there).exists():
        raise PluginError(f"{own} links to {target}, which is not in the repository")
    for name in (there, f"{there}/README.md"):
        place = name.removeprefix("docs/") if name.startswith("docs/") else PREFIX + name
        if files.get_file_from_path(place) is not None:
            relative = posixpath.relpath(place, posixpath.dirname(uri) or ".")
            return f"{image}[{label}]({relative}{hash_mark}{anchor})"
    source = config.extra["source_url"]
    return f"[{label}]({source}/{there}{hash_mark}{anchor})" if source else label


def command_help() -> str:
    """The `--help` of each command as it prints it on a terminal of 100 columns."""
    # Before the first import: colours and widths are read then.
    os.environ.update(COLUMNS="100", NO_COLOR="1", PYTHON_COLORS="0")
    from hf_vs2.cli import COMMANDS, main

    sections = []
    for arguments in ([], *([name] for name in COMMANDS)):
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            if main([*arguments, "--help"]) != 0:
                raise PluginError(f"hf-vs2 {' '.join(arguments)} --help failed")
        title = f"hf-vs2 {arguments[0]}" if arguments else "hf-vs2"
        sections.append(f"## {title}\n\n```text\n{shown.getvalue().rstrip()}\n```\n")
    return "\n".join(sections)
