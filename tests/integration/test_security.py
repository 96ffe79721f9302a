"""Keys, hosts and origins over real sockets."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from gpumanager.client import BrokerClient
from gpumanager.errors import Forbidden
from gpumanager.keys import ApiKey
from gpumanager.web.record import LOCAL_ADDRESS
from gpumanager.web.security import check_host
from tests.support.broker import LiveBroker, config_for, live_broker
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S, Outcome

ALICE = "alice-has-a-long-key"
BOB = "bob-has-a-long-key-too"
KEYS = [ApiKey("alice", ALICE, max_queued=2), ApiKey("bob", BOB)]


@pytest.fixture
def consumer() -> Iterator[ScriptedConsumer]:
    with ScriptedConsumer(lambda connection, _: connection.send(answer())) as running:
        yield running


@pytest.fixture
def guarded(consumer: ScriptedConsumer) -> Iterator[LiveBroker]:
    with live_broker(config_for(consumer.url), keys=KEYS) as running:
        yield running


@pytest.fixture
def open_broker(consumer: ScriptedConsumer) -> Iterator[LiveBroker]:
    with live_broker(config_for(consumer.url, allowed_hosts=["GPU.example.org"])) as running:
        yield running


ROUTES = [
    ("POST", "/v1/tts"),
    ("GET", "/v1/status"),
    ("GET", "/v1/queue"),
    ("DELETE", "/v1/queue/1"),
    ("GET", "/audio/a.wav"),
    ("GET", "/"),
    ("GET", "/nowhere"),
    ("PATCH", "/v1/tts"),
]


def basic(text: str) -> str:
    """As a browser sends a name and a password."""
    return f"Authorization: Basic {base64.b64encode(text.encode()).decode()}"


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("Authorization: Bearer wrong-key-of-some-length",),
        ("Authorization: Bearer",),
        (f"Authorization: Basic {ALICE}",),
        (basic(f"{ALICE}:"),),
        (basic(ALICE),),
        (basic(":" + ALICE + "x"),),
        ("Authorization: Basic \xe9=",),
        (f"Authorization: {ALICE}",),
        (f"X-Api-Key: {ALICE}x",),
        (f"X-Api-Key: {ALICE[:-1]}",),
        (f"Cookie: key={ALICE}",),
    ],
)
def test_without_a_good_key_everything_is_a_401(
    guarded: LiveBroker,
    consumer: ScriptedConsumer,
    method: str,
    path: str,
    headers: tuple[str, ...],
) -> None:
    with guarded.raw() as client:
        got = client.request(method, path, b"", headers=headers).answer()
    assert got.status == 401
    assert b'"unauthorized"' in got.body
    assert (got.header("Www-Authenticate") or "").startswith("Bearer")
    assert ALICE.encode() not in got.raw
    assert consumer.requests == []


def test_a_browser_without_a_key_gets_the_page_that_asks_for_it(guarded: LiveBroker) -> None:
    reply = guarded.get("/", headers={"Accept": "text/html"})
    assert reply.status_code == 401
    assert "This broker wants a key" in reply.text
    assert guarded.get("/v1/status", headers={"Accept": "text/html"}).json()["error"]


def test_a_browser_asks_for_the_key_of_any_other_page(guarded: LiveBroker) -> None:
    page = {"Accept": "text/html,*/*;q=0.8"}
    told = guarded.get("/consumers/mvoice/", headers=page)
    assert (told.status_code, told.headers["WWW-Authenticate"]) == (401, 'Basic realm="gpumanager"')
    for kept in (guarded.get("/consumers/mvoice/"), guarded.post("/v1/tts", headers=page)):
        assert kept.headers["WWW-Authenticate"] == 'Bearer realm="gpumanager"'


def test_healthz_needs_no_key(guarded: LiveBroker) -> None:
    assert guarded.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        f"Authorization: Bearer {BOB}",
        f"authorization: bearer {BOB}",
        f"X-Api-Key: {BOB}",
        basic(f":{BOB}"),
        basic(f"whoever:{BOB}"),
    ],
)
def test_a_good_key_opens_and_is_never_forwarded(
    guarded: LiveBroker, consumer: ScriptedConsumer, header: str
) -> None:
    with guarded.raw() as client:
        assert client.request("POST", "/v1/tts", b"{}", headers=(header,)).answer().status == 200
    assert BOB.encode() not in consumer.requests[0].head


def test_without_keys_the_clients_own_authorization_goes_through(
    open_broker: LiveBroker, consumer: ScriptedConsumer
) -> None:
    open_broker.post("/v1/tts", headers={"Authorization": "Bearer for-the-consumer"})
    assert consumer.requests[0].header("authorization") == "Bearer for-the-consumer"


@pytest.mark.parametrize("key", ["clé-of-some-length", "ключ-of-some-length", "of-some-length-à"])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("header", ["Authorization: Bearer ", "X-Api-Key:"])
def test_a_key_may_have_any_letters(
    consumer: ScriptedConsumer, key: str, encoding: str, header: str
) -> None:
    try:
        sent = key.encode(encoding)
    except UnicodeEncodeError:
        return  # then no client sends it so
    with (
        live_broker(config_for(consumer.url), keys=[ApiKey("alice", key)]) as broker,
        broker.raw() as client,
    ):
        line = header.encode() + sent
        client.send(b"POST /v1/tts HTTP/1.1\r\nHost: localhost\r\n" + line + b"\r\n\r\n")
        assert client.answer().status == 200
        assert BrokerClient(broker.url, key).get("/v1/queue") == {"queue": []}


def test_a_keys_limit_is_its_own(guarded: LiveBroker, consumer: ScriptedConsumer) -> None:
    release = threading.Event()

    def slow(connection: Connection, _: Received) -> None:
        release.wait(PATIENCE_S)
        connection.send(answer())

    consumer.script = slow
    alice, bob = {"X-Api-Key": ALICE}, {"X-Api-Key": BOB}
    clients = []
    for count in (1, 2):
        clients.append(Outcome(lambda: guarded.post("/v1/tts", headers=alice)))
        guarded.await_line(count)
    refused = guarded.post("/v1/tts", headers=alice)
    assert (refused.status_code, refused.json()["error"]) == (503, "queue_full")
    clients.append(Outcome(lambda: guarded.post("/v1/tts", headers=bob)))
    guarded.await_line(3)
    release.set()
    assert [client.result().status_code for client in clients] == [200] * 3
    assert guarded.post("/v1/tts", headers=alice).status_code == 200


# -- browsers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8770", "127.0.0.1:1", "127.0.0.9", "[::1]:80", "gpu.example.org"],
)
def test_hosts_that_are_served(open_broker: LiveBroker, host: str) -> None:
    with open_broker.raw() as client:
        client.send(f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert client.answer().status == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "10.0.0.1", "169.254.169.254", "[::2]", "x:1"],
)
@pytest.mark.parametrize("line", ["GET /v1/status", "POST /v1/tts", "GET /healthz"])
def test_a_name_that_was_made_to_resolve_to_loopback_is_refused(
    open_broker: LiveBroker, consumer: ScriptedConsumer, host: str, line: str
) -> None:
    with open_broker.raw() as client:
        client.send(f"{line} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        got = client.answer()
    assert got.status == 403
    assert b'"forbidden"' in got.body
    assert consumer.requests == []


LAN = "192.168.1.5"


@pytest.mark.parametrize(
    ("client", "own", "host", "served"),
    [
        # From the machine itself, over its address in the network.
        (LAN, LAN, "evil.example", False),
        (LAN, LAN, "evil.example:8770", False),
        (LAN, LAN, "192.168.1.6", False),
        (LAN, LAN, LAN, True),
        (LAN, LAN, f"{LAN}:8770", True),
        (LAN, LAN, "localhost", True),
        (LAN, LAN, "gpu.example.org", True),
        ("fd00::5", "fd00::5", "[fd00:0:0::5]:8770", True),
        ("fd00::5", "fd00::5", "evil.example", False),
        # From another one.
        ("192.168.1.9", LAN, "box.lan", True),
        # From loopback.
        ("127.0.0.1", "127.0.0.1", LAN, False),
        ("127.0.0.1", "127.0.0.1", "127.0.0.1", True),
        # From a reverse proxy, by a Unix socket.
        ("localhost", None, "gpu.lan", True),
        # A server that does not tell its own address.
        (LAN, None, "box.lan", True),
    ],
)
def test_the_address_in_the_network_is_no_way_around_the_check_of_hosts(
    client: str, own: str | None, host: str, served: bool
) -> None:
    environ = {"REMOTE_ADDR": client, LOCAL_ADDRESS: own, "HTTP_HOST": host}
    refused = nullcontext() if served else pytest.raises(Forbidden, match="allowed_hosts")
    with refused:
        check_host(environ, frozenset({"gpu.example.org"}))


def test_the_server_tells_its_own_address(
    open_broker: LiveBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    def note(environ: dict[str, str], _: object) -> None:
        told.append(environ[LOCAL_ADDRESS])

    monkeypatch.setattr("gpumanager.web.security.check_host", note)
    assert open_broker.post("/v1/tts", data=b"{}").status_code == 200  # asked before the body
    assert open_broker.post("/v1/tts").status_code == 200
    assert told == ["127.0.0.1"] * 2


@pytest.mark.parametrize(
    "headers",
    [
        ("Origin: https://evil.example",),
        ("Origin: null",),
        ("Origin: http://localhost:1",),
        ("Origin: http://[",),
        ("Sec-Fetch-Site: cross-site",),
        ("Sec-Fetch-Site: same-site",),
    ],
)
@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/tts"), ("DELETE", "/v1/queue/1")])
def test_what_a_page_of_another_site_sends_is_refused(
    open_broker: LiveBroker,
    consumer: ScriptedConsumer,
    headers: tuple[str, ...],
    method: str,
    path: str,
) -> None:
    with open_broker.raw() as client:
        got = client.request(method, path, b"{}", headers=headers).answer()
    assert got.status == 403
    assert consumer.requests == []


@pytest.mark.parametrize(
    "headers", [("Origin: http://localhost",), ("Sec-Fetch-Site: same-origin",), ()]
)
def test_what_the_brokers_own_page_or_a_script_sends_is_not(
    open_broker: LiveBroker, headers: tuple[str, ...]
) -> None:
    with open_broker.raw() as client:
        assert client.request("POST", "/v1/tts", b"{}", headers=headers).answer().status == 200


def test_no_answer_invites_other_origins(open_broker: LiveBroker) -> None:
    reply = open_broker.get("/v1/status", headers={"Origin": "https://evil.example"})
    assert not [name for name in reply.headers if name.lower().startswith("access-control")]
