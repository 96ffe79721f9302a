"""Takes the pictures in docs/: `python -m docs.screenshots`, from the repository's root.

Needs the development requirements, and Debian's chromium.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.support.browser import chromium
from tests.support.scene import Scene, scene
from tests.support.threads import eventually

HERE = Path(__file__).parent
SIZES = {"wide": 1280, "middle": 768, "narrow": 390}


def main() -> None:
    """All of them."""
    with chromium() as browser:
        with scene() as it:
            shoot(browser, it.broker.url, "dashboard-empty", ["wide"])
            busy(it)
            shoot(browser, it.broker.url, "dashboard", list(SIZES))
            shoot(browser, it.broker.url, "dashboard-dark", ["wide"], color_scheme="dark")
            terminal(it.broker.url)
            page = opened(browser, it.broker.url, SIZES["wide"])
            for entry in it.broker.broker.scheduler.line():
                it.broker.delete(f"/v1/queue/{entry.ticket}")
        page.locator("#state", has_text="does not answer").wait_for()
        page.screenshot(path=HERE / "dashboard-gone.png")


def busy(it: Scene) -> None:
    """A while of mixed work, a line, and a service that is down."""
    it.pace(voice=1.5, ollama=2.5, comfyui=4)
    for _ in range(2):
        for kind in ("tts", "llm", "tts", "image", "llm", "llm", "tts", "image", "tts", "llm"):
            it.job(kind)
            time.sleep(2)
    it.broker.await_idle(60)
    it.pace(voice=20, ollama=20, comfyui=20)
    for kind in ("llm", "tts", "image", "llm"):
        it.job(kind)
        time.sleep(0.05)
    eventually(lambda: len(it.broker.broker.scheduler.line()) == 4)
    time.sleep(6)  # until the history has it


def opened(browser: Any, url: str, width: int, **options: Any) -> Any:
    """A page that shows live figures."""
    page = browser.new_context(viewport={"width": width, "height": 900}, **options).new_page()
    page.goto(url)
    page.locator("#state", has_text="live").wait_for()
    page.locator("#events li").first.wait_for()
    page.select_option("#span", "300")
    page.wait_for_timeout(500)
    return page


def shoot(browser: Any, url: str, name: str, sizes: list[str], **options: Any) -> None:
    """The whole page at some widths."""
    for size in sizes:
        page = opened(browser, url, SIZES[size], **options)
        suffix = "" if size == "wide" else f"-{size}"
        page.screenshot(path=HERE / f"{name}{suffix}.png", full_page=True)
        page.close()


def terminal(url: str) -> None:
    """`gpumanager top`, as text."""
    shown = subprocess.run(
        [sys.executable, "-m", "gpumanager", "top", "--once", "--url", url],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "100", "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
    )
    (HERE / "top.txt").write_text(shown.stdout, "utf-8")


if __name__ == "__main__":
    main()
