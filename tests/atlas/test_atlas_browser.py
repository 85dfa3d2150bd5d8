"""The atlas in a real browser: what a reader sees, clicks and types. Needs Chromium and the Python package playwright."""

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from browsing import axe, chromium, needs_axe, needs_browser
from conftest import make_tiny_clip
from PIL import Image
from words import make_word_tokenizer

from hf_vs2 import SAEConfig, SAEModel, VS2CLIPForZeroShot, build_atlas, evaluate


pytestmark = needs_browser

HOSTILE = "<script>window.hacked=1</script>"
CLASSES = [HOSTILE, 'x" onerror="window.hacked=1', "<img src=x onerror=window.hacked=1>", "bird & fish", "tree", "dog"]
NUM_LATENTS, NUM_IMAGES = 3000, 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An atlas of 3,000 latents on 400 images, with every part, of classes whose names are attacks."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    encoded = []
    for number in range(NUM_IMAGES):
        shape = ((32, 32, 3), (90, 30, 3), (24, 100, 3))[number % 3]
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": HOSTILE})
    dataset = datasets.Dataset.from_dict({"image": encoded}, features=datasets.Features({"image": datasets.Image()}))
    rows = 1.5 + torch.randn(NUM_IMAGES, 32)
    sae = SAEModel(SAEConfig(hidden_size=32, num_latents=NUM_LATENTS, top_k=12)).eval()
    with torch.no_grad():
        sae.set_statistics(rows.mean(0), 32.0)
        sae.b_enc[:4] = -100  # silent ones
    model = VS2CLIPForZeroShot(make_tiny_clip(), sae, gamma=3.0, lambda_=2.0).eval()
    root = tmp_path_factory.mktemp("browser")
    (root / "log.json").write_text('{"metrics": {}, "log": [{"step": 1, "fvu": 1.0}, {"step": 9, "fvu": 0.2}]}')
    labels = torch.randint(0, len(CLASSES), (NUM_IMAGES,))
    results = evaluate(model, rows, labels, CLASSES, make_word_tokenizer(), num_resamples=10)
    options = {"labels": labels, "class_names": CLASSES, "training_log": root / "log.json", "results": results}
    meta = {"dataset": HOSTILE, "checkpoint": HOSTILE}
    return build_atlas(
        model, make_word_tokenizer(), rows, dataset, root / "atlas", meta=meta, top_images=6, **options
    ).parent


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with chromium() as opened:
        yield opened


class Reader:
    """One tab on the atlas, which fails the test at the first complaint of the console or request that leaves the disk."""

    def __init__(self, browser, folder: Path, width: int = 1200, scheme: str = "light"):
        self.context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.url = (folder / "index.html").as_uri()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("requestfailed", self._failed)
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def open(self, address: str = "", view: str = "overview"):
        self.page.goto(self.url + address)
        self.page.wait_for_selector(f"#{view}:not([hidden]) h1")
        return self.page

    def _failed(self, request) -> None:
        if request.failure != "net::ERR_ABORTED":  # an image on its way when one goes to another page
            self.complaints.append(f"{request.failure}: {request.url}")

    def check(self) -> None:
        assert not self.complaints
        assert all(url.startswith(("file:", "data:")) for url in self.requests), self.requests
        assert self.page.evaluate("window.hacked") is None

    @property
    def images(self) -> int:
        return len({url for url in self.requests if url.endswith(".jpg")})


@pytest.fixture()
def reader(browser, folder) -> Iterator[Reader]:
    one = Reader(browser, folder)
    yield one
    one.check()
    one.context.close()


def until(page, expression: str) -> None:
    """Waits for a JavaScript expression; playwright's own way evaluates text in the page, which the page's policy forbids."""
    for _ in range(200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"this never came true: {expression}")


def shown(page) -> list[int]:
    """Numbers of the latents on the cards of the list, in order."""
    return [int(card.get_attribute("data-latent")) for card in page.query_selector_all("#latents .card")]


