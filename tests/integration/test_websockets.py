"""WebSockets through the broker, over real sockets."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import trustme

from gpumanager.config import parse_config
from gpumanager.keys import ApiKey
from gpumanager.telemetry.events import WebsocketEnded
from tests.support.broker import LiveBroker, config_for, live_broker
from tests.support.ports import free_port
from tests.support.sockets import Connection, Received, Script, ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S, Outcome, eventually
from tests.support.websockets import (
    BINARY,
    CLOSE,
    KEY,
    PING,
    PONG,
    Message,
    Peer,
    Refused,
    echo,
    frame,
    handshake,
    open_websocket,
    switching,
    websocket_script,
)

MOUNT = "/consumers/mvoice"
KEYS = (ApiKey("anna", "sesame"),)


@contextmanager
def behind_broker(
    script: Script, *, tls: ssl.SSLContext | None = None, keys: Any = (), **changes: Any
) -> Iterator[tuple[LiveBroker, ScriptedConsumer]]:
    """A broker that passes what is below MOUNT on to a consumer."""
    with ScriptedConsumer(script, tls=tls) as consumer:
        path = changes.pop("base_path", "")
        with live_broker(config_for(consumer.url + path, **changes), keys=keys) as live:
            yield live, consumer


def ends(live: LiveBroker) -> list[WebsocketEnded]:
    """The ends of WebSockets from now on."""
    found: list[WebsocketEnded] = []
    live.broker.events.listen(
        lambda recorded: (
            found.append(recorded.event) if isinstance(recorded.event, WebsocketEnded) else None
        )
    )
    return found


@pytest.fixture
def echoing() -> Iterator[tuple[LiveBroker, ScriptedConsumer]]:
    with behind_broker(websocket_script(echo)) as both:
        yield both


# -- messages ------------------------------------------------------------------------------------


def test_messages_of_every_size_go_both_ways_unchanged(
    echoing: tuple[LiveBroker, ScriptedConsumer],
) -> None:
    live, _ = echoing
    with open_websocket(live.port, f"{MOUNT}/socket") as client:
        for size in (0, 1, 125, 126, 65535, 65536, 1_000_000):
            payload = bytes(i % 251 for i in range(size))
            sent = Outcome(lambda p=payload: client.send(p, BINARY))  # type: ignore[misc]
            assert client.receive() == Message(BINARY, payload, masked=False)
            sent.result()
        client.send(b"are you there", PING)
        assert client.receive() == Message(PING, b"are you there", masked=False)


def test_the_consumer_sees_the_handshake_and_its_own_address(
    echoing: tuple[LiveBroker, ScriptedConsumer],
) -> None:
    live, consumer = echoing
    headers = (
        "Sec-WebSocket-Protocol: a, b",
        "Sec-WebSocket-Extensions: permessage-deflate",
        "Cookie: c=1",
        f"Origin: http://localhost:{live.port}",
    )
    head = handshake(f"{MOUNT}/a/b?clientId=1%202", *headers).replace(
        b"Host: localhost", b"Host: localhost:%d" % live.port
    )
    with socket.create_connection(("127.0.0.1", live.port), PATIENCE_S) as sock:
        sock.sendall(head)
        assert sock.recv(65536).startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    (received,) = consumer.requests
    assert received.line == b"GET /a/b?clientId=1%202 HTTP/1.1"
    got = dict(received.headers)
    assert got["host"] == f"127.0.0.1:{consumer.port}"
    assert got["origin"] == consumer.url  # as if it had come from a page of the consumer's
    assert (got["upgrade"], got["connection"]) == ("websocket", "Upgrade")
    assert got["sec-websocket-key"] == KEY
    assert got["sec-websocket-version"] == "13"
    assert got["sec-websocket-protocol"] == "a, b"
    assert got["sec-websocket-extensions"] == "permessage-deflate"
    assert got["cookie"] == "c=1"


def test_the_head_of_the_answer_is_the_consumers() -> None:
    def script(connection: Connection, received: Received) -> None:
        connection.send(switching(received, "Sec-WebSocket-Protocol: b", "X-Own: yes"))
        connection.wait_closed()

    with (
        behind_broker(script) as (live, _),
        socket.create_connection(("127.0.0.1", live.port), PATIENCE_S) as sock,
    ):
        sock.sendall(handshake(f"{MOUNT}/x"))
        lines = sock.recv(65536).decode().lower().split("\r\n")
        assert lines[0] == "http/1.1 101 switching protocols"
        assert "upgrade: websocket" in lines
        assert [line for line in lines if line.startswith("connection:")] == ["connection: upgrade"]
        assert "sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=" in lines
        assert "sec-websocket-protocol: b" in lines
        assert "x-own: yes" in lines
        assert any(line.startswith("x-request-id: ") for line in lines)
        assert not any(line.startswith(("content-length", "transfer-encoding")) for line in lines)


def test_the_path_of_the_consumers_url_stands_before_its_paths() -> None:
    with behind_broker(websocket_script(echo), base_path="/base/") as (live, consumer):
        with open_websocket(live.port, f"{MOUNT}/socket?x=1") as client:
            client.send(b"hello")
            assert client.text() == b"hello"
        assert consumer.requests[0].line == b"GET /base/socket?x=1 HTTP/1.1"


def test_what_either_side_says_behind_its_head_is_not_lost() -> None:
    def script(connection: Connection, received: Received) -> None:
        connection.send(switching(received) + frame(b"welcome"))
        echo(Peer(connection.sock, connection.rest(), client=False))

    with behind_broker(script) as (live, _):
        ahead = frame(b"early", masked=True) + frame(b"bird", masked=True)
        with open_websocket(live.port, f"{MOUNT}/x", ahead=ahead) as client:
            assert [client.text() for _ in range(3)] == [b"welcome", b"early", b"bird"]


def test_a_consumer_behind_tls() -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with authority.cert_pem.tempfile() as ca_file:
        script = websocket_script(echo)
        more = {"ca_file": ca_file}
        with behind_broker(script, tls=context, consumer=more) as (live, consumer):
            ended = ends(live)
            with open_websocket(live.port, f"{MOUNT}/x") as client:
                for size in (10, 16_384, 500_000):
                    payload = b"x" * size
                    sent = Outcome(lambda p=payload: client.send(p))  # type: ignore[misc]
                    assert client.text() == payload
                    sent.result()
                client.send(b"\x03\xe8", CLOSE)
                message = client.receive()
                assert message is not None
                assert message.code == 1000
                assert client.receive() is None
            eventually(lambda: ended)
            assert consumer.requests[0].header("upgrade") == "websocket"


# -- ends ----------------------------------------------------------------------------------------


def test_a_close_goes_through_and_leaves_nothing_behind(
    echoing: tuple[LiveBroker, ScriptedConsumer], caplog: pytest.LogCaptureFixture
) -> None:
    live, _ = echoing
    ended = ends(live)
    caplog.set_level(logging.INFO)
    with open_websocket(live.port, f"{MOUNT}/x", "X-Request-Id: mine") as client:
        client.send(b"hello")
        assert client.text() == b"hello"
        assert len(live.broker.tunnels) == 1
        client.send(b"\x03\xe8bye", CLOSE)
        message = client.receive()
        assert message is not None
        assert (message.opcode, message.code) == (CLOSE, 1000)
        assert client.receive() is None
    eventually(lambda: ended and not len(live.broker.tunnels))
    (end,) = ended
    assert (end.consumer, end.request_id, end.address) == ("mvoice", "mine", "127.0.0.1")
    assert end.client_bytes == len(frame(b"hello", masked=True)) + len(frame(b"12345", masked=True))
    assert end.consumer_bytes == len(frame(b"hello")) + len(frame(b"12345"))
    assert end.reason == "the consumer ended it"
    logged = [vars(record) for record in caplog.records if record.name == "gpumanager.access"]
    (line,) = [fields for fields in logged if fields["path"] == f"{MOUNT}/x"]
    assert (line["status"], line["consumer"], line["request_id"]) == (101, "mvoice", "mine")
    metrics = live.get("/metrics").text
    assert 'gpumanager_websockets_open{consumer="mvoice"} 0.0' in metrics
    assert 'gpumanager_websockets_total{consumer="mvoice"} 1.0' in metrics
    counted = 'gpumanager_websocket_bytes_total{consumer="mvoice",sender="client"}'
    assert f"{counted} {end.client_bytes}.0" in metrics


def test_each_side_may_go_on_for_a_while_after_the_other_has_ended() -> None:
    heard: list[Message | None] = []

    def talk(peer: Peer) -> None:
        while heard[-1:] != [None]:
            heard.append(peer.receive())
        peer.send(b"a last word")

    with behind_broker(websocket_script(talk)) as (live, _):
        with open_websocket(live.port, f"{MOUNT}/x") as client:
            client.send(b"that is all")
            client.sock.shutdown(socket.SHUT_WR)
            assert client.text() == b"a last word"
            assert client.receive() is None
        assert heard == [Message(1, b"that is all", masked=True), None]
        eventually(lambda: not len(live.broker.tunnels))


@pytest.mark.parametrize("who", ["client", "consumer"])
def test_one_that_breaks_off_ends_the_other(who: str) -> None:
    gone = threading.Event()

    def talk(peer: Peer) -> None:
        peer.text()
        if who == "consumer":
            Connection(peer.sock).reset()
        else:
            assert peer.receive() is None
            gone.set()

    with behind_broker(websocket_script(talk)) as (live, _):
        ended = ends(live)
        with open_websocket(live.port, f"{MOUNT}/x") as client:
            client.send(b"hello")
            if who == "client":
                Connection(client.sock).reset()
                assert gone.wait(PATIENCE_S)
            else:
                assert client.receive() is None
        eventually(lambda: ended)
        assert ended[0].reason == f"the {who} ended it"


def test_a_side_that_does_not_read_holds_up_the_other_and_nobody_else() -> None:
    """Nothing piles up in the broker: who sends has to wait, as if there were no broker."""
    sent = 0
    may_read = threading.Event()

    def talk(peer: Peer) -> None:
        nonlocal sent
        if peer.text() != b"flood":
            peer.send(b"here")
            peer.receive()
            return
        peer.sock.settimeout(0.5)
        piece = frame(b"x" * 65_000, BINARY)
        try:
            while sent < 1_000_000_000:
                sent += peer.sock.send(piece[sent % len(piece) :])
        except TimeoutError:
            pass
        may_read.set()
        peer.sock.settimeout(PATIENCE_S)
        rest = piece[sent % len(piece) :] if sent % len(piece) else b""
        peer.sock.sendall(rest + frame(b"done"))
        peer.receive()

    with (
        behind_broker(websocket_script(talk)) as (live, _),
        open_websocket(live.port, f"{MOUNT}/x") as flooded,
    ):
        flooded.send(b"flood")
        with open_websocket(live.port, f"{MOUNT}/x") as other:
            other.send(b"are you there")
            assert other.text() == b"here"
        assert may_read.wait(PATIENCE_S)
        assert sent < 50_000_000  # what two sockets hold, and 64 KiB
        count = 0
        while (message := flooded.receive()) is not None and message.opcode == BINARY:
            count += len(message.payload)
        assert message is not None
        assert message.payload == b"done"
        assert count >= sent - 65_000


@pytest.mark.timeout(60)
def test_a_thousand_idle_ones_are_harmless() -> None:
    """They hold no thread, and a message takes no longer for them."""
    many = 1000
    with behind_broker(idling(), max_websockets=many + 1) as (live, _), ExitStack() as stack:
        before = threading.active_count()
        for _ in range(many):
            stack.enter_context(open_websocket(live.port, f"{MOUNT}/x"))
        assert len(live.broker.tunnels) == many
        mine = [t for t in threading.enumerate() if t.name == "websockets"]
        assert len(mine) == 1
        waitress_threads = [t for t in threading.enumerate() if t.name.startswith("waitress")]
        assert len(waitress_threads) <= 24
        assert threading.active_count() - before < 60
        client = stack.enter_context(open_websocket(live.port, f"{MOUNT}/x"))
        for _ in range(100):
            client.send(b"quick")
            assert client.text() == b"quick"
        assert live.get("/healthz").status_code == 200
        with pytest.raises(Refused) as refused:
            open_websocket(live.port, f"{MOUNT}/x")
        assert refused.value.status == 503
    assert not [t for t in threading.enumerate() if t.name == "websockets"]


def idling() -> Script:
    """Answers what is said by one thread for all: a thousand threads would be the test's own."""
    import selectors

    selector = selectors.DefaultSelector()

    def serve() -> None:
        while True:
            for key, _ in selector.select():
                try:
                    message = key.data.receive()
                    if message is not None:
                        key.data.send(message.payload, message.opcode)
                        continue
                except (OSError, AssertionError):
                    pass
                selector.unregister(key.fileobj)
                key.data.sock.close()

    threading.Thread(target=serve, name="idling", daemon=True).start()

    def script(connection: Connection, received: Received) -> None:
        connection.send(switching(received))
        sock = connection.sock.dup()
        selector.register(sock, selectors.EVENT_READ, Peer(sock, client=False))

    return script


