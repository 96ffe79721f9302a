"""Asynchronous jobs on the dashboard: the list, their results, and what a result cannot do."""

from __future__ import annotations

import io
import threading
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gpumanager.keys import ApiKey
from tests.browser.conftest import Page, violations
from tests.browser.test_reach import OUT_OF_REACH
from tests.support.broker import LiveBroker, config_for, live_broker
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S, eventually

pytest.importorskip("playwright")
pytestmark = pytest.mark.timeout(120)

Open = Callable[..., Page]
ADMIN = ApiKey("operator", "a-key-that-is-long-enough")
ANN = ApiKey("ann", "the-long-key-of-a-client-of-ours", role="client")

EVIL = """<!doctype html><title>mild</title><script>
document.title = "ran"; localStorage.setItem("ran", "yes");</script><p>a page of the consumer's"""
DRAWING = """<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>
localStorage.setItem("ran", "yes")</script><rect width="9" height="9"/></svg>"""


def picture() -> bytes:
    found = io.BytesIO()
    Image.new("RGB", (320, 200), "teal").save(found, "PNG")
    return found.getvalue()


def sound() -> bytes:
    found = io.BytesIO()
    with wave.open(found, "wb") as it:
        it.setnchannels(1)
        it.setsampwidth(2)
        it.setframerate(8000)
        it.writeframes(bytes(16000))
    return found.getvalue()


ANSWERS: dict[bytes, tuple[str, bytes]] = {
    b"png": ("image/png", picture()),
    b"wav": ("audio/wav", sound()),
    b"json": ("application/json", b'{"text": "<b>hello</b>", "b64_json": "%s"}' % (b"A" * 5000)),
    b"html": ("text/html; charset=utf-8", EVIL.encode()),
    b"svg": ("image/svg+xml", DRAWING.encode()),
    b"long": ("text/plain", b"word " * 2000),
    b"zip": ("application/zip", b"PK" + bytes(3000)),
    b"not a png": ("image/png", EVIL.encode()),
}


class Studio:
    """A consumer that answers a job with what its body names; `slow` waits for `release`."""

    def __init__(self) -> None:
        self.release = threading.Event()

    def __call__(self, connection: Connection, received: Received) -> None:
        while received.body == b"slow" and not self.release.wait(0.02):
            if connection.wait_closed(0.02):
                return
        if received.body == b"refused":
            said = answer(b'{"detail": "no such voice"}', "422 Unprocessable Entity")
        else:
            kind, body = ANSWERS.get(received.body, ("text/plain", b"done"))
            said = answer(body, headers=(f"Content-Type: {kind}",))
        connection.send(said)


class Office:
    """A broker before that consumer, and jobs for it."""

    def __init__(self, broker: LiveBroker, studio: Studio) -> None:
        self.broker = broker
        self.studio = studio

    def submit(self, body: bytes, key: ApiKey | None = None, *, over: bool = False) -> str:
        headers = {"Prefer": "respond-async"} | auth(key)
        answered = self.broker.post("/v1/tts", data=body, headers=headers)
        assert answered.status_code == 202, answered.text
        job = str(answered.json()["id"])
        if over:
            assert self.shown(job, "?wait=20", key)["ended"]
        return job

    def shown(self, job: str, query: str = "", key: ApiKey | None = None) -> Any:
        return self.broker.get(f"/v1/jobs/{job}{query}", headers=auth(key)).json()

    def occupied(self, key: ApiKey | None = None) -> str:
        """A job that runs until the studio is told to go on."""
        job = self.submit(b"slow", key)
        eventually(lambda: self.shown(job, key=key)["state"] == "running")
        return job


def auth(key: ApiKey | None) -> dict[str, str]:
    return {} if key is None else {"X-Api-Key": key.secret}


@contextmanager
def open_office(folder: Path, *keys: ApiKey, **jobs: Any) -> Iterator[Office]:
    studio = Studio()
    with (
        ScriptedConsumer(studio) as consumer,
        live_broker(
            config_for(consumer.url, jobs={"dir": str(folder / "jobs"), **jobs}), keys=keys
        ) as broker,
    ):
        try:
            yield Office(broker, studio)
        finally:
            studio.release.set()


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    with open_office(tmp_path) as it:
        yield it


def row(page: Page, job: str) -> Any:
    return page.page.locator(f"#later-rows tr[data-key='{job}']")


