"""The dashboard in a real browser: what it shows, and what its buttons do."""

from __future__ import annotations

import base64
import os
import re
import signal
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from gpumanager.keys import ApiKey
from gpumanager.telemetry.events import EVENTS
from tests.browser.conftest import Page, violations
from tests.browser.test_reach import OUT_OF_REACH
from tests.support.scene import Scene, models, scene
from tests.support.threads import eventually

pytest.importorskip("playwright")
pytestmark = pytest.mark.timeout(120)

Open = Callable[..., Page]
KEY = ApiKey("operator", "a-key-that-is-long-enough")


TAKEN_AT = """() => {
  const layer = document.querySelector("#chart polygon.area"), top = Math.min(
    ...[...layer.points].map((point) => point.y));
  const first = [...layer.points].find((point) => point.y < top + 1);
  return first.matrixTransform(layer.getScreenCTM()).x;
}"""
"""Where on the screen the first consumer's memory rises."""


def finished(scene: Scene) -> None:
    scene.broker.await_idle(30)


def test_it_shows_the_queue_and_cancels_a_waiting_job_at_once(opened: Open) -> None:
    with scene() as it:
        it.pace(voice=30)
        it.job("tts")
        it.broker.await_line(1)
        waiting = it.job("tts")
        it.broker.await_line(2)
        page = opened(it.broker.url)
        page.wait("#state", "live")
        page.wait("#h-queue", "1 runs, 1 waits")
        assert page.page.locator("#queue-rows tr").count() == 2
        assert page.page.locator("#coming .block").count() == 2
        page.press("Cancel ticket 2")
        assert waiting.result(20).json()["error"] == "cancelled"
        page.wait("#said", "Ticket 2 is cancelled")
        it.broker.delete("/v1/queue/1")
        page.wait("#nobody", "Nobody runs")
        assert not page.complaints
        assert all(url.startswith((it.broker.url, "data:")) for url in page.requests)


def test_a_running_job_is_cancelled_after_asking_only(opened: Open) -> None:
    with scene() as it:
        it.pace(voice=30)
        running = it.job("tts")
        it.broker.await_line(1)
        page = opened(it.broker.url)
        page.page.get_by_role("button", name="Cancel ticket 1").press("Enter")
        page.wait("#sure", "Stop the running job?")
        assert "tts of voice" in page.text("#sure-why")
        page.press("Let it run")
        assert page.evaluate("document.activeElement.dataset.ticket") == "1"
        page.page.get_by_role("button", name="Cancel ticket 1").press("Enter")
        page.page.keyboard.press("Escape")
        page.page.locator("#sure").wait_for(state="hidden")
        assert len(it.broker.broker.card.scheduler.queue()) == 1
        page.press("Cancel ticket 1")
        page.press("Stop it")
        assert running.result(20).json()["error"] == "cancelled"
        page.wait("#nobody", "Nobody runs")


def test_its_buttons_load_unload_and_pin(opened: Open) -> None:
    with scene() as it:
        assert it.job("tts").result(30).status_code == 200
        finished(it)
        page = opened(it.broker.url)
        page.wait("#services tr", "loaded")
        page.press("Unload voice")
        page.wait("#said", "voice: released, 2800 MiB")
        eventually(lambda: not it.broker.broker.registry.get("voice").loaded)
        page.press("Load comfyui")
        page.wait("#said", "neither a load nor a warm call")
        page.press("Pin voice")
        page.wait("#services tr", "pinned")
        assert it.broker.broker.registry.get("voice").pinned is True
        page.press("Unpin voice")
        page.page.get_by_role("button", name="Pin voice", exact=True).wait_for()
        assert it.broker.broker.registry.get("voice").pinned is False
        assert [text for text in page.complaints if "status of 5" not in text] == []


LONG = "hf.co/somebody/Qwen2.5-Coder-32B-Instruct-GGUF-abliterated-v2-with-a-name-for-ever:"