def test_the_drain_says_good_bye_to_both_sides() -> None:
    said: list[Message | None] = []

    def talk(peer: Peer) -> None:
        peer.send(peer.text())
        said.append(peer.receive())
        said.append(peer.receive())

    with behind_broker(websocket_script(talk)) as (live, _):
        ended = ends(live)
        with open_websocket(live.port, f"{MOUNT}/x") as client:
            client.send(b"hello")
            assert client.text() == b"hello"
            draining = Outcome(live.broker.lifecycle.drain)
            message = client.receive()
            assert message is not None
            assert (message.code, message.masked) == (1001, False)
            assert client.receive() is None
            with pytest.raises(Refused) as refused:
                open_websocket(live.port, f"{MOUNT}/x")
            assert refused.value.status == 503
            assert b"shutting_down" in refused.value.rest
        assert draining.result()
        eventually(lambda: len(said) == 2)
        assert said[0] is not None
        assert (said[0].code, said[0].masked) == (1001, True)
        assert said[1] is None
        assert [end.reason for end in ended] == ["the broker shuts down"]


def test_the_drain_waits_for_the_end_of_a_frame() -> None:
    """Within one it could not be told from the message."""
    half_sent, go_on = threading.Event(), threading.Event()
    message = frame(b"y" * 10_000)

    def talk(peer: Peer) -> None:
        peer.sock.sendall(message[:5000])
        half_sent.set()
        assert go_on.wait(PATIENCE_S)
        peer.sock.sendall(message[5000:])
        assert peer.receive() is not None

    with (
        behind_broker(websocket_script(talk)) as (live, _),
        open_websocket(live.port, f"{MOUNT}/x") as client,
    ):
        assert half_sent.wait(PATIENCE_S)
        while len(client.buffer) < 5000:
            client.buffer += client.sock.recv(65536)
        draining = Outcome(live.broker.lifecycle.drain)
        eventually(lambda: live.get("/healthz").status_code == 503)
        go_on.set()
        assert client.text() == b"y" * 10_000
        last = client.receive()
        assert last is not None
        assert last.code == 1001
        assert draining.result()


