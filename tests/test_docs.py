"""Every block of the documentation runs, as one session a page, on material that stands where the pages' Hub ids lead (see `world`)."""

import html
import importlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from browsing import axe, chromium, needs_axe, needs_browser
from datasets import ClassLabel, Features
from datasets import Image as ImageFeature
from foreign_saes import write as write_foreign
from loopback_hub import LoopbackHub
from PIL import Image
from transformers import CLIPModel, Dinov2Config, Dinov2Model

import hf_vs2
from hf_vs2 import cli
from hf_vs2.demo.data import DIGIT_NAMES, load_handwriting
from hf_vs2.methods import METHODS
from hf_vs2.training.arguments import SAETrainingArguments


pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

REPOSITORY = Path(__file__).parents[1]
DEMO_CLIP = Path(hf_vs2.__file__).parent / "demo_assets"
PAGES = [path.relative_to(REPOSITORY).as_posix() for path in sorted((REPOSITORY / "docs").rglob("*.md"))]
PAGES += ["CONTRIBUTING.md", "README.md"]
MOST_STEPS = 100
WIDEST = 88  # columns of code, on a screen of 1280 pixels
SLOW = ("docs/atlas.md", "docs/distributed.md", "docs/explain.md", "docs/guides/research.md", "docs/guides/team.md")
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?"
    r"(?P<fence>`{3,})(?P<language>\w*)(?: +title=\"(?P<title>[^\"]+)\")?[^\n]*\n(?P<text>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
# What would change this machine, or needs others: looked at, not run.
CHECKED_ONLY = ("accelerate ", "apt-get ", "bash .ci/run", "hf auth", "make ", "pip ", "torchrun ")


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int
    title: str | None
    reason: str | None
    """Why it is not run; `None`: it is."""


def blocks_of(page: str) -> list[Block]:
    content = (REPOSITORY / page).read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(content):
        language = match["language"]
        if not language and match["text"].startswith((*CHECKED_ONLY, "hf-vs2 ", "python ", "# ")):
            language = "bash"
        line = content.count("\n", 0, match.start("text"))
        found.append(Block(language, match["text"], line, match["title"], match["reason"]))
    assert content.count("```") % 2 == 0, f"{page}: a block does not end"
    return found


def commands_of(text: str) -> list[str]:
    """A shell block as single commands of ours, and what lies between them."""
    commands, between = [], []
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith(("hf-vs2 ", *CHECKED_ONLY)):
            commands += ["\n".join(between), line]
            between = []
        else:
            between.append(line)
    commands.append("\n".join(between))
    return [command for command in commands if command.strip()]


# The world in which pages are read


def twelve_layers(clip: CLIPModel) -> CLIPModel:
    """The demo's CLIP with nine more layers that add nothing, since pages speak of the layers of a ViT-B."""
    settings = clip.config.to_dict()
    settings["vision_config"]["num_hidden_layers"] = 12
    deep = CLIPModel(type(clip.config).from_dict(settings)).eval()
    deep.load_state_dict(clip.state_dict(), strict=False)
    for layer in deep.vision_model.encoder.layers[3:]:
        for part in (layer.self_attn.out_proj, layer.mlp.fc2):
            torch.nn.init.zeros_(part.weight)
            torch.nn.init.zeros_(part.bias)
    return deep


def few_steps(patch: pytest.MonkeyPatch) -> None:
    steps = SAETrainingArguments.num_steps
    patch.setattr(SAETrainingArguments, "num_steps", lambda *arguments: min(MOST_STEPS, steps(*arguments)))
    patch.setattr("hf_vs2.demo.run.NUM_FOREIGN", 30)
    patch.setattr("hf_vs2.demo.run.MAX_STEPS", MOST_STEPS)
    patch.setenv("HF_TOKEN", LoopbackHub.org)  # who writes for "lab"


def run(command: str) -> None:
    assert cli.main(shlex.split(command, comments=True)[1:]) == 0, f"failed (its message is above): {command}"


