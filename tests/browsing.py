"""A real browser for the tests of pages, and what axe (https://github.com/dequelabs/axe-core) finds wrong with one."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
FLAGS += ("disable-component-update", "disable-sync")
MISSING = (
    "needs Chromium on the PATH (Debian: apt-get install chromium) or in CHROMIUM"
    if CHROMIUM is None
    else "needs playwright (pip install playwright)"
    if importlib.util.find_spec("playwright") is None
    else ""
)
needs_browser = pytest.mark.skipif(bool(MISSING), reason=MISSING)
needs_axe = pytest.mark.skipif(
    bool(MISSING) or importlib.util.find_spec("axe_playwright_python") is None,
    reason=MISSING or "needs axe (pip install axe-playwright-python)",
)


@contextmanager
def chromium() -> Iterator:
    """The browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in FLAGS])
        yield browser
        browser.close()


def axe(page) -> list[str]:
    """What is wrong with a page as it stands, with the place of each fault."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{fault['id']} at {node['target']}: {fault['help']}: {node['html'][:200]}"
        for fault in found
        for node in fault["nodes"]
    ]
