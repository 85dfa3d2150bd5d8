"""What someone who installs hf_vs2 meets before any model runs: the import, the names, the wheel, the make commands."""

import ast
import graphlib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import REPOSITORY, tracked_files

import hf_vs2
import hf_vs2.cli
import hf_vs2.moved


SOURCE = REPOSITORY / "src" / "hf_vs2"

# A folder imports only from itself and from folders above it in this list. Everybody reads `version`; the rest of the root
# (`__init__`, which gives all public names) stands above none.
FOLDERS = [
    "functional",
    "methods",
    "config",
    "files",
    "encoders",
    "sae",
    "data",
    "steering",
    "explain",
    "clip",
    "training",
    "evaluation",
    "atlas",
]
FOLDERS += ["adaptation", "study", "demo", "cli"]
# Folders that exist on one machine only. Spelled so that this file does not hold one itself.
MACHINE_PATH = re.compile(r"(?<![\w.~$}-])/(?:work|root|(?:home|Users)/[\w.-]+|tmp/\w+)(?:/|\b)")

IMPORT_PROBE = """
import sys
from transformers import AutoModelForZeroShotImageClassification, CLIPModel

def refuse_network(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise RuntimeError(f"import hf_vs2 uses the network: {event} {arguments[1:]}")

before = set(sys.modules)
sys.addaudithook(refuse_network)
import hf_vs2
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""

REGISTRATION_PROBE = """
def check_registration():
    from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification
    from transformers.pipelines import PIPELINE_REGISTRY

    sae = AutoModel.from_config(AutoConfig.for_model("vs2_sae", hidden_size=8, top_k=2))
    assert type(sae).__name__ == "SAEModel"
    steered = type(AutoConfig.for_model("vs2_clip"))
    for auto in (AutoModel, AutoModelForZeroShotImageClassification):
        assert auto._model_mapping[steered].__name__ == "VS2CLIPForZeroShot"
    task = PIPELINE_REGISTRY.check_task("vs2-zero-shot-image-classification")[1]
    assert task["impl"].__name__ == "VS2ZeroShotImageClassificationPipeline"
"""

# Saved as `hf-vs2`, so that hf_vs2 takes its process for the command line's.
COMMAND_LINE_PROBE = f"""
import multiprocessing, sys
import hf_vs2
{REGISTRATION_PROBE}
if __name__ == "__main__":
    assert "transformers" not in sys.modules, "the registration was not put off"
    child = multiprocessing.get_context("spawn").Process(target=check_registration)
    child.start()
    hf_vs2.SAEConfig
    check_registration()
    child.join()
    assert child.exitcode == 0, "not registered in a spawned process"