@pytest.fixture()
def methods_of_a_page():
    """Those that its blocks register go with it."""
    before = set(METHODS)
    yield
    for name in set(METHODS) - before:
        del METHODS[name]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """What pages may rely on. A folder wins over a Hub id of the same name, in transformers, datasets and here."""
    folder = tmp_path_factory.mktemp("docs") / "world"
    with pytest.MonkeyPatch.context() as patch:
        folder.mkdir()
        patch.chdir(folder)
        few_steps(patch)
        for name in ("benchmarks", "docs", "examples"):
            Path(name).symlink_to(REPOSITORY / name)

        # Models: a CLIP, and another encoder for neighbours.
        clip = twelve_layers(CLIPModel.from_pretrained(DEMO_CLIP, dtype=torch.float32))
        shutil.copytree(DEMO_CLIP, "openai/clip-vit-base-patch32", ignore=shutil.ignore_patterns("README.md"))
        clip.save_pretrained("openai/clip-vit-base-patch32")
        dino = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
        Dinov2Model(dino).save_pretrained("facebook/dinov2-base")
        shutil.copy(DEMO_CLIP / "preprocessor_config.json", "facebook/dinov2-base")

        # Images: data sets, with their own classes' names on the digits; folders with and without labels; single files.
        digits = load_handwriting()
        columns = {"uoft-cs/cifar100": ("img", "fine_label"), "timm/eurosat-rgb": ("image", "label")}
        for name, info in {one.source_id: one for one in map(hf_vs2.dataset_info, ("cifar100", "eurosat"))}.items():
            image, label = columns[name]
            features = Features({image: ImageFeature(), label: ClassLabel(names=list(info.classes)[:10])})
            renamed = digits.rename_columns({"image": image, "label": label}).cast(features)
            for split, rows in {"train": range(900), "test": range(900, 1200)}.items():
                renamed.select(rows).to_parquet(f"{name}/data/{split}-00000-of-00001.parquet")
        Path("photos").mkdir()
        Path("my_photos").symlink_to("photos")
        for number in range(1200, 1500):
            digits[number]["image"].save(f"photos/{number}.png")
        for number in range(1500, 1700):
            one = digits[number]
            (Path("checked") / DIGIT_NAMES[one["label"]]).mkdir(parents=True, exist_ok=True)
            one["image"].save(f"checked/{DIGIT_NAMES[one['label']]}/{number}.png")
        for name in ("photo.jpg", "cat.png"):
            digits[0]["image"].convert("RGB").save(name)

        # What earlier pages made.
        run("hf-vs2 demo")
        data = "--dataset uoft-cs/cifar100 --image_column img"
        clip_and_data = f"--model openai/clip-vit-base-patch32 {data}"
        run(f"hf-vs2 train {clip_and_data} --split train --output_dir outputs/sae-cifar100 --disable_tqdm")
        run(
            f"hf-vs2 extract {clip_and_data} --split test --label_column fine_label --output_dir outputs/rows-cifar100-test"
        )
        shutil.copytree("outputs/sae-cifar100", "outputs/sae")
        sae = hf_vs2.SAEModel.from_pretrained("outputs/sae")
        sae.save_sparsify("checkpoints/run/layers.11")
        sae.save_sae_lens("checkpoints/lens")
        write_foreign(Path("checkpoints/prisma"), "prisma")
        model = hf_vs2.VS2CLIPForZeroShot.from_pretrained("outputs/sae")
        hf_vs2.push_to_hub(model, "lab/vs2-clip-vit-base-patch32-cifar100")
    return folder


# What is looked at instead of run


def check(command: str) -> None:
    """A command that is not run must be one that exists, with options that exist."""
    words = shlex.split(command, comments=True)
    if words[:1] == ["hf-vs2"] or "hf_vs2.cli" in words:
        first = 1 if words[0] == "hf-vs2" else words.index("hf_vs2.cli") + 1
        name, arguments = words[first], [word for word in words[first + 1 :] if word != "..."]
        if arguments or words[-1] != "...":
            parser = cli.parser_of(f"hf-vs2 {name}", importlib.import_module(f"hf_vs2.cli.commands.{name}"))
            parser.parse(arguments)
    if words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        found = launch_command_parser().parse_args(words[2:])
        assert Path(found.config_file).is_file(), f"no such file: {found.config_file}"
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets, f"the Makefile has no target {words[1]}"
    if words[0] == "pip":
        extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for extra in re.findall(r"\.\[(\w+)\]", command):
            assert extra in extras["optional-dependencies"], f"there is no extra {extra!r}"
    for word in words:
        if word.startswith(("benchmarks/", "tests/", "docs/", "scripts/", "examples/")) and "*" not in word:
            assert (REPOSITORY / word).exists(), f"there is no {word}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_name_what_exists(page, tmp_path, monkeypatch):
    """A command that can't be run here, on eight GPUs say, would be copied with an option or a file that is gone."""
    monkeypatch.chdir(tmp_path)
    for path in REPOSITORY.iterdir():
        (tmp_path / path.name).symlink_to(path)
    for block in blocks_of(page):
        where = f"{page}:{block.line}"
        known = ("", "text", "python", "bash", "yaml", "toml", "bibtex", "math")
        assert block.language in known, f"{where}: {block.language}"
        assert block.language == "math" or max(map(len, block.text.splitlines())) <= WIDEST, (
            f"{where}: cut on the site"
        )
        if block.title is not None:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            compile(block.text, where, "exec")
        elif block.language == "bash":
            for command in commands_of(block.text):
                for line in command.splitlines() if block.reason else [command]:
                    if line.startswith(("hf-vs2 ", *CHECKED_ONLY)) or (block.reason and not line.startswith("#")):
                        check(line)


