"""The routes with a mocked consumer and Flask's test client: no sockets."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import responses
from flask.testing import FlaskClient

from gpumanager.app import Broker
from gpumanager.config import parse_config
from tests.support.broker import config_for
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S, Outcome, eventually

URL = "http://127.0.0.1:8766"
RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


class NoCard:
    def read(self) -> Any:
        from gpumanager.gpu.device import GpuUnavailable

        raise GpuUnavailable("NVML: Driver Not Loaded")

    def close(self) -> None:
        pass


@pytest.fixture
def mocked() -> Iterator[responses.RequestsMock]:
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        yield mock


def make(**changes: Any) -> Broker:
    return Broker(parse_config(config_for(URL, **changes)), card=NoCard())


@pytest.fixture
def client(mocked: responses.RequestsMock) -> FlaskClient:
    return make(gpu={"total_mib": 8000}).flask.test_client()


def test_a_job_is_forwarded_and_answered(
    client: FlaskClient, mocked: responses.RequestsMock
) -> None:
    mocked.post(f"{URL}/api/tts", json={"audio_url": "/audio/a.wav"})
    reply = client.post("/v1/tts?voice=joe", json={"text": "Hello"})
    assert reply.json == {"audio_url": "/audio/a.wav"}
    sent = mocked.calls[0].request
    assert sent.url == f"{URL}/api/tts?voice=joe"
    assert sent.headers["Content-Type"] == "application/json"


def test_the_status_has_every_field_of_the_contract(
    client: FlaskClient, mocked: responses.RequestsMock
) -> None:
    mocked.post(f"{URL}/api/tts", json={})
    client.post("/v1/tts", json={}, buffered=True).close()
    status = client.get("/v1/status").json
    assert status is not None
    assert {"listen", "time", "gpu", "routing", "consumers", "scheduler"} <= set(status)
    assert RFC3339.fullmatch(status["time"])
    gpu = status["gpu"]
    assert (gpu["total_mib"], gpu["used_mib"], gpu["free_mib"]) == (8000, 0, 8000)
    assert gpu["reserved_mib"] == 256
    assert gpu["source"] == "ledger"
    (consumer,) = status["consumers"]
    assert set(consumer) >= {
        *("name", "url", "healthy", "loaded", "gpu_resident_mib", "vram_budget_mib", "active"),
        *("total_requests", "last_used", "priority", "can_coexist_with"),
    }
    assert consumer["loaded"] is True
    assert consumer["active"] == 0
    assert consumer["total_requests"] == 1
    assert RFC3339.fullmatch(consumer["last_used"])
    assert "last_probe" not in consumer
    assert "last_error" not in consumer
    scheduler = status["scheduler"]
    assert scheduler["total_jobs"] == 1
    assert scheduler["oldest_queued"] is None
    for name in ("queue_depth", "in_flight", "last_wait_ms", "last_run_ms", "evictions"):
        assert isinstance(scheduler[name], int)
    assert status["queue"] == []


def test_the_card_that_cannot_be_read_shows_as_err() -> None:
    broker = make(gpu={"total_mib": 8000})
    sampler = next(w for w in broker.threads.all() if w.name == "gpu-sampler")
    sampler._body()
    status = broker.flask.test_client().get("/v1/status").json
    assert status is not None
    assert status["gpu"]["err"] == (
        "NVML: Driver Not Loaded; the ledger of declared figures decides"
    )


def test_without_a_card_and_a_total_status_says_that_nothing_is_decided() -> None:
    broker = make()
    next(w for w in broker.threads.all() if w.name == "gpu-sampler")._body()
    gpu = broker.flask.test_client().get("/v1/status").json["gpu"]  # type: ignore[index]
    assert gpu["source"] == "unknown"
    assert "nothing is decided by memory" in gpu["err"]


def test_healthz(client: FlaskClient) -> None:
    assert client.get("/healthz").json == {"status": "ok"}


def test_draining_shows_in_healthz_and_refuses_jobs(mocked: responses.RequestsMock) -> None:
    broker = make(drain_timeout=0)
    client = broker.flask.test_client()
    broker.lifecycle.drain()
    reply = client.get("/healthz")
    assert (reply.status_code, reply.json) == (503, {"status": "draining"})
    refused = client.post("/v1/tts", json={})
    assert refused.status_code == 503
    assert refused.json is not None
    assert refused.json["error"] == "shutting_down"
    assert int(refused.headers["Retry-After"]) >= 1
    assert client.get("/v1/status").status_code == 200


def test_the_root_is_one_line_for_curl(client: FlaskClient) -> None:
    reply = client.get("/")
    assert reply.content_type.startswith("text/plain")
    assert reply.text.count("\n") == 1


FIREFOX = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
CHROMIUM = (
    "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;"
    "q=0.8,application/signed-exchange;v=b3;q=0.7"
)


@pytest.mark.parametrize("browser", [FIREFOX, CHROMIUM, "text/html"])
def test_a_browser_gets_the_dashboard(client: FlaskClient, browser: str) -> None:
    reply = client.get("/", headers={"Accept": browser})
    assert reply.status_code == 200
    assert reply.content_type == "text/html; charset=utf-8"
    assert reply.headers["Content-Security-Policy"].split("; ") == [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src data: blob:",
        "media-src blob:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ]
    # No outside requests: all that the page names is the broker's own, and there.
    named = set(re.findall(r"(?:src|href)=\"(?!data:)([^\"]*)", reply.text))
    assert named
    for address in named:
        assert address.startswith("/dashboard/")
        assert client.get(address).status_code == 200
    assert not re.search(r"\son\w+=|style=|<style|<script>", reply.text)
    for accept in ("*/*", "text/plain", "application/json", ""):
        assert client.get("/", headers={"Accept": accept}).content_type.startswith("text/plain")


def test_audio_is_fetched_outside_the_line(
    client: FlaskClient, mocked: responses.RequestsMock
) -> None:
    mocked.get(
        f"{URL}/audio/a.wav", body=b"RIFF", status=206, headers={"Content-Range": "bytes 0-3/9"}
    )
    reply = client.get("/audio/a.wav?x=1", headers={"Range": "bytes=0-3", "If-None-Match": '"e"'})
    assert (reply.status_code, reply.data) == (206, b"RIFF")
    assert reply.headers["Content-Range"] == "bytes 0-3/9"
    sent = mocked.calls[0].request
    assert (sent.headers["Range"], sent.headers["If-None-Match"]) == ("bytes=0-3", '"e"')
    assert sent.url == f"{URL}/audio/a.wav?x=1"
    assert client.get("/v1/status").json["scheduler"]["total_jobs"] == 0  # type: ignore[index]


@pytest.mark.parametrize(
    "path",
    [
        "/audio/../etc/passwd",
        "/audio/%2e%2e/etc/passwd",
        "/audio/..%2fetc%2fpasswd",
        "/audio/%252e%252e/etc/passwd",
        "/audio/a/..%5c..%5cetc",
        "/audio/%25252525252e%252e/x",
        "/audio/a%00.wav",
        "/audio/a%0d%0aX:y",
        "/audio/./a.wav",
        "/audio/%ff.wav",
        "/audio/%c0%ae%c0%ae/etc/passwd",
        "/audio/%25c0%25ae/etc/passwd",
    ],
)
def test_a_path_that_could_lead_out_never_reaches_the_consumer(
    client: FlaskClient, mocked: responses.RequestsMock, path: str
) -> None:
    reply = client.get("/", environ_overrides={"PATH_INFO": path, "REQUEST_URI": path})
    if reply.status_code != 400:
        from urllib.parse import unquote

        override = {"PATH_INFO": unquote(path), "REQUEST_URI": path}
        reply = client.get("/", environ_overrides=override)
    assert reply.status_code in (400, 404)
    assert len(mocked.calls) == 0


def test_no_more_audio_at_once_than_there_are_threads_for(
    client: FlaskClient, mocked: responses.RequestsMock
) -> None:
    mocked.get(f"{URL}/audio/a.wav", body=b"RIFF")
    held = [client.get("/audio/a.wav", buffered=False) for _ in range(32)]
    refused = client.get("/audio/a.wav")
    assert refused.status_code == 503
    assert refused.json is not None
    assert refused.json["error"] == "queue_full"
    for reply in held:
        reply.close()
    assert client.get("/audio/a.wav").status_code == 200


def spoken(broker: Broker) -> bytes:
    """What a job is answered."""
    with broker.flask.test_client().post("/v1/tts", json={}) as reply:
        return bytes(reply.data)


def test_what_is_mocked_never_reaches_the_consumer_a_waiting_job_neither() -> None:
    """Whoever hands the GPU over sends the next job's request; not past a mock."""
    release, running = threading.Event(), threading.Event()

    def hold(request: Any) -> tuple[int, dict[str, str], str]:
        running.set()
        assert release.wait(PATIENCE_S)
        return 200, {}, "mocked"

    with ScriptedConsumer(lambda peer, _: peer.send(answer(b"real"))) as consumer:
        broker = Broker(parse_config(config_for(consumer.url)), card=NoCard())

        with responses.RequestsMock() as mock:
            mock.add_callback("POST", f"{consumer.url}/api/tts", hold)
            jobs = [Outcome(lambda: spoken(broker)) for _ in range(3)]
            assert running.wait(PATIENCE_S)
            eventually(lambda: broker.card.scheduler.stats().queue_depth == 2)
            release.set()
            assert [each.result() for each in jobs] == [b"mocked"] * 3
            assert len(mock.calls) == 3
        assert consumer.connections == 0
        assert spoken(broker) == b"real"
        assert consumer.connections == 1


def test_a_hook_around_the_adapter_sees_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tracers do it: a wrapper that calls what it wraps."""
    order: list[str] = []
    original = requests.adapters.HTTPAdapter.send

    @functools.wraps(original)
    def traced(self: Any, request: Any, **more: Any) -> Any:
        order.append("seen")
        return original(self, request, **more)

    monkeypatch.setattr("requests.adapters.HTTPAdapter.send", traced)
    release = threading.Event()

    def script(peer: Connection, _: Received) -> None:
        order.append("arrived")
        assert release.wait(PATIENCE_S)
        peer.send(answer(b"real"))

    with ScriptedConsumer(script) as consumer:
        broker = Broker(parse_config(config_for(consumer.url)), card=NoCard())
        jobs = [Outcome(lambda: spoken(broker)) for _ in range(3)]
        eventually(lambda: broker.card.scheduler.stats().queue_depth == 2)
        eventually(lambda: "arrived" in order)
        release.set()
        assert [each.result() for each in jobs] == [b"real"] * 3
    assert order == ["seen", "arrived"] * 3