def button(page: Page, what: str, job: str) -> Any:
    return row(page, job).get_by_role("button", name=f"{what} tts job {job[:8]}")


def show(page: Page, job: str) -> Any:
    page.page.get_by_role("button", name=f"Show the result of tts job {job[:8]}").press("Enter")
    page.page.locator("#result[open]").wait_for()
    return page.page.locator("#result-box")


def saved(page: Page, job: str) -> bytes:
    with page.page.expect_download(timeout=PATIENCE_S * 1000) as found:
        page.page.get_by_role("link", name=f"Save the result of tts job {job[:8]}").press("Enter")
    return Path(found.value.path()).read_bytes()


def test_there_is_no_section_without_any_and_it_comes_with_the_first(
    opened: Open, office: Office
) -> None:
    page = opened(office.broker.url)
    page.wait("#state", "live")
    assert not page.page.is_visible("#later")
    assert not any("/v1/jobs" in url for url in page.requests)
    office.submit(b"png", over=True)
    page.wait("#h-later", "Asynchronous jobs: 1 done")
    assert page.page.is_visible("#later")


def test_it_tells_how_far_they_are_and_cancels_those_that_are_not_over(
    opened: Open, office: Office
) -> None:
    done = office.submit(b"png", over=True)
    failed = office.submit(b"refused", over=True)
    runs = office.occupied()
    queued, waits = office.submit(b"one"), office.submit(b"two")
    eventually(lambda: office.broker.stats.queue_depth == 1)
    page = opened(office.broker.url)
    page.wait("#h-later", "Asynchronous jobs: 2 waiting, 1 running, 1 done, 1 failed")
    order = page.page.locator("#later-rows tr").evaluate_all("rows => rows.map(r => r.dataset.key)")
    assert order == [waits, queued, runs, failed, done], "the newest first"
    assert "127.0.0.1" in row(page, runs).inner_text()
    assert "image/png" in row(page, done).inner_text()
    assert "status 422" in row(page, failed).inner_text()
    assert "place 2" in row(page, waits).inner_text()
    assert button(page, "Cancel", done).count() == 0
    button(page, "Cancel", waits).press("Enter")
    page.wait("#said", f"The tts job {waits[:8]} is cancelled")
    assert office.shown(waits)["state"] == "cancelled"
    button(page, "Cancel", runs).press("Enter")
    page.wait("#sure-why", "What it did so far is lost")
    page.press("Let it run")
    assert page.evaluate("document.activeElement.dataset.job") == runs
    assert office.shown(runs)["state"] == "running"
    button(page, "Cancel", runs).press("Enter")
    page.press("Stop it")
    assert office.shown(runs, "?wait=20")["state"] == "cancelled"
    page.wait("#h-later", "2 cancelled")
    assert not page.complaints


def test_results_are_shown_and_saved(opened: Open, office: Office) -> None:
    jobs = {name: office.submit(name, over=True) for name in ANSWERS}
    page = opened(office.broker.url)
    page.wait("#h-later", f"{len(jobs)} done")
    box = show(page, jobs[b"png"])
    image = box.locator("img")
    assert image.get_attribute("alt").startswith("The picture that mvoice made")
    eventually(lambda: image.evaluate("image => image.naturalWidth") == 320)
    assert violations(page) == []
    page.page.keyboard.press("Escape")
    page.page.locator("#result").wait_for(state="hidden")
    assert page.evaluate("document.activeElement.dataset.show") == jobs[b"png"]
    assert box.locator("img").count() == 0
    audio = show(page, jobs[b"wav"]).locator("audio[controls]")
    eventually(lambda: audio.evaluate("audio => audio.duration") == 1)
    page.press("Close")
    text = show(page, jobs[b"json"]).inner_text()
    assert '"text": "<b>hello</b>"' in text
    assert "… (5000 letters)" in text
    page.press("Close")
    assert "The first 4000 of 10000 letters" in show(page, jobs[b"long"]).inner_text()
    page.press("Close")
    assert "no image/png that this browser can show" in shown_after(page, jobs[b"not a png"])
    page.press("Close")
    name = f"Show the result of tts job {jobs[b'zip'][:8]}"
    assert page.page.get_by_role("button", name=name).count() == 0
    for kind in (b"png", b"zip", b"html"):
        assert saved(page, jobs[kind]) == ANSWERS[kind][1]
    assert not page.complaints


