"""Takes the pictures in docs/: `python -m docs.screenshots`, from the repository's root.

Needs the development requirements, and Debian's chromium.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import requests
from PIL import Image

from tests.support.browser import chromium
from tests.support.scene import BODIES, LONG_NAME, Scene, crowd, models, scene
from tests.support.threads import eventually

HERE = Path(__file__).parent
WIDE, MIDDLE, NARROW = 1280, 820, 390
GAP = 12
"""Pixels between parts of a page that are put below each other."""
DESK = {"comfyui": 5000, "ollama": 6000, "voice": 2800, "whisper": 1700, "xtts": 2300}


def main() -> None:
    """All of them."""
    with chromium() as browser:
        with crowd(DESK, 12_000) as it:
            busy(it)
            shoot(browser, it.broker.url, "dashboard", WIDE, color_scheme="light")
            shoot(browser, it.broker.url, "dashboard-dark", WIDE, color_scheme="dark")
            shoot(browser, it.broker.url, "dashboard-middle", MIDDLE, color_scheme="dark")
            shoot(browser, it.broker.url, "dashboard-forced", WIDE, forced_colors="active")
            terminal(it.broker.url)
            page = opened(browser, it.broker.url, WIDE)
            page.get_by_role("button", name="Cancel ticket").first.click()
            page.locator("#sure").wait_for()
            save(page.screenshot(), "dashboard-cancel")
            page.keyboard.press("Escape")
            leave(it)
        page.locator("#state", has_text="does not answer").wait_for()
        save(page.screenshot(), "dashboard-gone")
        with crowd() as it:
            full(it)
            shoot(browser, it.broker.url, "dashboard-twelve", 1440, color_scheme="light")
            shoot(browser, it.broker.url, "dashboard-narrow", NARROW, color_scheme="light")
            leave(it)
        models_of_one(browser)
        later(browser)


def busy(it: Scene) -> None:
    """A while of mixed work, a queue, a consumer that is down, and a process that is nobody's."""
    it.broker.post("/v1/consumers/whisper/pin")
    it.pace(voice=1.5, ollama=2.5, comfyui=4, whisper=0.8)
    for _ in range(2):
        for kind in ("tts", "llm", "stt", "image", "llm", "llm", "tts", "image", "stt", "llm"):
            it.job(kind)
            time.sleep(2)
    it.broker.await_idle(60)
    os.kill(it.fakes["xtts"].pid, signal.SIGKILL)
    it.card.allocate("somebody else's", 700)
    it.pace(voice=60, ollama=60, comfyui=60, whisper=60)
    for kind in ("llm", "tts", "image", "stt", "llm"):
        it.jobs(kind, 1)
    eventually(lambda: it.broker.broker.registry.get("xtts").healthy is False)
    time.sleep(2)  # until the history has it


def full(it: Scene) -> None:
    """Twelve consumers, one with a long name, and thirty waiting jobs."""
    for name in [*list(it.fakes)[:8], "whisper"]:
        it.broker.post(f"/v1/consumers/{name}/load")
    it.pace(**{"comfyui": 4, "ollama": 2.5, "whisper": 1.2, LONG_NAME: 2})
    for kind in ("stt", "llm", "image", "tts", "stt", "llm"):
        it.job(kind)
        time.sleep(1.5)
    it.broker.await_idle(60)
    it.pace(**dict.fromkeys(it.fakes, 60))
    it.jobs("llm", 1)
    for _ in range(10):
        for kind in ("image", "tts", "stt"):
            it.jobs(kind, 1)


def models_of_one(browser: Any) -> None:
    """The card and the consumers, where one has several models."""
    sizes = {"qwen2.5-coder:14b": 4800, "llama3.1:8b": 2900, "nomic-embed-text": 600}
    with models({**sizes, "gemma3:12b": 4100}) as it:
        it.used(*sizes)
        it.broker.post("/v1/consumers/ollama/pin", params={"model": "nomic-embed-text"})
        it.pace(ollama=1.5)
        for model in sizes:
            it.chat(model).result(60)
        it.used("gemma3:12b")
        it.pace(ollama=60)
        it.chat("qwen2.5-coder:14b")
        it.broker.await_line(1)
        page = opened(browser, it.broker.url, WIDE, color_scheme="light")
        card = page.locator("#card").bounding_box()
        consumers = page.locator("#consumers").bounding_box()
        parts = [
            Image.open(io.BytesIO(page.screenshot(full_page=True, clip=box)))
            for box in (card, consumers)
        ]
        height = sum(part.height for part in parts) + GAP
        whole = Image.new("RGB", (max(part.width for part in parts), height), "white")
        whole.paste(parts[0], (0, 0))
        whole.paste(parts[1], (0, parts[0].height + GAP))
        found = io.BytesIO()
        whole.save(found, "PNG")
        save(found.getvalue(), "dashboard-models")
        leave(it)


def later(browser: Any) -> None:
    """Asynchronous jobs in every state that one can wait for."""
    with scene() as it:
        it.pace(voice=1.5, ollama=2.5)
        url = f"{it.broker.url}/v1/"

        def submit(kind: str) -> str:
            asked = requests.post(
                url + kind, json=BODIES[kind], headers={"Prefer": "respond-async"}, timeout=30
            )
            return str(asked.json()["id"])

        for kind in ("tts", "llm"):
            it.broker.get(f"/v1/jobs/{submit(kind)}?wait=9")
        it.pace(ollama=60)
        waiting = [submit(kind) for kind in ("llm", "tts", "llm", "llm")]
        it.broker.delete(f"/v1/jobs/{waiting[1]}")
        it.broker.await_line(2)
        page = opened(browser, it.broker.url, WIDE, color_scheme="light")
        save(page.locator("#later").screenshot(), "dashboard-later")
        for each in reversed(waiting):
            it.broker.delete(f"/v1/jobs/{each}")
        it.broker.await_idle(30)


def leave(it: Scene) -> None:
    """Cancel everything, the last one first."""
    it.card.free("somebody else's")
    for entry in reversed(it.broker.broker.card.scheduler.queue()):
        it.broker.delete(f"/v1/queue/{entry.ticket}")


def opened(browser: Any, url: str, width: int, **options: Any) -> Any:
    """A page that shows live figures."""
    page = browser.new_context(viewport={"width": width, "height": 900}, **options).new_page()
    page.goto(url)
    page.locator("#state", has_text="live").wait_for()
    page.locator("#events li").first.wait_for()
    page.wait_for_timeout(2500)
    return page


def shoot(browser: Any, url: str, name: str, width: int, **options: Any) -> None:
    """The whole page."""
    page = opened(browser, url, width, **options)
    save(page.screenshot(full_page=True), name)
    page.context.close()


def save(png: bytes, name: str) -> None:
    """With 256 colours: a third of the size, and nobody sees the difference."""
    picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(HERE / f"{name}.png", optimize=True)


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