def silent(peer: Peer) -> None:
    Connection(peer.sock).wait_closed()


def test_the_drain_does_not_wait_for_one_that_says_nothing() -> None:
    with (
        behind_broker(websocket_script(silent)) as (live, _),
        open_websocket(live.port, f"{MOUNT}/x") as client,
    ):
        assert live.broker.lifecycle.drain()  # it has two seconds
        message = client.receive()
        assert message is not None
        assert message.code == 1001


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        ("consumers: {}\nrouting: {}\n", "the consumer was removed from the config"),
        (
            config_for("http://127.0.0.1:9", audio_proxy=None),
            "the consumer has another address now",
        ),
    ],
)
def test_a_reload_closes_those_of_a_consumer_that_is_no_longer_there(new: str, reason: str) -> None:
    with behind_broker(websocket_script(echo), audio_proxy=None) as (live, _):
        ended = ends(live)
        live.broker.reloading.read = lambda: parse_config(new)
        with open_websocket(live.port, f"{MOUNT}/x") as client:
            assert live.post("/v1/reload").status_code == 200
            message = client.receive()
            assert message is not None
            assert message.code == 1001
            assert client.receive() is None
        eventually(lambda: ended)
        assert ended[0].reason == reason


# -- who may, and what else may come back --------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (("Origin: https://evil.example",), 403),
        (("Origin: null",), 403),
        (("Sec-Fetch-Site: cross-site",), 403),
        (("Origin: http://localhost",), 101),
    ],
)
def test_a_page_of_another_site_opens_none(
    echoing: tuple[LiveBroker, ScriptedConsumer], headers: tuple[str, ...], status: int
) -> None:
    live, consumer = echoing
    assert status_of(live, *headers) == status
    assert len(consumer.requests) == (status == 101)