def test_models_stand_below_their_consumer_and_each_has_its_buttons(opened: Open) -> None:
    sizes = {"titles:1b": 1000, "code:20b": 5000}
    with models(sizes) as it:
        it.used(*sizes)
        page = opened(it.broker.url)
        page.wait("#services tr.model", "code:20b")
        names = page.page.locator("#services tr .name").all_inner_texts()
        assert names == ["ollama", "code:20b", "titles:1b", "voice"], "the largest first"
        code = page.page.locator("#services tr.model").first
        assert re.search(r"loaded\s+for 4096 tokens", code.inner_text())
        assert re.search(r"5000 MiB\s+needs 5000 MiB, measured", code.inner_text())
        assert page.page.locator("#bar .share").count() == 2
        label = str(page.page.get_attribute("#bar", "aria-label"))
        assert "ollama 6000 MiB (code:20b 5000 MiB, titles:1b 1000 MiB)" in label
        assert "code:20b 5000 MiB, titles:1b 1000 MiB" in page.text("#legend")
        page.press("Pin titles:1b of ollama")
        page.wait("#said", "ollama's model titles:1b is not evicted any more")
        page.page.get_by_role("button", name="Unpin titles:1b of ollama", exact=True).wait_for()
        assert (it.shown("titles:1b")["pinned"], it.shown("code:20b")["pinned"]) == (True, False)
        page.press("Unload code:20b of ollama")
        page.wait("#said", "ollama's model code:20b: released, 5000 MiB")
        page.page.get_by_role("button", name="Load code:20b of ollama", exact=True).wait_for()
        assert it.shown("titles:1b")["loaded"] is True
        page.wait("#services tr.model", "not loaded")
        page.press("Forget code:20b of ollama")
        page.press("Keep it")
        assert "peak_mib" in it.shown("code:20b")["learned"]
        page.press("Forget code:20b of ollama")
        page.press("Forget it")
        page.wait("#said", "ollama's model code:20b: forgotten")
        assert "peak_mib" not in it.shown("code:20b")["learned"]
        it.pace(ollama=60)
        for count, model in enumerate(("titles:1b", "code:20b"), start=1):
            it.chat(model)
            it.broker.await_line(count)
        try:
            page.wait("#queue-rows tr", "titles:1b")
            page.wait("#queue-rows tr", "code:20b")
            page.page.get_by_role("button", name="Cancel ticket").first.press("Enter")
            page.wait("#sure-why", "of ollama (titles:1b), which has run")
            page.page.keyboard.press("Escape")
        finally:
            for entry in reversed(it.broker.broker.card.scheduler.queue()):
                it.broker.delete(f"/v1/queue/{entry.ticket}")
        assert not page.complaints


@pytest.mark.parametrize("width", [390, 820, 1440])
def test_twenty_models_with_long_names_stay_in_reach(opened: Open, width: int) -> None:
    sizes = {f"{LONG}Q{number:02}_K_M": 300 + 10 * number for number in range(20)}
    with models(sizes) as it:
        it.used(*sizes)
        page = opened(it.broker.url, viewport={"width": width, "height": 900})
        rows = page.page.locator("#services tr.model")
        more = page.page.get_by_role("button", name="Show all 20 models of ollama", exact=True)
        more.wait_for()
        assert rows.count() == 5
        assert page.evaluate(OUT_OF_REACH) == []
        more.press("Enter")
        fewer = page.page.get_by_role("button", name="Show fewer models of ollama", exact=True)
        assert fewer.get_attribute("aria-expanded") == "true"
        assert page.evaluate("document.activeElement.dataset.more") == "ollama"
        assert rows.count() == 20
        assert all(name.endswith("_K_M") for name in rows.locator(".name").all_inner_texts())
        assert page.page.locator("#bar .share").count() == 20
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(OUT_OF_REACH) == []
        assert violations(page) == []
        fewer.press("Enter")
        assert rows.count() == 5
        assert not page.complaints


def test_what_each_consumer_did_and_what_happened_in_sentences(opened: Open) -> None:
    with scene() as it:
        it.pace(voice=2, ollama=0.2)
        for kind in ("tts", "llm", "image", "tts"):
            assert it.job(kind).result(30).status_code == 200
            finished(it)
        page = opened(it.broker.url)
        page.wait("#events li", "was unloaded to make room for comfyui: ")
        assert "expected_mib" not in page.text("#events")
        page.page.locator("#chart .job").nth(3).wait_for()
        assert page.page.locator("#chart path.evicted").count() >= 1
        assert "4 jobs" in str(page.page.get_attribute("#chart", "aria-label"))
        label = str(page.page.get_attribute("#bar", "aria-label"))
        assert "Of 11.7 GiB" in label
        assert "voice 2800 MiB" in label
        assert "reserved 256 MiB" in label
        assert "in 2.0 s" not in page.text("#events")
        page.page.select_option("#which", "all")
        page.wait("#events li", "voice did tts for 127.0.0.1 in 2.0 s")
        page.page.select_option("#which", "trouble")
        page.wait("#no-events", "Nothing of that kind")
        assert not page.complaints