def runnable(page):
    return any(block.language in ("python", "bash") and not block.reason for block in blocks_of(page))


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page in SLOW else ()) for page in PAGES if runnable(page)],
)
def test_blocks_of_a_page_run_in_order(page, world, tmp_path, monkeypatch, methods_of_a_page):
    """Who copies a page's blocks from top to bottom must not meet an error."""
    blocks = [block for block in blocks_of(page) if not block.reason]
    shutil.copytree(world, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    few_steps(monkeypatch)
    names = {"__name__": "__main__"}
    for block in blocks:
        if block.title is not None:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            # With the line numbers of the page.
            exec(compile("\n" * block.line + block.text, page, "exec"), names)
        elif block.language == "bash":
            for command in commands_of(block.text):
                if command.startswith("hf-vs2 "):
                    run(command)
                elif not command.startswith(CHECKED_ONLY):
                    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
                    subprocess.run(["bash", "-euc", f"export PATH={path}\n{command}"], check=True)


# The site


def test_reference_shows_every_public_name():
    """A name that `import hf_vs2` gives and the reference does not have can't be looked up."""
    page = (REPOSITORY / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^::: hf_vs2\.(\w+)$", page, re.MULTILINE))
    assert set(hf_vs2.__all__) <= shown, "missing in docs/reference/api.md"


def test_docstrings_become_lists_and_links(monkeypatch):
    """Arguments that run together in one paragraph, or in a block of code, can't be read."""
    pytest.importorskip("griffe")
    monkeypatch.syspath_prepend(str(REPOSITORY / "docs"))
    to_markdown = importlib.import_module("griffe_docstrings").to_markdown
    docstring = """
    What it does, see [`SAEModel`] and [`nobody_knows`].

        x = 1

    Args:
        rows (`torch.Tensor` of shape `(n, d)`):
            The rows.
        gamma (`float`), edits ([`LatentEdits`] or
            `dict`, *optional*): see [`Steering`].
        kwargs: more.

    Raises:
        `ValueError`: on nonsense. `OSError`: on none.
    """
    lines = [line for line in to_markdown(docstring).splitlines() if line]
    assert lines == [
        "What it does, see [`SAEModel`][hf_vs2.SAEModel] and `nobody_knows`.",
        "```text",
        "x = 1",
        "```",
        "**Args**",
        "- `rows` (`torch.Tensor` of shape `(n, d)`):",
        "    The rows.",
        "- `gamma` (`float`), `edits` ([`LatentEdits`][hf_vs2.LatentEdits] or `dict`, *optional*): see "
        "[`Steering`][hf_vs2.Steering].",
        "- `kwargs`: more.",
        "**Raises**",
        "- `ValueError`: on nonsense. `OSError`: on none.",
    ]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built with warnings as errors: such as a broken link or name."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    return folder


def test_site_builds_and_asks_no_other_server(site):
    """A font or script from elsewhere tells a stranger who reads what."""
    pages = {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    for name, page in pages.items():
        tags = re.findall(r"<(?:script|link|img|iframe|source|video)\b[^>]*>", page)
        loaded = [tag for tag in tags if re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag)]
        assert not loaded, f"{name} loads {loaded[0]}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet
    assert all(f"hf-vs2 {name}" in pages["reference/cli.html"] for name in cli.COMMANDS)
    assert 'id="hf_vs2.SAEModel"' in pages["reference/python/SAEModel.html"]
    signature = re.search(r"<pre[^>]*>.*?</pre>", pages["reference/python/evaluate.html"], re.DOTALL)[0]
    assert max(map(len, re.sub(r"<[^>]+>", "", html.unescape(signature)).splitlines())) <= WIDEST, "not wrapped"
    assert "<mfrac>" in pages["how.html"] and "\\frac" not in pages["how.html"], "formulas are not typeset"


@pytest.mark.slow
@needs_browser
def test_the_site_is_searched_from_disk(site):
    """Most readers open the pages that `make docs` wrote from disk, where browsers refuse the search its worker."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto((site / "index.html").as_uri())
        page.keyboard.press("/")
        page.keyboard.type("tau")
        page.locator(".md-search-result__item", has_text="Glossary").first.wait_for(timeout=30_000)
        for name in ("index", "recommend", "datasets", "reference/python/evaluate"):
            page.set_viewport_size({"width": 390, "height": 844})
            page.goto((site / f"{name}.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, f"{name} scrolls sideways on a phone"


@pytest.mark.slow
@needs_axe
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_axe_finds_nothing_on_the_site(site, scheme, width):
    """Formulas and tables are reached by keys, code has contrast, and the theme's boxes have names."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        for name in (
            "index",
            "how",
            "reference/cli",
            "reference/python/evaluate",
            "project/examples/results/vit-tiny-lit/table",
        ):
            page.goto((site / f"{name}.html").as_uri())
            page.wait_for_timeout(500)  # what the theme's script adds
            assert not axe(page), name


def test_pictures_of_the_pages_are_there_and_not_empty():
    """A page with a missing or blank picture explains nothing."""
    for page in PAGES:
        folder = (REPOSITORY / page).parent
        for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", (REPOSITORY / page).read_text(encoding="utf-8")):
            if target.endswith(".svg"):
                assert ElementTree.parse(folder / target).find("{http://www.w3.org/2000/svg}title").text
                continue
            pixels = np.asarray(Image.open(folder / target).convert("L"))
            assert min(pixels.shape) > 200 and pixels.std() > 5, f"{page}: {target}"
