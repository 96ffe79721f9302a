"""The dashboard in a real browser: what it shows, and what its buttons do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gpumanager.keys import ApiKey
from tests.support.browser import CHROMIUM, chromium
from tests.support.scene import Scene, scene
from tests.support.threads import eventually

pytest.importorskip("playwright")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
    pytest.mark.timeout(120),
]

KEY = ApiKey("operator", "a-key-that-is-long-enough")
PATIENCE_MS = 10_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as it:
        yield it


class Page:
    """A page, and everything it complained about."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on(
            "console",
            lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None,
        )
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def wait(self, selector: str, text: str) -> None:
        self.page.locator(selector, has_text=text).first.wait_for()


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    pages: list[Page] = []

    def open_page(url: str, **options: Any) -> Page:
        pages.append(Page(browser, url, **options))
        return pages[-1]

    yield open_page
    for page in pages:
        page.context.close()


def finished(scene: Scene) -> None:
    scene.broker.await_idle(30)


def test_it_shows_the_line_and_cancels_a_job(opened: Any) -> None:
    with scene() as it:
        it.pace(voice=30)
        running = it.job("tts")
        it.broker.await_line(1)
        waiting = it.job("tts")
        it.broker.await_line(2)
        page = opened(it.broker.url)
        page.wait("#state", "live")
        page.wait("#line tr", "runs")
        assert page.page.locator("#line tr").count() == 2
        page.page.get_by_role("button", name="Cancel ticket 2").click()
        assert waiting.result(20).json()["error"] == "cancelled"
        page.page.get_by_role("button", name="Cancel ticket 1").press("Enter")
        assert running.result(20).json()["error"] == "cancelled"
        page.wait("#nobody", "Nobody runs")
        assert not page.complaints
        host = it.broker.url
        assert all(url.startswith((host, "data:")) for url in page.requests)


def test_its_buttons_load_and_unload(opened: Any) -> None:
    with scene() as it:
        assert it.job("tts").result(30).status_code == 200
        finished(it)
        page = opened(it.broker.url)
        page.wait("#services tr", "loaded")
        page.page.get_by_role("button", name="Unload voice").click()
        page.wait("#said", "voice: released, 2800 MiB")
        eventually(lambda: not it.broker.broker.registry.get("voice").loaded)
        page.page.get_by_role("button", name="Load comfyui", exact=True).click()
        page.wait("#said", "neither a load nor a warm call")
        assert [text for text in page.complaints if "status of 5" not in text] == []


def test_memory_timeline_and_events(opened: Any) -> None:
    with scene() as it:
        it.pace(voice=0.2, ollama=0.2)
        for kind in ("tts", "llm", "image", "tts"):
            assert it.job(kind).result(30).status_code == 200
            finished(it)
        page = opened(it.broker.url)
        page.wait("#events li", "evicted")
        page.wait("#events li", "comfyui")
        assert page.page.locator("#timeline rect").count() >= 4
        assert page.page.locator("#timeline path.evicted").count() >= 1
        assert "jobs in the last 60 minutes" in page.page.get_attribute("#timeline", "aria-label")
        page.page.select_option("#span", "300")
        assert "last 5 minutes" in page.page.get_attribute("#timeline", "aria-label")
        label = page.page.get_attribute("#bar", "aria-label")
        assert "Of 11.7 GiB" in label
        assert "voice 2800 MiB" in label
        assert not page.complaints


def test_it_says_when_the_broker_is_gone_and_shows_nothing_stale_as_live(opened: Any) -> None:
    with scene() as it:
        page = opened(it.broker.url)
        page.wait("#state", "live")
    page.wait("#state", "the broker does not answer")
    assert "what is shown is from" in page.text("#state")
    assert "stale" in page.page.get_attribute("body", "class")


def test_it_asks_for_a_key_once(opened: Any) -> None:
    with scene(keys=(KEY,)) as it:
        page = opened(it.broker.url)
        page.wait("#ask", "wants a key")
        assert not page.page.is_visible("#main")
        page.page.get_by_label("Key").fill(KEY.secret)
        page.page.get_by_role("button", name="Use it").click()
        page.wait("#state", "live")
        page.page.reload()
        page.wait("#state", "live")
        assert not page.page.is_visible("#ask")


@pytest.mark.parametrize("width", [360, 768, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_any_screen(opened: Any, width: int, scheme: str) -> None:
    with scene() as it:
        page = opened(it.broker.url, viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.wait("#state", "live")
        page.wait("#services tr", "comfyui")
        # The page itself never scrolls sideways; wide tables do, in their own boxes.
        assert page.page.evaluate("document.documentElement.scrollWidth") <= width
        assert not page.complaints


def test_a_page_of_another_site_cannot_press_its_buttons(opened: Any) -> None:
    with scene() as it:
        page = opened(it.broker.url.replace("127.0.0.1", "localhost"))
        page.wait("#state", "live")
        status = page.page.evaluate(
            """async (url) => { try {
                 const a = await fetch(url, {method: "POST", mode: "no-cors"}); return a.type;
               } catch (error) { return "blocked"; } }""",
            it.broker.url + "/v1/consumers/voice/unload",
        )
        assert status in ("blocked", "opaque")
        assert it.broker.stats.total_jobs == 0