def test_a_job_of_two_seconds_is_seen_in_five_minutes_on_the_memorys_own_axis(
    opened: Open,
) -> None:
    with scene() as it:
        it.pace(voice=2)
        assert it.job("tts").result(30).status_code == 200
        finished(it)
        page = opened("about:blank", viewport={"width": 1280, "height": 900})

        def as_if_it_had_run_for_long(route: Any) -> None:
            answer = route.fetch().json()
            long_ago = datetime.now(UTC) - timedelta(hours=1)
            sample = {**answer["samples"][0], "time": long_ago.isoformat(), "held_mib": {}}
            route.fulfill(json={"samples": [{**sample, "used_mib": 0}, *answer["samples"]]})

        page.page.route("**/v1/history*", as_if_it_had_run_for_long)
        page.page.goto(it.broker.url)
        box = "(what) => document.querySelector('#chart ' + what).getBoundingClientRect().toJSON()"
        page.page.locator("#chart .job:not(.before)").first.wait_for()
        widths = {}
        for span, name in (("300", "5 min"), ("900", "15 min"), ("3600", "60 min")):
            page.page.check(f"input[name=span][value='{span}']")
            page.page.locator(f"#chart[aria-label^='The last {name}:']").wait_for()
            widths[span] = page.evaluate(box, ".job:not(.before)")["width"]
        assert widths["300"] == pytest.approx(3 * widths["900"], rel=0.1)
        assert widths["300"] >= 5
        assert widths["3600"] >= 2, "never a hairline"
        page.page.check("input[name=span][value='300']")
        page.page.locator("#chart[aria-label^='The last 5 min:']").wait_for()
        began = page.evaluate(box, ".job:not(.before)")["x"]
        # With the samples of each second, which are a second late at most.
        assert 0 <= page.evaluate(TAKEN_AT) - began <= 8


def test_a_moment_is_read_with_the_keyboard_or_the_mouse(opened: Open) -> None:
    with scene() as it:
        assert it.job("tts").result(30).status_code == 200
        finished(it)
        history = "/v1/history"
        eventually(lambda: '"voice":2800' in it.broker.get(history).text.replace(" ", ""))
        page = opened(it.broker.url)
        page.page.locator("#chart polygon.area").first.wait_for()
        page.page.focus("#chart-box")
        page.page.keyboard.press("ArrowLeft")
        page.wait("#readout", "2800 MiB held (voice 2800 MiB)")
        page.page.focus("#reload")
        box = page.page.locator("#chart").bounding_box()
        page.page.mouse.move(box["x"] + box["width"] - 8, box["y"] + 20)
        page.wait("#readout", "2800 MiB held (voice 2800 MiB)")


def test_it_says_when_the_broker_is_gone_and_shows_nothing_stale_as_live(opened: Open) -> None:
    with scene() as it:
        page = opened(it.broker.url)
        page.wait("#state", "live")
    page.wait("#state", "the broker does not answer")
    assert "what is shown is from" in page.text("#state")
    assert "stale" in str(page.page.get_attribute("body", "class"))
    assert "×" in page.page.title()


def test_it_asks_for_a_key_once_and_answers_a_wrong_one(opened: Open) -> None:
    with scene(keys=(KEY,)) as it:
        page = opened(it.broker.url)
        page.wait("#ask", "wants a key")
        assert not page.page.is_visible("#main")
        assert violations(page) == []
        page.page.get_by_label("Key", exact=True).fill("not-the-right-one")
        page.press("Use it in this tab")
        page.wait("#key-said", "does not know this key")
        assert page.evaluate("document.activeElement.id") == "key"
        assert page.evaluate("sessionStorage.length") == 0
        page.page.get_by_label("Key", exact=True).fill(KEY.secret)
        page.page.get_by_role("button", name="Use it").click()
        page.wait("#state", "live")
        page.page.reload()
        page.wait("#state", "live")
        assert not page.page.is_visible("#ask")
        page.press("Another key")
        page.wait("#ask", "wants a key")