"""


def imported_names(path: Path) -> Iterator[str]:
    """Absolute dotted names of everything a file imports, wherever in the file it does so."""
    package = ["hf_vs2", *path.relative_to(SOURCE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            yield from (".".join([*base, alias.name]) for alias in node.names)


def test_import_is_cheap_and_offline() -> None:
    """`import hf_vs2` must not pay for datasets, training or plotting, nor open a connection: transformers' CLIP, no more. After
    it the Auto classes and `pipeline`, imported before, know our checkpoints."""
    code = f"{IMPORT_PROBE}{REGISTRATION_PROBE}check_registration()"
    probe = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert probe.returncode == 0, probe.stderr
    added = set(probe.stdout.split()) - set(sys.stdlib_module_names)
    assert added <= {"hf_vs2", "transformers"}


def test_registration_that_was_put_off_is_made_up_for(tmp_path: Path) -> None:
    """In a process of the command line, workers that load a checkpoint, and code that uses a public name, find it registered."""
    program = tmp_path / "hf-vs2"
    program.write_text(COMMAND_LINE_PROBE, encoding="utf-8")
    result = subprocess.run([sys.executable, str(program), "train"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("started", "argv", "expected"),
    [
        # what Python was started with, sys.argv when hf_vs2 is imported
        ("python /venv/bin/hf-vs2 --help", "/venv/bin/hf-vs2 --help", True),
        ("python bin/hf-vs2.exe", "bin/hf-vs2.exe", True),
        ("python -m hf_vs2.cli train --top_k 8", "-m train --top_k 8", True),
        ("python -u -Im hf_vs2.cli", "-m", True),
        ("python -m hf_vs2.trainer", "-m", False),
        ("python -m pytest -m hf_vs2.cli", "-m -m hf_vs2.cli", False),
        ("python -m pdb -m hf_vs2.cli", "hf_vs2.cli", False),
        ("python -c code --multiprocessing-fork", "/venv/bin/hf-vs2 train", False),
        ("python -c code --multiprocessing-fork", "/venv/bin/hf-vs2 train --top_k 8 --seed 1", False),
        ("python steer.py hf-vs2", "steer.py hf-vs2", False),
        ("python my_hf-vs2", "my_hf-vs2", False),
        ("python", "", False),
        ("jupyter", "hf-vs2", False),
        ("", "", False),
    ],
)
def test_only_the_command_line_puts_registration_off(
    started: str, argv: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script, notebook, debugger or worker that is taken for `hf-vs2` could not load checkpoints through the Auto classes."""
    monkeypatch.setattr(sys, "orig_argv", started.split())
    monkeypatch.setattr(sys, "argv", argv.split())
    assert hf_vs2._is_command_line() is expected


def test_every_public_name_resolves() -> None:
    """A name that `__all__` and the documentation promise, but the lazy import cannot find, fails only in users' hands."""
    assert len(hf_vs2.__all__) == len(set(hf_vs2.__all__)), "a name is listed twice"
    missing = [name for name in hf_vs2.__all__ if getattr(hf_vs2, name, None) is None]
    assert not missing
    names: dict[str, object] = {}
    exec("from hf_vs2 import *", names)
    assert set(hf_vs2.__all__) <= set(names)
    assert set(hf_vs2.__all__) <= set(dir(hf_vs2)), "dir() and so completion must show every public name"


def test_unknown_name_is_an_attribute_error() -> None:
    """`hasattr`, `pickle` and IDEs rely on AttributeError from a lazy package."""
    assert not hasattr(hf_vs2, "no_such_name")


def test_version_is_that_of_the_installed_package() -> None:
    """Checkpoints record the version; it must be the one that pip shows (after a change: touch pyproject.toml, make test)."""
    assert importlib.metadata.version("hf_vs2") == hf_vs2.__version__


def test_imports_point_downwards() -> None:
    """An import of a folder below makes cycles, and makes the maths drag in the trainer."""
    up = set()
    for path in sorted(SOURCE.rglob("*.py")):
        folder, *rest = path.relative_to(SOURCE).with_suffix("").parts
        if not rest:
            continue  # the root gives names of all folders
        for name in imported_names(path):
            package, _, target = name.partition(".")
            target = target.partition(".")[0]
            if package != "hf_vs2" or target == "version":
                continue
            assert target in FOLDERS, f"{path.relative_to(SOURCE)} imports {name}: the package's root is for users"
            if FOLDERS.index(target) > FOLDERS.index(folder):
                up.add(f"{'.'.join([folder, *rest])} -> {target}")
    assert not up


