"""ComfyUI's page through the broker: its prompts wait their turn, and it shows how far they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpumanager.gpu.simulated import SimulatedCard
from gpumanager.keys import ApiKey
from gpumanager.telemetry.events import CallUnclassified, JobEnded
from tests.browser.conftest import Page
from tests.support.broker import LiveBroker, live_broker
from tests.support.fake_servers import Running, fake_server
from tests.support.ports import free_port
from tests.support.threads import eventually

Open = Callable[..., Page]


@contextmanager
def comfyui(
    folder: Path, keys: Iterable[ApiKey] = (), **changes: Any
) -> Iterator[tuple[LiveBroker, Running]]:
    card = SimulatedCard.create(folder / "card.json", 12_000)
    with fake_server("comfyui", card.path, "comfyui", 5000) as fake:
        config = {
            "gpu": {"device": f"simulated:{card.path}", "sample_interval": 0.2},
            "routing": {"image": "comfyui"},
            "consumers": {"comfyui": {"preset": "comfyui", "url": fake.url}},
            **changes,
        }
        with live_broker(yaml.safe_dump(config), keys=keys) as live:
            yield live, fake


@pytest.mark.timeout(90)
def test_two_pages_take_turns_and_each_shows_its_own_progress(opened: Open, tmp_path: Path) -> None:
    with comfyui(tmp_path) as (live, _):
        url = f"{live.url}/consumers/comfyui/"
        first, second = opened(url), opened(url)
        for page in (first, second):
            page.wait("#socket", "open")
            page.wait("#remaining", "0")
        first.page.fill("#seconds", "2")
        first.press("Queue prompt")
        first.wait("#state", "running")
        second.press("Queue prompt")
        live.await_waiting(1)
        # Its prompt waits in the broker's queue: ComfyUI has not seen it.
        assert second.text("#state") == "sent"
        assert second.text("#remaining") == "1"
        first.page.wait_for_function("document.getElementById('progress').value > 2")
        assert not second.evaluate("messages.includes('progress')")
        second.wait("#state", "running")
        assert first.text("#state") == "done"
        second.page.wait_for_function("document.getElementById('progress').value > 2")
        second.wait("#state", "done")
        for page, name in ((first, "it_00001_.png"), (second, "it_00002_.png")):
            assert page.page.get_attribute("#picture", "alt") == name
            page.page.wait_for_function("document.getElementById('picture').naturalWidth === 96")
            said = page.evaluate("messages.filter((it) => it !== 'status')")
            assert said[0] == "execution_start"
            assert said.count("progress") == 20
            assert said[-2:] == ["execution_success", "executing"]
            assert not page.complaints
        live.await_idle()
        happened = [each.event for each in live.broker.events.since(0).events]
        jobs = [each for each in happened if isinstance(each, JobEnded)]
        assert [(job.kind, job.status, job.failure) for job in jobs] == [("image", 200, None)] * 2
        assert jobs[0].run_ms >= 2000  # it held the GPU until it was rendered
        assert jobs[1].wait_ms > 0
        traffic = live.broker.tunnels.traffic["comfyui"]
        assert (traffic.now, traffic.opened) == (2, 2)
        assert not [each for each in happened if isinstance(each, CallUnclassified)]


@pytest.mark.timeout(90)
def test_on_a_port_of_its_own_it_is_as_if_there_were_no_broker(
    opened: Open, tmp_path: Path
) -> None:
    port = free_port()
    with comfyui(tmp_path, ports={port: "comfyui"}) as (live, fake):
        page = opened(f"http://127.0.0.1:{port}/")
        page.wait("#remaining", "0")  # and who it is, ComfyUI has told it then
        page.page.fill("#seconds", "30")
        page.press("Queue prompt")
        page.wait("#state", "running")
        page.press("Interrupt")
        page.wait("#state", "interrupted")
        live.await_idle()
        page.page.fill("#seconds", "0.1")
        page.press("Queue prompt")
        page.wait("#state", "done")
        assert not page.complaints
        assert fake.ask("GET", "/queue") == {"queue_running": [], "queue_pending": []}


@pytest.mark.timeout(90)
def test_where_there_are_keys_the_browser_asks_for_one(opened: Open, tmp_path: Path) -> None:
    """And shows it with all that the page asks for, its WebSocket included."""
    keys = [ApiKey(name, f"{name}-secret-key", role="client") for name in ("alice", "bob")]
    with comfyui(tmp_path, keys=keys) as (live, _):
        url = f"{live.url}/consumers/comfyui/"
        alice, bob = (
            opened(url, http_credentials={"username": "", "password": key.secret}) for key in keys
        )
        for page in (alice, bob):
            page.wait("#remaining", "0")
        alice.page.fill("#seconds", "30")
        alice.press("Queue prompt")
        alice.wait("#state", "running")
        bob.press("Interrupt")
        bob.wait("#log", "interrupt refused (403)")
        assert alice.text("#state") == "running"
        alice.press("Interrupt")
        alice.wait("#state", "interrupted")
        live.await_idle()
        assert live.get("/consumers/comfyui/").status_code == 401


@pytest.mark.timeout(90)
def test_the_page_connects_again_after_it_was_told_that_the_broker_goes(
    opened: Open, tmp_path: Path
) -> None:
    with comfyui(tmp_path) as (live, _):
        page = opened(f"{live.url}/consumers/comfyui/")
        page.wait("#socket", "open")
        live.broker.tunnels.part(["comfyui"], "the test says so")
        eventually(lambda: live.broker.tunnels.traffic["comfyui"].opened == 2)
        page.wait("#socket", "open")
        assert page.evaluate("closes") == [1001]
