"""Chromium, driven by Playwright: Debian's, which needs no download of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
"""For a container, where there is neither a user namespace nor a card to draw with."""


@contextmanager
def chromium() -> Iterator[Any]:
    """A Playwright browser, without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()
