"""A consumer's whole HTTP face, below a path and on a port of its own."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import requests
import yaml

from gpumanager import lifecycle
from gpumanager.keys import ApiKey
from gpumanager.web import server
from tests.support.broker import LiveBroker, live_broker
from tests.support.ports import free_port
from tests.support.sockets import Connection, RawClient, Received, ScriptedConsumer
from tests.support.threads import PATIENCE_S, eventually

ROOT = "/consumers/comfyui"


def page(connection: Connection, received: Received) -> None:
    """Who was asked what, and headers that a mount has to mend."""
    method, path, _ = received.line.decode().split(" ")
    own = f"http://{received.header('host')}"
    places = {
        "/absolute": f"{own}/view?a=1",
        "/rooted": "/view?a=1",
        "/relative": "view?a=1",
        "/elsewhere": "http://example.org/view",
        "/odd": "http://[::1/view",
        "/network": "//example.org/view",
    }
    body = json.dumps({"method": method, "path": path, "headers": dict(received.headers)}).encode()
    if path in places:
        head = f"HTTP/1.1 302 Found\r\nLocation: {places[path]}\r\n"
    else:
        cookies = ["a=1; Path=/", "b=2; path=/view; Domain=127.0.0.1; HttpOnly", "c=3"]
        lines = "".join(f"Set-Cookie: {cookie}\r\n" for cookie in cookies)
        head = f"HTTP/1.1 200 OK\r\n{lines}"
    body = b"" if method == "HEAD" else body
    connection.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)


def config(consumer: ScriptedConsumer, **changes: Any) -> str:
    comfyui = {
        "url": consumer.url,
        "paths": {"image": {"path": "/prompt", "method": "POST"}},
        "gpu_work": [{"path": "/render/*"}],
        "not_gpu_work": [{"path": ["/upload/*", "/queue"], "method": "POST"}],
    }
    routing = {"image": "comfyui"}
    return yaml.safe_dump({"consumers": {"comfyui": comfyui}, "routing": routing, **changes})


@pytest.fixture
def consumer() -> Iterator[ScriptedConsumer]:
    with ScriptedConsumer(page) as running:
        yield running


@pytest.fixture
def broker(consumer: ScriptedConsumer) -> Iterator[LiveBroker]:
    with live_broker(config(consumer)) as running:
        yield running


@pytest.mark.parametrize(
    ("method", "path", "jobs"),
    [
        ("GET", "/", 0),
        ("HEAD", "/view?x=%20y", 0),
        ("GET", "/render/a/b", 1),
        ("POST", "/render/a", 1),
        ("POST", "/prompt", 1),
        ("POST", "/upload/image", 0),
        ("POST", "/queue", 0),
        ("DELETE", "/queue", 1),
        ("POST", "/other", 1),
        ("OPTIONS", "/other", 0),
        ("GET", "/models/a%2Fb", 0),
        ("GET", "/view/%E7%B5%B5%E3%80%80%F0%9F%91%A9%E2%80%8D%F0%9F%8E%A8.png", 0),
    ],
)
def test_gpu_work_takes_its_turn_and_nothing_else_does(
    broker: LiveBroker, consumer: ScriptedConsumer, method: str, path: str, jobs: int
) -> None:
    found = requests.request(method, f"{broker.url}{ROOT}{path}", timeout=PATIENCE_S)
    assert found.status_code == 200
    assert consumer.requests[-1].line == f"{method} {path} HTTP/1.1".encode()
    broker.await_idle()
    assert broker.stats.total_jobs == jobs


def test_what_is_no_gpu_work_does_not_wait(consumer: ScriptedConsumer) -> None:
    release = threading.Event()

    def hold(connection: Connection, received: Received) -> None:
        if received.line.startswith(b"POST /prompt"):
            release.wait(PATIENCE_S)
        page(connection, received)

    consumer.script = hold
    with live_broker(config(consumer)) as broker:
        job = threading.Thread(target=broker.post, args=(f"{ROOT}/prompt",), daemon=True)
        job.start()
        broker.await_line(1)
        assert broker.get(f"{ROOT}/").status_code == 200
        assert broker.post(f"{ROOT}/queue").status_code == 200
        assert [entry.job.kind for entry in broker.broker.card.scheduler.queue()] == ["image"]
        release.set()
        job.join(PATIENCE_S)


@pytest.mark.parametrize(
    ("path", "location"),
    [
        ("/absolute", f"{ROOT}/view?a=1"),
        ("/rooted", f"{ROOT}/view?a=1"),
        ("/relative", "view?a=1"),
        ("/elsewhere", "http://example.org/view"),
        ("/network", "//example.org/view"),
    ],
)
def test_redirects_lead_back_through_the_mount(
    broker: LiveBroker, path: str, location: str
) -> None:
    found = broker.get(f"{ROOT}{path}", allow_redirects=False)
    assert (found.status_code, found.headers["Location"]) == (302, location)


def test_a_location_that_is_no_url_is_passed_on(broker: LiveBroker) -> None:
    with broker.raw() as client:  # `requests` would look into it
        found = client.request("GET", f"{ROOT}/odd").answer()
    assert (found.status, found.header("Location")) == (302, "http://[::1/view")


def test_a_consumer_below_a_path_is_mounted_without_it(consumer: ScriptedConsumer) -> None:
    text = config(consumer).replace(consumer.url, f"{consumer.url}/ui")

    def redirects(connection: Connection, _: Received) -> None:
        connection.send(b"HTTP/1.1 302 Found\r\nLocation: /ui/x\r\nContent-Length: 0\r\n\r\n")

    consumer.script = redirects
    with live_broker(text) as broker:
        found = broker.get(f"{ROOT}/a", allow_redirects=False)
    assert consumer.requests[-1].line == b"GET /ui/a HTTP/1.1"
    assert found.headers["Location"] == f"{ROOT}/x"


def test_cookies_are_the_mounts(broker: LiveBroker) -> None:
    found = broker.get(f"{ROOT}/")
    assert found.raw.headers.getlist("Set-Cookie") == [
        f"a=1; Path={ROOT}/",
        f"b=2; path={ROOT}/view; HttpOnly",
        "c=3",
    ]


def test_a_page_is_told_its_own_origin_and_where_it_is_mounted(broker: LiveBroker) -> None:
    host = f"127.0.0.1:{broker.port}"
    found = broker.post(f"{ROOT}/queue", headers={"Origin": f"http://{host}"}).json()["headers"]
    assert found["origin"] == f"http://{found['host']}"
    assert found["x-forwarded-host"] == host
    assert found["x-forwarded-proto"] == "http"
    assert found["x-forwarded-prefix"] == ROOT
    refused = broker.post(f"{ROOT}/queue", headers={"Origin": "http://example.org"})
    assert refused.status_code == 403


def test_an_origin_that_is_none_is_passed_on(broker: LiveBroker) -> None:
    found = broker.get(f"{ROOT}/view", headers={"Origin": "http://["})
    assert (found.status_code, found.json()["headers"]["origin"]) == (200, "http://[")


def test_what_is_no_job_may_take_as_long_as_it_likes(consumer: ScriptedConsumer) -> None:
    """A page's stream of events, or a model that is pulled."""

    def drips(connection: Connection, _: Received) -> None:
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n")
        for _times in range(8):
            time.sleep(0.1)
            connection.send(b"x")

    consumer.script = drips
    text = yaml.safe_load(config(consumer))
    text["consumers"]["comfyui"]["timeouts"] = {"total": 0.4, "idle": 0.3}
    with live_broker(yaml.safe_dump(text)) as broker:
        assert broker.get(f"{ROOT}/events").content == b"x" * 8