def status_of(live: LiveBroker, *headers: str) -> int:
    try:
        open_websocket(live.port, f"{MOUNT}/x", *headers).sock.close()
    except Refused as refused:
        return refused.status
    return 101


def test_it_takes_a_key_where_there_are_keys() -> None:
    with behind_broker(websocket_script(echo), keys=KEYS) as (live, consumer):
        ended = ends(live)
        assert status_of(live) == 401
        assert status_of(live, "X-Api-Key: wrong") == 401
        assert not consumer.requests
        assert status_of(live, "Authorization: Bearer sesame") == 101
        assert consumer.requests[0].header("authorization") is None
        eventually(lambda: ended)
        assert (ended[0].client, ended[0].key) == ("anna", "anna")


def test_a_refusal_of_the_consumers_is_a_normal_answer_and_the_connection_goes_on() -> None:
    def script(connection: Connection, received: Received) -> None:
        connection.send(answer(b"no such room", "404 Not Found"))

    with behind_broker(script) as (live, _), live.raw() as client:
        second = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        client.send(handshake(f"{MOUNT}/x") + second)
        first, _, then = client.until(b'"ok"').partition(b"no such room")
        assert first.startswith(b"HTTP/1.1 404 Not Found\r\n")
        assert then.startswith(b"HTTP/1.1 200 OK\r\n")
        assert not len(live.broker.tunnels)


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\r\n",
        b"HTTP/1.1 101\r\n\r\n",
    ],
)
def test_a_switch_to_anything_else_is_refused(said: bytes) -> None:
    with behind_broker(lambda connection, _: connection.send(said)) as (live, _):
        with pytest.raises(Refused) as refused:
            open_websocket(live.port, f"{MOUNT}/x")
        assert refused.value.status == 502
        assert b"does not switch to websocket" in refused.value.rest
        eventually(lambda: not len(live.broker.tunnels))


