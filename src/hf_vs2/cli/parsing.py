"""What the parsers of all commands share: errors of one line, readable help, flags from dataclasses, YAML
configuration."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import shutil
import textwrap
import types
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from ..config.schema import Kind, many, shown
from ..files.yaml_files import read_yaml


METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class UsageError(ValueError):
    """A command line that cannot be understood."""


class Parser(argparse.ArgumentParser):
    """
    An argument parser whose errors are [`UsageError`]s, and whose flags can also come from a YAML file (`--config`).

    Flags are never abbreviated, and `--learning-rate` means `--learning_rate`. The help fits the terminal: prose is
    wrapped, and indented lines, which are commands, are continued after a backslash.
    """

    def __init__(self, prog: str, usage: str, description: str, epilog: str = ""):
        super().__init__(
            prog,
            textwrap.fill(f"{prog} {usage}", _width() - len("usage: "), subsequent_indent=" " * 7),
            _laid_out(description),
            _laid_out(epilog),
            formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=_width()),
            add_help=False,
            allow_abbrev=False,
        )
        # What looks like a number is the value of a flag; before Python 3.14 argparse takes -1e-1 and -inf for flags.
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)
        self.flags: dict[str, argparse.Action] = {}
        self.writes: dict[str, tuple[str, str]] = {}
        """By the name of the value: the flag, and whether it is the place of a file or a folder that the command
        writes."""
        self.kinds: dict[str, tuple[str, Kind]] = {}
        """By the name of the value: the flag, and what its value can be."""
        self.alternatives: list[set[str]] = []
        """Sets of flags of which one at most may be given: one on the command line drops the others from the file."""
        self._section: Any = self

    def section(self, title: str) -> None:
        """Begin a group of flags in the help."""
        self._section = self.add_argument_group(title)

    def flag(
        self,
        *names: str,
        help: str,
        default: Any = None,
        kind: Kind | None = None,
        writes: Literal["file", "folder"] | None = None,
        **options: Any,
    ) -> None:
        """`add_argument` in the current section; the help says what the default is.

        Args:
            kind: what the value can be. writes: what the command writes there.
        """
        if kind is not None or writes is not None:
            options.setdefault("type", Path if kind is None else kind.of_text)
        if "action" not in options:
            options["default"] = default
            if "choices" not in options:
                options.setdefault("metavar", METAVARS.get(options.get("type", str), "VALUE"))
            if default is not None and not options.get("required"):
                shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
                help = f"{help} [{shown}]"
        action = self._section.add_argument(*names, help=help.replace("%", "%%"), **options)
        self.flags |= dict.fromkeys(action.option_strings, action)
        if writes is not None:
            self.writes[action.dest] = (names[0], writes)
        if kind is not None:
            self.kinds[action.dest] = (names[0], many(kind) if "nargs" in options else kind)

    def common_flags(self) -> None:
        """What every command has."""
        self.section("general")
        self.flag("--debug", action="store_true", help="Show the Python traceback of an error.")
        self.flag("-h", "--help", action="help", help="Show this help.")

    def dataclass_flags(self, cls: type, names: Iterable[str], defaults: bool = True) -> None:
        """One flag a field of a dataclass, with the help in its metadata; `defaults`: with the field's default too."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        hints = get_type_hints(cls)
        for name in names:
            field, hint = fields[name], _without_none(hints[name])
            text, kind = field.metadata.get("help", ""), field.metadata.get("kind")
            flags = dict.fromkeys((f"--{name}", f"--{name.rstrip('_')}"))  # `lambda_` is a word of Python's otherwise
            if hint is bool:
                self.flag(*flags, action="store_true", help=text)
            else:
                required = field.default is dataclasses.MISSING
                default = field.default if defaults and not required else None
                self.flag(*flags, type=hint, required=required, default=default, help=text, kind=kind)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The values of all flags; those of the file that `--config` names come first, so that the command line wins.
        A [`UsageError`] says in one line what to do."""
        argv = [_spelled(token) for token in argv]
        if "--config" in self.flags:
            argv = [*self._from_config(argv), *argv]
        args, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].partition("=")[0]
            raise UsageError(f"unknown argument {name}{nearest(name, self.flags)}; see {self.prog} --help")
        for name, (flag, kind) in self.kinds.items():
            if getattr(args, name) is not None:
                try:
                    kind.read(getattr(args, name), flag)
                except ValueError as error:
                    raise UsageError(f"{error} See {self.prog} --help") from error
        return args

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

    def _from_config(self, argv: Sequence[str]) -> list[str]:
        """The keys of the YAML file as command-line arguments."""
        finder = Parser(self.prog, "", "")
        finder.flag("--config", type=Path, help="")
        path = finder.parse_known_args(argv)[0].config
        if path is None:
            return []
        given = {token.partition("=")[0] for token in argv}
        outdone = {name for names in self.alternatives if names & given for name in names}
        arguments = []
        for key, value in _read_yaml(path).items():
            name = _spelled(f"--{key}")
            if name not in self.flags or name in ("--config", "--help"):
                known = [flag.removeprefix("--") for flag in self.flags if flag.startswith("--")]
                raise UsageError(f"{path}: unknown key {key!r}{nearest(str(key), known)}")
            if name not in outdone:
                arguments += _as_arguments(self.flags[name], name, value, f"{path}: {key}")
        return arguments


def _width() -> int:
    """Of the help: lines that can be read on a wide terminal."""
    return min(shutil.get_terminal_size().columns, 100) - 2


def _laid_out(text: str) -> str:
    """Paragraphs and indented lines wrapped to the terminal."""
    lines: list[str] = []
    for paragraph in text.replace("\\\n", " ").split("\n\n"):
        prose: list[str] = []
        for line in [*paragraph.splitlines(), "  "]:
            if not line.startswith("  "):
                prose.append(line)
                continue
            lines += textwrap.wrap(" ".join(prose), _width(), break_on_hyphens=False)
            lines += _command_lines(line)
            prose = []
        lines.append("")
    return "\n".join(lines).rstrip()


def _command_lines(line: str) -> list[str]:
    """A command, or another indented line, on as many lines as it takes, broken before its flags."""
    lines: list[str] = []
    for piece in re.split(r"\s+(?=--|-m )", line.rstrip()):
        if lines and len(lines[-1]) + len(piece) + len("  \\") <= _width():
            lines[-1] += f" {piece}"
        elif piece:
            lines.append(f"      {piece}" if lines else piece)
    return [f"{part} \\" for part in lines[:-1]] + lines[-1:]


def nearest(name: str, known: Collection[str]) -> str:
    """`; did you mean ...?` for a name that resembles a known one, else nothing."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def dataclass_from(cls: type, args: argparse.Namespace) -> Any:
    """The dataclass whose fields are flags, from their values; it checks them itself."""
    return cls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cls)})