def test_a_clients_key_is_offered_what_it_may_do(opened: Open) -> None:
    client = ApiKey("alice", "a-key-of-a-client-of-ours", role="client")
    with scene(keys=(KEY, client)) as it:
        it.pace(voice=30)
        mine = {"X-Api-Key": client.secret}
        it.job("tts", key=KEY.secret)
        it.broker.await_line(1)
        own = it.job("tts", key=client.secret)
        it.broker.await_line(2)
        page = opened(it.broker.url)
        page.page.get_by_label("Key", exact=True).fill(client.secret)
        page.press("Use it in this tab")
        page.wait("#queue-rows tr", "runs")
        assert page.page.get_by_role("button", name="Load voice").count() == 0
        assert not page.page.is_visible("#drain")
        assert page.page.get_by_role("button", name="Cancel ticket 1").count() == 0
        page.press("Cancel ticket 2")
        assert own.result(20).json()["error"] == "cancelled"
        assert it.broker.delete("/v1/queue/1", headers=mine).status_code == 403
        it.broker.delete("/v1/queue/1", headers={"X-Api-Key": KEY.secret})


def test_it_says_since_when_and_why_a_consumer_is_down_and_what_to_do(opened: Open) -> None:
    with scene() as it:
        page = opened(it.broker.url)
        page.wait("#attention", "Nothing needs your attention")
        os.kill(it.fakes["voice"].pid, signal.SIGKILL)
        page.wait("#attention", "1 thing needs your attention")
        page.wait("#troubles li", "voice: down since ")
        assert "refused the connection" in page.text("#troubles")
        assert "Start it" in page.text("#troubles")
        page.wait("#services tr", "since ")
        page.wait("#events li", "voice does not answer")
        assert page.page.title() == "(1) gpumanager"
        assert violations(page) == []


def test_it_shows_who_had_how_much_of_the_gpu(opened: Open) -> None:
    keys = [ApiKey(name, f"{name}-has-a-long-key", role="client") for name in ("anna", "ben")]
    with scene(keys=(KEY, *keys)) as it:
        for key in (keys[0], keys[1], keys[0]):
            assert it.job("tts", key=key.secret).result(20).status_code == 200
        page = opened(it.broker.url)
        page.page.get_by_label("Key", exact=True).fill(KEY.secret)
        page.press("Use it in this tab")
        page.wait("#shares li", "anna")
        page.wait("#shares li", "2 jobs")
        page.wait("#shares li", "ben")
        assert page.page.locator("#shares li").count() == 2
        assert "longest overtake" in page.text("#stats")
        assert violations(page) == []
        page.press("Another key")
        page.page.get_by_label("Key", exact=True).fill(keys[1].secret)
        page.press("Use it in this tab")
        page.wait("#shares li", "all others")
        assert "anna" not in page.text("#shares")