def test_a_consumer_that_is_not_there() -> None:
    with live_broker(config_for(f"http://127.0.0.1:{free_port()}")) as live:
        with pytest.raises(Refused) as refused:
            open_websocket(live.port, f"{MOUNT}/x")
        assert refused.value.status == 502
        eventually(lambda: not len(live.broker.tunnels))


@pytest.mark.parametrize(
    "change",
    [
        (b"Upgrade: websocket", b"Upgrade: h2c"),
        (b"Upgrade: websocket", b"Upgrade: spdy/3"),
        (b"Connection: Upgrade", b"Connection: keep-alive"),
        (b"HTTP/1.1", b"HTTP/1.0"),
        (b"GET ", b"HEAD "),
        (b"Connection: Upgrade", b"Connection: Upgrade\r\nContent-Length: 5"),
    ],
)
def test_an_upgrade_to_anything_else_is_plain_http(change: tuple[bytes, bytes]) -> None:
    with behind_broker(lambda c, _: c.send(answer(b"plain"))) as (live, consumer):
        with live.raw() as client:
            client.send(handshake(f"{MOUNT}/x").replace(*change) + b"abcde")
            assert b" 200 OK\r\n" in client.until(b"\r\n\r\n")
        (received,) = consumer.requests
        assert received.header("upgrade") is None
        assert received.header("connection") == "close"