def test_overview_has_every_part_and_the_list_is_lazy(reader):
    """3,000 latents must not mean 3,000 cards and 12,000 images before anybody has scrolled."""
    page = reader.open()
    titles = page.locator("#overview h2").all_inner_texts()
    for title in (
        "An image of your own",
        "Map of the latents",
        "Training",
        "Methods compared",
        "Gamma and lambda",
        "Gain by class",
        "Fixed by steering",
    ):
        assert title in titles
    assert page.locator("#overview .dots circle").count() > 1000
    assert page.locator("#overview svg[role=img]").evaluate_all(
        "all => all.every(one => one.getAttribute('aria-label'))"
    )
    page.wait_for_timeout(200)
    sources = page.locator("#overview img").evaluate_all("all => all.map(one => one.src)")
    assert 0 < reader.images < len(set(sources))  # those at the end of the page can wait
    page.keyboard.press("l")
    page.wait_for_selector("#grid .card")
    page.wait_for_timeout(200)
    assert 24 <= len(shown(page)) <= 200
    boxes = page.locator("#latents .mosaic").evaluate_all("all => all.map(one => [one.offsetWidth, one.offsetHeight])")
    assert all(abs(width - height) <= 1 for width, height in boxes)  # whatever the shape of the images
    assert not [url for url in reader.requests if re.search(r"latents-\d", url)]  # details come with a latent's page
    before = len(shown(page))
    page.mouse.wheel(0, 20_000)
    until(page, f"document.querySelectorAll('#latents .card').length > {before}")  # further ones come with scrolling


def test_search_sort_and_filter(reader):
    """A reader who types a class, sorts by share or asks for the silent ones must see those, and be able to send the link."""
    page = reader.open("#view=latents", "latents")
    page.select_option("#sort", "share")
    shares = page.evaluate(
        "[...document.querySelectorAll('#latents .card')].map(c => atlas.data.latents.share[c.dataset.latent])"
    )
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1]
    page.select_option("#order", "up")
    shares = page.evaluate(
        "[...document.querySelectorAll('#latents .card')].map(c => atlas.data.latents.share[c.dataset.latent])"
    )
    assert shares == sorted(shares)
    page.select_option("#filter", "silent")
    counts = page.evaluate(
        "[...document.querySelectorAll('#latents .card')].map(c => atlas.data.latents.count[c.dataset.latent])"
    )
    assert len(counts) >= 4 and set(counts) == {0}
    page.select_option("#filter", "all")
    page.fill("#search", "1234")
    assert shown(page) == [1234]
    page.fill("#search", "17 #1234 5")
    assert shown(page) == [17, 1234, 5]
    page.fill("#search", "BIRD fish")
    found = shown(page)
    # Those whose cosine with the word itself is above the floor, the largest first: no latent of another word's.
    wanted = page.evaluate(
        """() => { const index = atlas.data.latents, [latents, scores] = index.found[index.words.indexOf("bird & fish")];
        return latents.filter((at, place) => scores[place] >= index.floor && index.count[at]); }"""
    )
    assert found and found == wanted[: len(found)]
    assert page.inner_text("#count") == f"{len(wanted):,} of 3,000 latents point to “bird & fish”"
    address = page.evaluate("location.hash")
    page.fill("#search", "no such thing")
    assert shown(page) == [] and page.is_visible(".nothing")
    other = page.context.new_page()
    other.goto(reader.url + address)
    other.wait_for_selector("#grid .card")
    assert shown(other) == found  # the link shows the same
    other.close()


def test_search_from_the_overview_is_one_step_back(reader):
    """Typing a word must not take the focus from the field, nor fill the history with every letter."""
    page = reader.open()
    page.keyboard.press("/")
    page.keyboard.type("tree")
    page.wait_for_selector("#grid .card")
    assert page.evaluate("document.activeElement.id") == "search" and page.input_value("#search") == "tree"
    page.go_back()
    page.wait_for_selector("#overview:not([hidden])")