def shown_after(page: Page, job: str) -> str:
    box = show(page, job)
    box.locator("p").wait_for()
    return str(box.inner_text())


def test_no_result_runs_a_script_in_the_brokers_origin(opened: Open, office: Office) -> None:
    html, svg = office.submit(b"html", over=True), office.submit(b"svg", over=True)
    page = opened(office.broker.url)
    page.wait("#h-later", "2 done")
    assert "localStorage.setItem" in show(page, html).inner_text(), "as text"
    assert page.page.locator("#result-box *").count() == 1
    page.press("Close")
    name = f"Show the result of tts job {svg[:8]}"
    assert page.page.get_by_role("button", name=name).count() == 0
    for job in (html, svg):  # and where somebody opens the link
        other = opened(f"{office.broker.url}/v1/jobs/{job}/result")
        assert other.evaluate("document.title") != "ran"
        assert other.evaluate("window.origin") == "null"
    assert page.evaluate("localStorage.getItem('ran')") is None


def test_a_script_would_run_if_the_route_did_not_forbid_it(opened: Open, office: Office) -> None:
    job = office.submit(b"html", over=True)
    page = opened("about:blank")

    def naked(route: Any) -> None:
        route.fulfill(body=route.fetch().body(), content_type="text/html")

    page.page.route("**/result", naked)
    page.page.goto(f"{office.broker.url}/v1/jobs/{job}/result")
    assert page.evaluate("document.title") == "ran"


def test_with_a_key_it_shows_its_own_and_fetches_with_it(opened: Open, tmp_path: Path) -> None:
    with open_office(tmp_path, ADMIN, ANN) as office:
        theirs = office.submit(b"png", ADMIN, over=True)
        mine = office.submit(b"png", ANN, over=True)
        refused = office.submit(b"refused", ANN, over=True)
        page = opened(office.broker.url)
        page.page.get_by_label("Key", exact=True).fill(ANN.secret)
        page.press("Use it in this tab")
        page.page.locator(f"#later-rows tr[data-key='{mine}']").wait_for()
        assert row(page, theirs).count() == 0
        assert page.text("#h-later") == "Asynchronous jobs", "not how many others have"
        assert "ann" in row(page, mine).inner_text()
        image = show(page, mine).locator("img")
        eventually(lambda: image.evaluate("image => image.naturalWidth") == 320)
        page.press("Close")
        assert saved(page, mine) == ANSWERS[b"png"][1]
        assert b"no such voice" in saved(page, refused)
        assert not any(ANN.secret in url for url in page.requests)


def test_older_ones_come_with_a_button(opened: Open, office: Office) -> None:
    office.occupied()
    for _ in range(44):
        office.submit(b"x")
    page = opened(office.broker.url)
    page.wait("#h-later", "44 waiting, 1 running")
    rows = page.page.locator("#later-rows tr")
    assert rows.count() == 20
    page.page.get_by_role("button", name="Show older ones").press("Enter")
    eventually(lambda: rows.count() == 40)
    page.page.get_by_role("button", name="Show older ones").press("Enter")
    eventually(lambda: rows.count() == 45)
    assert not page.page.is_visible("#later-more")
    page.wait("#later-rows tr", "place 44")


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (820, "dark"), (1440, "light")])
def test_everything_is_in_reach(opened: Open, office: Office, width: int, scheme: str) -> None:
    def worst(route: Any) -> None:
        told = route.fetch().json()
        for number, job in enumerate(told["jobs"]):
            job |= {"model": "hf.co/somebody/Qwen2.5-Coder-32B-Instruct-GGUF-abliterated:Q4_K_M"}
            job |= {"requester": "the-laptop-of-somebody-with-a-long-name", "urgency": 7}
            job |= {"created": "2026-01-31T23:59:59Z"}
            if number == 2:
                job |= {"failure": "consumer_unreachable", "state": "failed", "status": 502}
        route.fulfill(json=told)

    for body in (b"png", b"refused", b"zip"):
        office.submit(body, over=True)
    office.occupied()
    office.submit(b"x")
    options = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    page = opened("about:blank", **options)
    page.page.route("**/v1/jobs?*", worst)
    page.page.goto(office.broker.url)
    page.wait("#later-rows tr", "the-laptop-of")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OUT_OF_REACH) == []
    assert violations(page) == []
    assert not page.complaints