def test_gpu_work_takes_its_turn_and_opens_none() -> None:
    """There is no telling when a job that is a conversation would be over."""
    work = {"gpu_work": [{"path": "/x", "method": "GET"}]}
    with behind_broker(lambda c, _: c.send(answer(b"plain")), consumer=work) as (live, consumer):
        with pytest.raises(Refused) as refused:
            open_websocket(live.port, f"{MOUNT}/x")
        assert (refused.value.status, refused.value.rest) == (200, b"plain")
        assert consumer.requests[0].header("upgrade") is None
        live.await_idle()
        assert live.get("/v1/status").json()["scheduler"]["total_jobs"] == 1


def test_a_port_of_its_own_has_them_too() -> None:
    port = free_port()
    ports = {port: "mvoice"}
    with behind_broker(websocket_script(echo), ports=ports) as (_, consumer):
        origin = f"Origin: http://localhost:{port}"
        with pytest.raises(Refused):
            open_websocket(port, "/ws", origin)  # its Host is localhost
        with open_websocket(port, "/ws?clientId=1", "Origin: http://localhost") as client:
            client.send(b"hello")
            assert client.text() == b"hello"
        assert consumer.requests[0].line == b"GET /ws?clientId=1 HTTP/1.1"
        assert consumer.requests[0].header("origin") == consumer.url


def test_no_more_than_max_websockets() -> None:
    with (
        behind_broker(websocket_script(echo), max_websockets=2) as (live, _),
        open_websocket(live.port, f"{MOUNT}/x"),
        open_websocket(live.port, f"{MOUNT}/x") as second,
    ):
        with pytest.raises(Refused) as refused:
            open_websocket(live.port, f"{MOUNT}/x")
        assert refused.value.status == 503
        assert "retry-after: 1" in refused.value.head.lower()
        assert b"2 WebSockets are open; max_websockets allows no more" in refused.value.rest
        second.sock.close()
        eventually(lambda: len(live.broker.tunnels) == 1)
        with open_websocket(live.port, f"{MOUNT}/x") as third:
            third.send(b"hello")
            assert third.text() == b"hello"


def test_a_client_that_leaves_during_the_handshake_leaves_nothing_behind() -> None:
    asked, gone = threading.Event(), threading.Event()

    def script(connection: Connection, received: Received) -> None:
        asked.set()
        if connection.wait_closed():
            gone.set()

    patient = {"timeouts": {"first_byte": 60, "total": 120}}
    with behind_broker(script, consumer=patient) as (live, _):
        with socket.create_connection(("127.0.0.1", live.port)) as sock:
            sock.sendall(handshake(f"{MOUNT}/x"))
            assert asked.wait(PATIENCE_S)
            assert len(live.broker.tunnels) == 1
        assert gone.wait(PATIENCE_S)
        eventually(lambda: not len(live.broker.tunnels))


def test_jobs_go_on_beside_it(echoing: tuple[LiveBroker, ScriptedConsumer]) -> None:
    """The connection has left the server: its number of connections, its loop, its threads."""
    live, _ = echoing
    with open_websocket(live.port, f"{MOUNT}/x") as client:
        eventually(lambda: not [c for c in live.channels.values() if c.addr[1] == port_of(client)])
        client.send(b"still here", PONG)
        assert client.receive() == Message(PONG, b"still here", masked=False)
        assert live.get("/healthz").status_code == 200


def port_of(client: Peer) -> int:
    return int(client.sock.getsockname()[1])