def test_every_link_leads_somewhere(reader):
    """From each kind of page, followed one after another: an address that the atlas shows is a page of it, a part of the
    page or a file beside it, never "No such latent"."""
    addresses = ["", "#view=latents", "#latent=17"]
    reader.open("#latent=17", "latent")
    until(reader.page, "document.querySelectorAll('#latent a.to-image').length > 0")
    addresses.append("#" + reader.page.locator("#latent a.to-image").first.get_attribute("href").partition("#")[2])
    links = set()
    for address in addresses:
        page = reader.open(
            address, address.partition("=")[0].removeprefix("#").replace("view", "latents") or "overview"
        )
        page.wait_for_timeout(100)
        links |= set(page.eval_on_selector_all("main:visible a[href], header a[href]", "all => all.map(a => a.href)"))
    assert len(links) > 20
    folder = Path(reader.url.removeprefix("file://")).parent
    kinds: dict[str, list[str]] = {}
    for link in sorted(links):
        kinds.setdefault(re.split(r"[=&]\d*", link.partition("#")[2])[0], []).append(link)
    for link in (link for of_a_kind in kinds.values() for link in of_a_kind[:6]):
        file, _, part = link.partition("#")
        assert (
            Path(file.removeprefix("file://")).is_relative_to(folder) and Path(file.removeprefix("file://")).exists()
        )
        if "=" in part:
            reader.page.goto(link)
            reader.page.wait_for_selector("h1:visible")
            assert "No such" not in reader.page.locator("h1:visible").inner_text(), link
        elif part:
            assert reader.page.locator(f"#{part}").count() == 1, link


def test_deep_link_and_keys(reader):
    """#latent=17 opens that latent, and everything can be reached without a mouse."""
    page = reader.open("#latent=17", "latent")
    assert page.inner_text("#latent .eyebrow").lower() == "latent 17" and page.title().startswith("17 ")
    assert sum("latents-0000.js" in url for url in reader.requests) == 1  # the details of 64 latents
    page.keyboard.press("j")
    until(page, "location.hash === '#latent=18'")
    until(page, "document.querySelector('#latent .eyebrow').textContent === 'Latent 18'")
    page.keyboard.press("Escape")
    page.wait_for_selector("#latents:not([hidden]) .card")
    assert page.evaluate("document.activeElement.dataset.latent") == "18"  # where one left
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    place = int(page.evaluate("document.activeElement.dataset.latent"))
    assert place > 20  # one to the right, then a row down
    page.keyboard.press("Enter")
    until(page, f"location.hash === '#latent={place}'")
    page.wait_for_selector("#latent:not([hidden]) .photo img")
    page.keyboard.press("?")
    assert page.evaluate("document.getElementById('help').open")
    page.keyboard.press("Escape")
    assert (
        not page.evaluate("document.getElementById('help').open")
        and page.evaluate("location.hash") == f"#latent={place}"
    )
    for wrong in ("#latent=999999", "#latent=-1", "#latent=abc"):
        page.goto(reader.url + wrong)
        until(page, "document.querySelector('#latent h1').textContent === 'No such latent'")


