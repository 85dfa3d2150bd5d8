"""How to install hf_vs2 is said in one way, and it is true: the package is not on PyPI."""

import re
import tomllib
from pathlib import Path

from repository import REPOSITORY, tracked_files

from hf_vs2.version import INSTALLATION


PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# `pip install hf_vs2`, with options and quotes, and the package as a requirement; not `.[demo]`.
FROM_PYPI = re.compile(r"pip install [^\n`]*hf_vs2|^\W*hf_vs2\[", re.MULTILINE)
EXTRA = re.compile(r"""\.\[(\w+)\]["'`]|`(\w+)` extra""")


def texts() -> dict[str, str]:
    found = {}
    for path in tracked_files():
        try:
            found[path.relative_to(REPOSITORY).as_posix()] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and pictures
    return found


def test_nobody_is_sent_to_pypi() -> None:
    """The line fails today, and tomorrow it may install a stranger's package."""
    assert "not on PyPI" in INSTALLATION, "it has been published: this test can go"
    said = {name: match[0] for name, text in texts().items() for match in FROM_PYPI.finditer(text)}
    # What the constant is to become; extras that name other extras; this file.
    assert set(said) <= {"src/hf_vs2/version.py", "pyproject.toml", Path(__file__).relative_to(REPOSITORY).as_posix()}


def test_extras_that_are_named_exist() -> None:
    """pip warns of an extra that is not there, and installs without what was missing."""
    named = {(name, one or other) for name, text in texts().items() for one, other in EXTRA.findall(text)}
    assert named
    unknown = {place for place in named if place[1] not in PROJECT["optional-dependencies"]}
    assert not unknown


def test_the_space_asks_for_what_the_package_asks_for() -> None:
    """The Space holds a copy of the package's folder: a dependency that its list lacks is missing when the page starts."""
    extras = PROJECT["optional-dependencies"]
    needed = [*PROJECT["dependencies"], *(name for extra in ("space", "demo", "report") for name in extras[extra])]
    lines = (REPOSITORY / "examples" / "space" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == sorted(
        name for name in needed if not name.startswith("hf_vs2[")
    )