def test_no_circle_of_modules() -> None:
    """Two files that need each other can only be read, tested and moved together. Imports inside functions count."""
    paths = (path for path in SOURCE.rglob("*.py") if path.name != "__init__.py")
    modules = {".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path for path in paths}
    known = set(modules)
    needs = {}
    for name in known:
        imported = set(imported_names(modules[name]))
        imported |= {of.rpartition(".")[0] for of in imported}
        needs[name] = (known & imported) - {name}
    list(graphlib.TopologicalSorter(needs).static_order())


def test_no_test_file_imports_another() -> None:
    """Whoever moves or runs one must not have to know of the others; builders stand in modules of their own."""
    tests = Path(__file__).parent.rglob("*.py")
    found = [
        path.name for path in tests if re.search(r"^\s*(from|import) test_", path.read_text("utf-8"), re.MULTILINE)
    ]
    assert not found


@pytest.mark.parametrize("folder", ["benchmarks", "scripts", "examples"])
def test_what_programs_import_is_there(folder: str) -> None:
    """A benchmark or script dies at its first line where a module that it reads has moved."""
    programs = sorted((REPOSITORY / folder).rglob("*.py"))
    assert programs
    for path in programs:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_vs2" and not node.level:
                module = importlib.import_module(node.module or "")
                for name in node.names:
                    there = hasattr(module, name.name) or importlib.util.find_spec(f"{node.module}.{name.name}")
                    assert there, f"{path.name}: {node.module} has no {name.name}"


def test_maths_needs_torch_only() -> None:
    """The equations can be read, copied and tested without the Hugging Face libraries; faiss is optional."""
    allowed = {"torch", "triton", "faiss", "hf_vs2", *sys.stdlib_module_names}
    for path in (SOURCE / "functional").glob("*.py"):
        used = {name.partition(".")[0] for name in imported_names(path)}
        assert used <= allowed, f"{path.name} imports {sorted(used - allowed)}"


@pytest.mark.parametrize("old", sorted(hf_vs2.moved.MOVED))
def test_a_module_is_the_same_under_its_old_path(old: str) -> None:
    """Code written for an earlier version imports from there; what it sets there must act here."""
    module = importlib.import_module(f"hf_vs2.{old}")
    assert module is importlib.import_module(f"hf_vs2.{hf_vs2.moved.MOVED[old]}")
    assert module.__name__ == module.__spec__.name == f"hf_vs2.{hf_vs2.moved.MOVED[old]}"


def test_no_path_of_one_machine_is_written_down() -> None:
    """A path of the author's machine in a script, a config or a notebook works for nobody else."""
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and pictures
        for number, line in enumerate(text.splitlines(), start=1):
            if MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()[:120]}")
    assert not found, "\n".join(found)


@pytest.mark.skipif(shutil.which("sh") is None, reason="the make commands need a POSIX shell")
class TestInstallScript:
    """`make demo` and `make test` on a machine where they cannot run must say what is missing."""

    def install(self, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        command = ["sh", str(REPOSITORY / "scripts" / "install.sh"), str(tmp_path / "venv"), "test", "constraints.txt"]
        return subprocess.run(
            command, cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True
        )

    def test_old_python_is_named(self, tmp_path: Path) -> None:
        """Someone whose only Python is 3.9 must read that, not a traceback of pip."""
        for name in ("python3", "python3.14", "python3.13", "python3.12", "python3.11", "python"):
            old = tmp_path / name
            old.write_text('#!/bin/sh\ncase "$2" in *version_info*) exit 1 ;; esac\necho 3.9.18\n')
            old.chmod(0o755)
        result = self.install(tmp_path, PYTHON="", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        assert result.returncode == 1
        assert "Python 3.11 or newer is needed" in result.stderr
        assert "python3 is 3.9.18" in result.stderr
        assert not (tmp_path / "venv").exists()

    def test_missing_python_is_named(self, tmp_path: Path) -> None:
        """A misspelt PYTHON=... must be shown back."""
        result = self.install(tmp_path, PYTHON="no-such-python")
        assert result.returncode == 1
        assert "Looked for: no-such-python. Found: none of them." in result.stderr

    def test_foreign_environment_is_left_alone(self, tmp_path: Path) -> None:
        """A `.venv` that a user made, with a torch of their own, must not get our pinned one."""
        (tmp_path / "venv" / "bin").mkdir(parents=True)
        result = self.install(tmp_path)
        assert result.returncode == 1
        assert "was not made by this Makefile" in result.stderr
        assert list((tmp_path / "venv").rglob("*")) == [tmp_path / "venv" / "bin"]