def test_page_of_a_latent_shows_its_images_and_figures(reader, folder):
    """What stands on the page must be what latents.json holds: values, order, alternative texts."""
    latents = json.loads((folder / "latents.json").read_text(encoding="utf-8"))["latents"]
    latent = max(latents, key=lambda one: one["share"])
    page = reader.open(f"#latent={latent['index']}", "latent")
    images = page.locator("#latent .panel:has(h2:text-is('Strongest images')) .photo img")
    assert [one["thumbnail"] for one in latent["top_images"]] == images.evaluate_all(
        "all => all.map(one => one.getAttribute('src'))"
    )
    assert all(images.evaluate_all("all => all.map(one => one.alt.startsWith('image '))"))
    until(page, "[...document.querySelectorAll('#latent .photo img')].every(one => one.complete && one.naturalWidth)")
    values = page.locator("#latent .panel:has(h2:text-is('Strongest images')) .photo b").all_inner_texts()
    assert len(values) == len(latent["top_images"])
    classes = page.locator("#latent .panel:has(h2:text-is('Classes')) .bar-text").all_inner_texts()
    assert classes == [one["name"] for one in latent["classes"]]
    nearest = page.locator("#latent .panel:has(h2:text-is('Nearest latents')) .card").evaluate_all(
        "all => all.map(one => Number(one.dataset.latent))"
    )
    assert nearest == [one["index"] for one in latent["nearest"]]
    images.first.click()
    page.wait_for_selector("#image:not([hidden]) .card")
    active = page.locator("#image .card").evaluate_all("all => all.map(one => Number(one.dataset.latent))")
    assert latent["index"] in active and len(active) <= 12
    page.keyboard.press("Escape")
    page.wait_for_selector("#latents:not([hidden])")


def test_a_name_needs_more_than_chance_and_a_card_says_what_its_numbers_are(reader):
    """ "truck 0.07" under dogs must not be read as a name; a number without a word can't be read at all."""
    page = reader.open("#view=latents", "latents")
    floor, scores, count = page.evaluate(
        "(({floor, scores, count}) => [floor, scores.map(s => s[0]), count])(atlas.data.latents)"
    )
    for latent, text in zip(shown(page), page.locator("#latents .card").all_inner_texts(), strict=True):
        named = count[latent] and scores[latent] >= floor
        assert ("unnamed (nearest: " in text.replace("\n", " ")) == bool(count[latent] and not named)
        assert ("score " in text) == bool(named) and "of images" in text
    assert not page.locator("[aria-label]:is(a.card, span)").count()  # hides what is seen from those who hear


def test_intervals_stand_on_one_axis_and_nothing_is_rounded_to_all_or_none(reader):
    """A loss drawn as a bar to the right, and "100 %" for all but three, are false at a glance."""
    page = reader.open()
    for row in page.evaluate(
        """() => { const rows = atlas.data.overview.results.rows.filter(row => !row.plain);
        return [...document.querySelectorAll(".interval-plot")].map((plot, at) => [rows[at].gain, rows[at].gain_ci, plot.className,
        plot.querySelector(".point").getBoundingClientRect().x + 4, plot.getBoundingClientRect().x + plot.clientWidth * plot.style.getPropertyValue("--zero")]); }"""
    ):
        gain, (low, high), kind, dot, zero = row
        assert (dot > zero + 0.5) == (gain > 0.05) or abs(gain) < 0.1
        assert kind.endswith("open" if low <= 0 <= high else "loss" if gain < 0 else "gain")
    script = "[0, 0.0004, 0.1234, 0.9957, 0.99996, 0.9999999, 1].map(share => atlas.cards.percent(share))"
    assert page.evaluate(script) == ["0 %", "0.04 %", "12 %", "99.6 %", "99.996 %", "> 99.999 %", "100 %"]


def test_names_that_are_attacks_stay_text(reader):
    """Class and file names come from strangers: a tag in one must be read, not run, wherever it is shown."""
    page = reader.open()
    assert page.inner_text("#overview h1") == HOSTILE
    page.goto(
        reader.url
        + "#view=latents&class="
        + "%3Cscript%3Ewindow.hacked%3D1%3C%2Fscript%3E&q=%22%3E%3Cimg%20src%3Dx%20onerror%3Dhacked%3D1%3E"
    )
    page.wait_for_selector("#latents:not([hidden])")
    latent = page.evaluate(
        "atlas.data.latents.class.findIndex((one, at) => one === 0 && atlas.data.latents.count[at])"
    )
    page.goto(reader.url + f"#latent={latent}")
    page.wait_for_selector("#latent:not([hidden]) .photo")
    assert HOSTILE in page.inner_text("#latent")
    assert (
        page.evaluate("document.querySelectorAll('main script, main [onerror], main img:not([src^=thumbs])').length")
        == 0
    )