def test_pages_that_wait_for_an_event_keep_nobody_else_waiting(
    consumer: ScriptedConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MOUNT_THREADS", 3)
    monkeypatch.setattr(server, "MOUNT_THREADS_EACH", 2)
    release = threading.Event()

    def waits(connection: Connection, received: Received) -> None:
        if b"/event" in received.line:
            release.wait(PATIENCE_S)
        page(connection, received)

    consumer.script = waits
    text = yaml.safe_load(config(consumer, audio_proxy="voice"))
    text["consumers"] |= {name: {"url": consumer.url} for name in ("voice", "other")}
    with live_broker(yaml.safe_dump(text)) as broker, ExitStack() as pages:

        def opens(path: str) -> None:
            before = len(consumer.requests)
            pages.enter_context(broker.raw()).request("GET", path)
            eventually(lambda: len(consumer.requests) > before)

        opens(f"{ROOT}/event")
        opens(f"{ROOT}/event")
        refused = broker.get(f"{ROOT}/view")
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert "2 requests to comfyui outside the queue" in refused.json()["message"]
        assert broker.get("/consumers/other/view").status_code == 200
        opens("/consumers/other/event")
        refused = broker.get("/consumers/voice/view")
        assert refused.json()["message"] == "3 requests outside the queue are under way"
        assert broker.get("/audio/a.wav").status_code == 200
        assert broker.post(f"{ROOT}/prompt").status_code == 200
        pages.close()
        eventually(lambda: broker.get(f"{ROOT}/view").status_code == 200)
        release.set()


@pytest.mark.parametrize("path", [f"{ROOT}/events", "/audio/live"])
def test_a_stream_without_end_does_not_hold_up_the_end(
    consumer: ScriptedConsumer, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(lifecycle, "FLUSH_TIMEOUT_S", 0.1)
    ended = threading.Event()

    def streams(connection: Connection, _: Received) -> None:
        connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
        if connection.wait_closed():
            ended.set()

    consumer.script = streams
    with live_broker(config(consumer, audio_proxy="comfyui")) as broker:
        with broker.raw() as client:
            client.request("GET", path).until(b"x\r\n")
            assert broker.broker.lifecycle.drain()
            assert not client.answer().complete
        assert ended.wait(PATIENCE_S)


SECRETS = {"client": "0123456789abcdef", "admin": "fedcba9876543210"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/view", 200),
        ("GET", "/render/a", 200),
        ("POST", "/prompt", 200),
        ("POST", "/%70rompt", 200),
        ("POST", "/api/show", 200),
        ("POST", "/upload/image", 403),
        ("POST", "/unload", 403),
        ("DELETE", "/api/delete", 403),
    ],
)
def test_a_client_changes_nothing_at_a_consumer_but_by_its_jobs(
    consumer: ScriptedConsumer, method: str, path: str, status: int
) -> None:
    keys = [ApiKey(role, secret, role=role) for role, secret in SECRETS.items()]  # type: ignore[arg-type]
    with live_broker(config(consumer), keys=keys) as broker:
        for role, expected in [("client", status), ("admin", 200)]:
            headers = {"X-Api-Key": SECRETS[role]}
            url = f"{broker.url}{ROOT}{path}"
            found = requests.request(method, url, headers=headers, timeout=PATIENCE_S)
            assert found.status_code == expected, role
            assert len(consumer.requests) == (0 if role == "client" and status == 403 else 1)
            consumer.requests.clear()


def test_a_page_of_another_site_cannot_have_a_get_run(broker: LiveBroker) -> None:
    elsewhere = {"Sec-Fetch-Site": "cross-site"}
    assert broker.get(f"{ROOT}/render/a", headers=elsewhere).status_code == 403
    assert broker.get(f"{ROOT}/view", headers=elsewhere).status_code == 200
    assert broker.stats.total_jobs == 0


def test_the_mount_itself_leads_to_its_root(broker: LiveBroker) -> None:
    found = broker.get(f"{ROOT}?a=1", allow_redirects=False)
    assert (found.status_code, found.headers["Location"]) == (308, f"{ROOT}/?a=1")


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/consumers/nobody/x", 404, "there is no consumer 'nobody'; there are: comfyui"),
        ("/consumers/nobody", 404, "there is no consumer"),
        (f"{ROOT}/a/../../v1/status", 400, "leads out of /consumers/comfyui/"),
        (f"{ROOT}/%2e%2e/x", 400, "leads out"),
        (f"{ROOT}/a%2f..%2fb", 400, "leads out"),
        ("/consumers/comfy%75i/x", 400, "leads out"),
        (f"{ROOT}/a%0d%0ab", 400, "cannot be printed"),
        (f"{ROOT}/a%C2%85b", 400, "cannot be printed"),
        (f"{ROOT}/a%E2%80%A8b", 400, "cannot be printed"),
    ],
)
def test_a_path_that_leads_elsewhere_is_refused(
    broker: LiveBroker, consumer: ScriptedConsumer, path: str, status: int, says: str
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", broker.port, timeout=PATIENCE_S)
    connection.request("GET", path)  # `requests` would tidy it up
    found = connection.getresponse()
    body = found.read().decode()
    connection.close()
    assert (found.status, says in body) == (status, True), body
    assert consumer.requests == []


def test_an_unclassified_call_is_told_of_once(broker: LiveBroker) -> None:
    for path in ("/other", "/other", "/queue", "/more"):
        broker.post(f"{ROOT}{path}")
    broker.get(f"{ROOT}/page")
    events = [each.fields for each in broker.broker.events.since(0).events]
    told = [
        (each["method"], each["path"]) for each in events if "method" in each and len(each) == 3
    ]
    assert told == [("POST", "/other"), ("POST", "/more")]


@contextmanager
def with_port(consumer: ScriptedConsumer, **more: Any) -> Iterator[tuple[LiveBroker, str]]:
    port = free_port()
    with live_broker(config(consumer, ports={port: "comfyui"}), **more) as broker:
        yield broker, f"http://127.0.0.1:{port}"


def test_a_port_is_the_consumers_root(consumer: ScriptedConsumer) -> None:
    with with_port(consumer) as (broker, url):
        assert requests.get(f"{url}/", timeout=PATIENCE_S).json()["path"] == "/"
        assert requests.get(f"{url}/v1/status", timeout=PATIENCE_S).json()["path"] == "/v1/status"
        assert requests.post(f"{url}/prompt", timeout=PATIENCE_S).json()["path"] == "/prompt"
        found = requests.get(f"{url}/absolute", timeout=PATIENCE_S, allow_redirects=False)
        assert found.headers["Location"] == "/view?a=1"
        broker.await_idle()
        assert broker.get("/v1/status").json()["scheduler"]["total_jobs"] == 1


def test_a_target_may_be_an_address_alone(consumer: ScriptedConsumer) -> None:
    with with_port(consumer) as (_, url), RawClient(int(url.rpartition(":")[2])) as client:
        assert client.request("GET", "http://localhost?a=1").answer().status == 200
        assert consumer.requests[-1].line == b"GET /?a=1 HTTP/1.1"


def test_a_port_asks_for_the_key(consumer: ScriptedConsumer) -> None:
    secret = "0123456789abcdef"
    with with_port(consumer, keys=[ApiKey("alice", secret, role="client")]) as (_, url):
        for path in ("/", "/healthz", "/dashboard/x"):  # on the broker's own port some need none
            refused = requests.get(url + path, timeout=PATIENCE_S)
            assert (refused.status_code, refused.json()["error"]) == (401, "unauthorized")
        assert consumer.requests == []
        found = requests.get(f"{url}/", headers={"X-Api-Key": secret}, timeout=PATIENCE_S)
        assert "x-api-key" not in found.json()["headers"]


def test_an_error_on_a_port_is_told_in_the_words_of_its_path(consumer: ScriptedConsumer) -> None:
    text = config(consumer).replace(consumer.url, f"http://127.0.0.1:{free_port()}")
    port = free_port()
    with live_broker(f"ports: {{{port}: comfyui}}\n{text}"):
        url = f"http://127.0.0.1:{port}"
        found = requests.post(f"{url}/v1/chat/completions", json={}, timeout=PATIENCE_S)
        assert (found.status_code, found.json()["error"]["code"]) == (502, "consumer_unreachable")