def changed_status(page: Page, url: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Show what the broker says, but for `change`."""

    def answer(route: Any) -> None:
        status = route.fetch().json()
        change(status)
        route.fulfill(json=status)

    page.page.route("**/v1/status", answer)
    page.page.goto(url)


def test_it_shows_the_longest_overtake_and_how_urgent_a_job_is(opened: Open) -> None:
    def overtaken(status: dict[str, Any]) -> None:
        status["scheduler"]["longest_overtake"] = {"jobs": 3, "ms": 12_400}
        names = [f"client-{number}" for number in range(12)]
        status["scheduler"]["shares"] = [
            {"requester": name, "gpu_ms": 1000 * (20 - at), "jobs": 1}
            for at, name in enumerate(names)
        ] + [{"requester": "-", "gpu_ms": 26_000, "jobs": 5}]

    with scene() as it:
        it.pace(voice=30)
        it.job("tts", Priority="u=6")
        it.broker.await_line(1)
        page = opened("about:blank")
        changed_status(page, it.broker.url, overtaken)
        page.wait("#stats", "3 jobs, 12 s")
        page.wait("#queue-rows td", "tts u=6")
        assert page.page.locator("#shares li").count() == 9
        first = " ".join(page.text("#shares li:first-child").split())
        assert first == "client-0 10 %: 20 s, 1 job"
        assert "all others" in page.text("#shares li:last-child")
        assert "9 jobs" in page.text("#shares li:last-child")
        it.broker.delete("/v1/queue/1")


def test_an_overdue_job_is_said_and_what_comes_after_it_is_a_lower_bound(opened: Open) -> None:
    def overdue(status: dict[str, Any]) -> None:
        for entry in status["queue"]:
            entry["overdue"] = True

    with scene() as it:
        it.pace(voice=30)
        it.jobs("tts", 3)
        page = opened("about:blank")
        changed_status(page, it.broker.url, overdue)
        page.wait("#queue-rows tr", "overdue")
        page.wait("#queue-rows tr", "when it ends")
        page.wait("#troubles li", "The running tts of voice takes")
        for ticket in (3, 2, 1):
            it.broker.delete(f"/v1/queue/{ticket}")


@pytest.mark.parametrize(
    ("growth", "said"),
    [
        ({"over": "jobs", "mib_per_job": 5.2, "grown_mib": 900}, "with each job"),
        ({"over": "loads", "mib_per_load": 40, "grown_mib": 0}, "with each load"),
    ],
)
def test_a_leak_needs_attention(opened: Open, growth: dict[str, Any], said: str) -> None:
    def leaks(status: dict[str, Any]) -> None:
        for consumer in status["consumers"]:
            if consumer["name"] == "voice":
                consumer["growth"] = {**consumer["growth"], "verdict": "leaks", **growth}

    with scene() as it:
        page = opened("about:blank")
        changed_status(page, it.broker.url, leaks)
        page.wait("#troubles li", "voice: leaks")
        page.wait("#troubles li", said)


def test_the_picture_of_the_queue_is_to_scale_and_shows_what_is_loaded_first(opened: Open) -> None:
    times = [(0, 0, 0, 6000), (6000, 1000, 3000, 4000), (14000, 0, 0, 2000)]

    def timed(status: dict[str, Any]) -> None:
        for entry, figures in zip(status["queue"], times, strict=True):
            for name, ms in zip(("estimate", "evict", "load", "run"), figures, strict=True):
                entry[f"{name}_ms"] = ms

    with scene() as it:
        it.pace(voice=30)
        it.jobs("tts", 1)
        it.jobs("image", 1)
        it.jobs("tts", 1)
        page = opened("about:blank")
        changed_status(page, it.broker.url, timed)
        page.page.locator("#coming .block").nth(2).wait_for()
        running, image, last = page.evaluate(
            """() => [...document.querySelectorAll("#coming .block")].map((block) => ({
              from: block.offsetLeft, wide: block.offsetWidth,
              before: block.querySelector(".before").offsetWidth}))"""
        )
        assert image["wide"] == pytest.approx(4 * last["wide"], abs=3)
        assert image["before"] == pytest.approx(image["wide"] / 2, abs=3)
        assert last["before"] == running["before"] == 0
        assert running["from"] + running["wide"] == pytest.approx(image["from"], abs=2)
        assert image["from"] + image["wide"] == pytest.approx(last["from"], abs=2)
        page.wait("#h-queue", "done in ≈ 15 s")
        for ticket in (3, 2, 1):
            it.broker.delete(f"/v1/queue/{ticket}")


def test_load_power_and_temperature_show_where_the_card_tells(opened: Open) -> None:
    def silent(status: dict[str, Any]) -> None:
        for name in ("utilization_percent", "power_w", "power_limit_w"):
            del status["gpu"][name]

    with scene() as it:
        it.pace(voice=30)
        it.jobs("tts", 1)
        page = opened(it.broker.url)
        page.page.locator("#chart polyline.sensor").nth(2).wait_for()
        page.wait("#gauges div", "of 350 W")
        page.wait("#gauges div", "°C")
        page.wait("#gauges div", " %")
        page = opened("about:blank")
        changed_status(page, it.broker.url, silent)
        page.wait("#gauges div", "°C")
        assert "350 W" not in page.text("#gauges")
        it.broker.delete("/v1/queue/1")


@pytest.mark.parametrize("measured", [True, False], ids=["lost", "never had"])
def test_a_card_that_is_lost_needs_attention_and_one_without_a_driver_does_not(
    opened: Open, measured: bool
) -> None:
    def unmeasured(status: dict[str, Any]) -> None:
        status["gpu"] |= {"source": "ledger", "err": "NVML: Shared Library Not Found"}
        if not measured:
            status["gpu"].pop("last_sample", None)  # it may not have been looked at yet

    with scene() as it:
        page = opened("about:blank")
        changed_status(page, it.broker.url, unmeasured)
        page.wait("#gpu-err", "Shared Library Not Found")
        wrong = "1 thing needs" if measured else "Nothing needs your attention"
        page.wait("#attention", wrong)


def test_every_event_has_its_sentence(opened: Open) -> None:
    happened: list[dict[str, Any]] = [
        {"event": "evicted", "target": "ollama", "method": "http", "outcome": outcome, "mib": 2800,
         "expected_mib": 3000, "ms": 12, "taken_by": "a game (pid 7)"}
        for outcome in ("released", "partial", "leaked", "stolen", "unverified", "gone")
    ]  # fmt: skip
    happened += [
        {"event": "eviction_failed", "target": "ollama", "method": "unit",
         "reason": "no such unit"},
        {"event": "eviction_skipped", "target": "ollama"},
        {"event": "tried_anyway", "needed_mib": 2800, "short_mib": 100},
        {"event": "loaded", "ms": 2000},
        {"event": "resumed", "ms": 2000},
        {"event": "unhealthy", "reason": "it refused the connection"},
        {"event": "on_cpu", "models": "llama3:8b"},
        {"event": "breaker_open", "failures": 3, "pause_ms": 2000},
        {"event": "out_of_memory", "available_mib": 2800},
        {"event": "out_of_memory_doubted", "available_mib": 2800, "needed_mib": 2000},
        {"event": "gpu_unavailable", "reason": "power: Unknown Error"},
        {"event": "answer_truncated", "reason": "it closed the connection"},
        {"event": "trimmed", "target": "ollama", "outcome": "released", "mib": 900},
        {"event": "trim_failed", "target": "ollama", "reason": "it answered 400"},
        {"event": "leaking", "over": "jobs", "each_mib": 5, "grown_mib": 900},
        {"event": "leaking", "over": "loads", "each_mib": 5, "grown_mib": 900},
        {"event": "quarantined", "reason": "gave back 0 of 2800 MiB"},
        {"event": "cancel_failed", "reason": "it answered 500", "job": "7"},
        {"event": "housekeeping_failed", "kind": "restore", "reason": "the card is full"},
        {"event": "config_not_reloaded", "reason": "consumers.voice.url: is missing"},
        {"event": "config_reloaded", "changed": ["voice"]},
        {"event": "started", "version": "1.0"},
        {"event": "refused", "code": "insufficient_vram", "status": 503},
        {"event": "job", "kind": "tts", "client": "alice", "status": 200, "wait_ms": 2000,
         "prepare_ms": 1500, "run_ms": 900},
        {"event": "job", "kind": "tts", "failure": "consumer_timeout", "run_ms": 900},
    ]  # fmt: skip
    happened += [
        {"event": name}
        for name in ("healthy", "breaker_closed", "out_of_memory_healed", "gpu_available",
                     "still_busy", "draining", "pinned", "unpinned", "loaded_meanwhile",
                     "came_back")
    ]  # fmt: skip
    with scene() as it:
        page = opened(it.broker.url)
        told = page.evaluate(
            """async (happened) => {
              const {KNOWN, inWords} = await import("/dashboard/sentences.js");
              return [KNOWN, happened.map((event) => inWords({consumer: "voice", ...event}))];
            }""",
            happened,
        )
        known, sentences = told
        assert set(known) == set(EVENTS)
        assert {each["event"] for each in happened} <= set(EVENTS)
        for event, said in zip(happened, sentences, strict=True):
            words = f"{said['text']} {said['remedy']}"
            assert "undefined" not in words, event
            assert "NaN" not in words, event
            keys = re.sub("floor_mib|vram_resident_mib|first_byte", "", words)
            assert "_" not in keys, event
            assert said["text"].endswith("."), event


def test_memory_that_is_nobodys_is_named(opened: Open) -> None:
    with scene() as it:
        page = opened(it.broker.url)
        page.wait("#legend li", "free")
        it.card.allocate("a game", 1500)
        try:
            page.wait("#legend li", f"(pid {os.getpid()})")
            page.wait("#troubles li", "holds 1500 MiB and belongs to no consumer")
        finally:
            it.card.free("a game")


def test_focus_survives_while_everything_is_drawn_anew(opened: Open) -> None:
    with scene() as it:
        it.pace(voice=30)
        it.jobs("tts", 3)
        page = opened(it.broker.url)
        name = "Cancel ticket 2"
        page.page.get_by_role("button", name=name).focus()
        looks = sum("/v1/status" in url for url in page.requests)
        while sum("/v1/status" in url for url in page.requests) < looks + 3:
            page.page.wait_for_event("requestfinished")
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == name
        it.broker.delete("/v1/queue/2")
        page.page.get_by_role("button", name="Cancel ticket 2").wait_for(state="detached")
        focused = page.evaluate("document.activeElement.getAttribute('aria-label')")
        assert focused == "Cancel ticket 3", "who stood on a job that is gone stands on the next"
        for ticket in (3, 1):
            it.broker.delete(f"/v1/queue/{ticket}")


def test_reload_tells_and_drain_asks_first(opened: Open) -> None:
    with scene() as it:
        page = opened(it.broker.url)
        page.wait("#state", "live")
        page.press("Reload config")
        page.wait("#said", "was not started from a config file")
        drained: list[str] = []

        def drain(route: Any) -> None:
            drained.append(route.request.url)
            route.fulfill(status=202, json={"status": "draining"})

        page.page.route(
            "**/v1/drain*",
            drain,
        )
        page.press("Drain…")
        page.wait("#sure", "End the broker?")
        assert violations(page) == []
        page.press("Let it run")
        page.page.locator("#sure").wait_for(state="hidden")
        assert drained == []
        page.press("Drain…")
        page.press("End it")
        page.wait("#said", "shuts down")
        boot = it.broker.get("/v1/events").json()["boot"]
        assert drained == [f"{it.broker.url}/v1/drain?boot={boot}"]


def test_in_forced_colours_the_bar_still_shows_who_holds_what(opened: Open) -> None:
    with scene() as it:
        for kind in ("tts", "llm"):
            assert it.job(kind).result(30).status_code == 200
        page = opened(it.broker.url, forced_colors="active")
        page.wait("#legend li", "voice")
        page.wait("#legend li", "ollama")
        shot = base64.b64encode(page.page.locator("#bar").screenshot()).decode()
        blank = page.context.new_page()
        found = blank.evaluate(
            """async (shot) => {
              const image = new Image();
              image.src = "data:image/png;base64," + shot;
              await image.decode();
              const canvas = document.createElement("canvas");
              canvas.width = image.width; canvas.height = image.height;
              const brush = canvas.getContext("2d");
              brush.drawImage(image, 0, 0);
              const counts = {}, pixels = brush.getImageData(0, 5, image.width, 1).data;
              for (let i = 0; i < pixels.length; i += 4) {
                const colour = pixels.slice(i, i + 3).join();
                counts[colour] = (counts[colour] ?? 0) + 1;
              }
              return Object.values(counts).filter((n) => n > image.width / 20).length;
            }""",
            shot,
        )
        assert found >= 3, "two consumers and what is free"


def test_the_page_needs_nothing_from_elsewhere_and_no_inline_script(opened: Open) -> None:
    with scene() as it:
        page = opened(it.broker.url)
        page.wait("#state", "live")
        answer = it.broker.get("/", headers={"Accept": "text/html"})
        policy = answer.headers["Content-Security-Policy"]
        assert "unsafe" not in policy
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        for inline in ("<style", " style=", " onclick=", "javascript:"):
            assert inline not in answer.text
        assert page.evaluate("[...document.scripts].every((script) => script.src)")
        files = {url for url in page.requests if "/dashboard/" in url}
        assert len(files) >= 10
        for url in files:
            got = it.broker.get(url.removeprefix(it.broker.url))
            assert got.headers["X-Content-Type-Options"] == "nosniff"
            again = {"If-None-Match": got.headers["ETag"]}
            assert it.broker.get(url.removeprefix(it.broker.url), headers=again).status_code == 304
        for name in ("dashboard.html", "nothing.js", "..%2Froutes.py"):
            assert it.broker.get(f"/dashboard/{name}").status_code == 404


@pytest.mark.parametrize("width", [360, 768, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_any_screen(opened: Open, width: int, scheme: str) -> None:
    with scene() as it:
        page = opened(it.broker.url, viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.wait("#state", "live")
        page.wait("#services tr", "comfyui")
        # The page itself never scrolls sideways; wide tables do, in their own boxes.
        assert page.page.evaluate("document.documentElement.scrollWidth") <= width
        assert not page.complaints


def test_a_page_of_another_site_cannot_press_its_buttons(opened: Open) -> None:
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