def test_markup_that_got_in_would_not_run(browser, folder):
    """The second lock: should a tag ever reach the page, its policy keeps scripts and pictures of elsewhere out."""
    reader = Reader(browser, folder)
    page = reader.open()
    page.evaluate(
        """() => { const script = document.createElement("script"); script.textContent = "window.hacked = 1";
        const image = new Image(); image.src = "http://127.0.0.1:9/spy.png"; document.body.append(script, image); }"""
    )
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    assert sum("Content Security Policy" in one for one in reader.complaints) >= 2
    reader.context.close()


def test_light_and_dark(browser, folder):
    """The system's choice holds until the reader makes one, which is kept; every text must have enough contrast in both."""
    backgrounds = {}
    for scheme in ("light", "dark"):
        reader = Reader(browser, folder, scheme=scheme)
        page = reader.open()
        backgrounds[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        colours = page.evaluate(
            """() => Object.fromEntries(["page", "surface", "ink", "soft", "accent", "warm", "good", "bad", "accent-soft"].map(name =>
            { const box = document.createElement("i"); box.style.color = `var(--${name})`; document.body.append(box);
              const found = getComputedStyle(box).color.match(/[\\d.]+/g).map(Number); box.remove(); return [name, found]; }))"""
        )
        for text in ("ink", "soft", "accent", "warm", "good", "bad"):
            for ground in ("page", "surface"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (scheme, text, ground)
        assert contrast(colours["accent"], colours["accent-soft"]) >= 4.5, scheme
        page.keyboard.press("t")
        other = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.reload()
        page.wait_for_selector("#overview:not([hidden])")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == other != backgrounds[scheme]
        reader.check()
        reader.context.close()
    assert backgrounds["light"] != backgrounds["dark"]


def contrast(one: list[float], other: list[float]) -> float:
    """The ratio of WCAG 2."""

    def luminance(colour: list[float]) -> float:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour[:3])
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_phone_needs_no_sideways_scrolling(browser, folder):
    """At 320 px a page that is wider than the window can hardly be read."""
    reader = Reader(browser, folder, width=320)
    for address, view in (("#view=latents", "latents"), ("#latent=17", "latent"), ("", "overview")):
        page = reader.open(address, view)
        page.wait_for_timeout(100)
        assert page.evaluate("document.documentElement.scrollWidth") <= 320, view
    reader.check()
    reader.context.close()


def test_a_file_that_is_missing_is_named(browser, folder, tmp_path):
    """Half a folder, as a mail program may leave it, must say what is wrong instead of staying empty."""
    shutil.copytree(folder, tmp_path / "half", ignore=shutil.ignore_patterns("latents-0000.js", "thumbs"))
    reader = Reader(browser, tmp_path / "half")
    reader.page.goto(reader.url + "#latent=17")
    reader.page.wait_for_selector("#status.failed")
    assert "data/latents-0000.js cannot be read" in reader.page.inner_text("#status")
    reader.context.close()


@needs_axe
def test_axe_finds_nothing(browser, folder):
    """Whoever can't see well, or hears the page, must be able to use every view, in light and in dark, on a phone too."""
    faults = []
    for scheme, width in (("light", 1200), ("dark", 390)):
        reader = Reader(browser, folder, width=width, scheme=scheme)
        for address, view in (
            ("", "overview"),
            ("#view=latents", "latents"),
            ("#latent=17", "latent"),
            ("#image=3", "image"),
        ):
            faults += [f"{scheme} {view}: {fault}" for fault in axe(reader.open(address, view))]
        reader.context.close()
    assert not faults
