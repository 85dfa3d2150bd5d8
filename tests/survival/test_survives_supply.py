"""What goes out: packages that anyone can build again, and nothing that carries a token."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import traceback
import venv
import zipfile
from pathlib import Path

import pytest
from hub_models import CLIP_ID, make_vs2, upload_clip
from huggingface_hub.errors import HfHubHTTPError
from loopback_hub import USERS

import hf_vs2
from hf_vs2.cli import main


REPOSITORY = Path(__file__).parents[2]
SECRET = "hf_SECRETofATest"
BUILD = "import sys; from hatchling import build; build.build_wheel(sys.argv[1]), build.build_sdist(sys.argv[1])"


@pytest.fixture()
def secret(monkeypatch):
    monkeypatch.setitem(USERS, SECRET, ("ada", "write", ()))
    monkeypatch.delenv("HF_TOKEN")
    return SECRET


def files_with(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_token_is_written_nowhere(hub, secret, tmp_path, capfd, caplog):
    """A token in a card or config is everybody's; in a log it is that of whoever reads the log. Pushed, loaded with it, saved again."""
    caplog.set_level("DEBUG")
    make_vs2(upload_clip_as(secret)).save_pretrained(tmp_path / "model")
    push = ["push", str(tmp_path / "model"), "ada/secret", "--private", "--token", secret, "--debug"]
    assert main(push) == 0
    classifier = hf_vs2.zero_shot_classifier("ada/secret", token=secret, cache_dir=tmp_path / "cache")
    classifier.save_pretrained(tmp_path / "again")
    hub.fail("POST .*/commit/main", status=403)
    assert main([*push[:2], "ada/refused", *push[3:]]) == 2
    for bad in (secret + "\n", secret + " x"):
        assert main([*push, "--token", bad]) == 2
    out, err = capfd.readouterr()
    assert secret not in out + err + caplog.text
    assert "hf auth login" in err and "holds a space, a line break" in err
    assert not files_with(secret, tmp_path)
    files = hub["ada/secret"].head.files.values()
    assert not [file for file in files if secret.encode() in file.content]


def upload_clip_as(token):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", token)
        return upload_clip(CLIP_ID)


def test_error_of_a_push_does_not_show_the_token(hub, secret, tiny_clip):
    """Tracebacks are what people paste into issues."""
    hub.fail("POST .*/commit/main", status=401)
    try:
        make_vs2(upload_clip_as(secret)).push_to_hub("ada/refused", token=secret)
    except HfHubHTTPError:
        assert secret not in traceback.format_exc()
    else:
        pytest.fail("the push was not refused")


@pytest.mark.parametrize("bad", ["{}\n", "{} x", "{}\u00e9"])
@pytest.mark.parametrize(
    "load",
    [
        hf_vs2.SAEModel.from_pretrained,
        hf_vs2.VS2CLIPForZeroShot.from_pretrained,
        hf_vs2.RetrievalCorpus.from_pretrained,
        hf_vs2.zero_shot_classifier,
    ],
)
def test_error_of_a_load_does_not_show_the_token(hub, secret, load, bad):
    """A token read from a file with its line break: the HTTP library would print it, and so would every error built on that one."""
    with pytest.raises(ValueError, match="holds a space, a line break") as caught:
        load("ada/anything", token=bad.format(secret))
    assert secret not in "".join(traceback.format_exception(caught.value))


def test_dependencies_have_ranges():
    """Without a lower bound pip keeps releases that we never ran on; the libraries that we build on change with each major one."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = dict(re.match(r"([\w.-]+)(.*)", one).groups() for one in project["dependencies"])
    assert not [name for name, bound in bounds.items() if ">=" not in bound]
    ours = ("transformers", "huggingface_hub", "datasets", "accelerate", "torch", "safetensors")
    assert not [name for name in ours if "<" not in bounds[name]]


def build(checkout: Path, into: Path) -> Path:
    shutil.copytree(
        REPOSITORY / "src", checkout / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, checkout)
    for path in checkout.rglob("*"):
        os.utime(path, (10**9, 10**9 + len(str(checkout))))
    command = [sys.executable, "-c", BUILD, str(into)]
    built = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return next(into.glob("*.whl"))


def test_distributions_are_the_same_wherever_they_are_built(tmp_path):
    """Who doubts a published wheel or source distribution builds it again and compares the bytes. The wheel has every file
    that the package reads: an editable install finds them in the checkout all the same."""
    one, other = build(tmp_path / "here", tmp_path / "1"), build(tmp_path / "elsewhere", tmp_path / "2")
    assert one.read_bytes() == other.read_bytes()
    packed = {name for name in zipfile.ZipFile(one).namelist() if name.startswith("hf_vs2/")}
    source = tmp_path / "here" / "src"
    assert packed == {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    (one,), (other,) = one.parent.glob("*.tar.gz"), other.parent.glob("*.tar.gz")
    assert one.read_bytes() == other.read_bytes()


def test_what_is_said_to_be_survived_has_tests():
    """A table of harms whose test was renamed or removed is a claim like any other."""
    said = set(re.findall(r"`(test_\w+)`", (REPOSITORY / "docs" / "survival.md").read_text(encoding="utf-8")))
    code = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "tests").rglob("test_*.py"))
    assert len(said) > 25 and not {name for name in said if f"def {name}(" not in code}


@pytest.mark.slow
def test_wheel_in_a_fresh_environment_runs_the_demo(tmp_path):
    """What users install is the wheel, not this checkout."""
    wheel = build(tmp_path / "checkout", tmp_path)
    venv.create(tmp_path / "venv", with_pip=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")  # lib64 is a link to it
    python = tmp_path / "venv" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    subprocess.run(install, check=True, cwd=tmp_path)
    import torch

    # The libraries of this environment, without its .pth files: they lead to the checkout.
    (site / "libraries.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n", encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    environment.pop("PYTHONPATH", None)
    where = [str(python), "-c", "import hf_vs2; print(hf_vs2.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(site))
    demo = [str(python.with_name("hf-vs2")), "demo", "--output_dir", str(tmp_path / "demo")]
    ran = subprocess.run(demo, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=550)
    assert ran.returncode == 0, ran.stderr
    assert list((tmp_path / "demo").rglob("*.safetensors"))