def _spelled(token: str) -> str:
    """A flag as it is declared, with underscores; anything else as it is."""
    if not token.startswith("--"):
        return token
    name, equals, value = token[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _without_none(kind: Any) -> Any:
    """`X` of `X | None`."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(part for part in get_args(kind) if part is not type(None))
    return kind


def _read_yaml(path: Path) -> dict[str, Any]:
    # Every scalar stays text, as on the command line: YAML would read `no` as False.
    content = read_yaml(path, path, as_text=True)
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold one `flag: value` a line, without the dashes (top_k: 64)")
    return content


def _as_arguments(action: argparse.Action, name: str, value: Any, where: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in values):
        raise UsageError(f"{where}: expected a value, not {shown(value)}")
    if value in ("", "~", "null"):
        return []
    if action.nargs == 0:  # a switch
        if str(value).lower() not in BOOLEANS:
            raise UsageError(f"{where}: expected true or false, not {value!r}")
        return [name] if BOOLEANS[str(value).lower()] else []
    for item in values:
        try:
            action.type(item) if callable(action.type) else item
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise UsageError(f"{where}: {item!r} is not a value that {name} can have") from error
    if action.nargs is not None:
        return [name, *values]
    if isinstance(value, list):
        raise UsageError(f"{where}: expected one value, not a list")
    return [f"{name}={value}"]
