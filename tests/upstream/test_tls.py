"""Consumers behind TLS, with certificates of an authority of their own."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
import trustme

from gpumanager.clock import SystemClock
from gpumanager.config import Timeouts
from gpumanager.errors import ClientGone, ConsumerTimeout, ConsumerUnreachable
from gpumanager.upstream.exchange import Exchange, Outbound
from gpumanager.upstream.watcher import Watcher
from gpumanager.upstream.wire import connect, trust
from tests.support.broker import config_for, live_broker
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S, Outcome


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> Path:
    file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(file)
    return file


@pytest.fixture
def tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


def echo(connection: Connection, received: Received) -> None:
    connection.send(answer(received.body))


@pytest.fixture
def consumer(tls: ssl.SSLContext) -> Iterator[ScriptedConsumer]:
    with ScriptedConsumer(echo, tls=tls) as running:
        yield running


def exchange(url: str, ca_file: Path | None, body: bytes = b"{}") -> Exchange:
    file = None if ca_file is None else str(ca_file)
    outbound = Outbound("POST", url, "/", [], body, len(body), file)
    timeouts = Timeouts(connect=2, first_byte=5, idle=5, total=10)
    return Exchange("it", outbound, timeouts, Watcher(), SystemClock())


def answered(one: Exchange) -> bytes:
    parts = []
    with closing(one):
        one.send()
        while chunk := one.read():
            parts.append(chunk)
    return b"".join(parts)


# -- whom it trusts ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 1024 * 1024])
def test_a_consumer_with_a_certificate_of_ones_own_authority(
    consumer: ScriptedConsumer, ca_file: Path, size: int
) -> None:
    changes = {
        "ca_file": str(ca_file),
        "health": "/health",
        "unload": "/unload",
        "paths": {"stt": "/x"},
    }
    text = config_for(consumer.url, consumer=changes, routing={"stt": "mvoice"})
    with live_broker(text) as broker:
        body = bytes(size)
        assert broker.post("/v1/stt", data=body).content == body
        assert broker.post("/v1/consumers/mvoice/unload").status_code == 200  # its calls, too
        assert broker.broker.registry.get("mvoice").healthy


def test_one_that_nobody_vouches_for_is_not_spoken_to(consumer: ScriptedConsumer) -> None:
    with pytest.raises(ConsumerUnreachable, match="certificate that is not trusted: unable to get"):
        answered(exchange(consumer.url, None))
    assert consumer.requests == []


def test_a_certificate_for_another_host_is_not_trusted(
    authority: trustme.CA, ca_file: Path
) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("elsewhere.example").configure_cert(context)
    with (
        ScriptedConsumer(echo, tls=context) as consumer,
        pytest.raises(ConsumerUnreachable, match="not trusted: IP address mismatch"),
    ):
        answered(exchange(consumer.url, ca_file))


def test_the_environments_certificates_are_used_where_the_config_names_none(
    consumer: ScriptedConsumer, ca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(ca_file))
    assert answered(exchange(consumer.url, None)) == b"{}"


def test_a_file_that_was_changed_is_read_again(
    consumer: ScriptedConsumer, ca_file: Path, authority: trustme.CA
) -> None:
    trustme.CA().cert_pem.write_to_path(ca_file)
    with pytest.raises(ConsumerUnreachable, match="not trusted"):
        answered(exchange(consumer.url, ca_file))
    authority.cert_pem.write_to_path(ca_file)
    assert answered(exchange(consumer.url, ca_file)) == b"{}"
    ca_file.unlink()
    with pytest.raises(ConsumerUnreachable, match="no certificates in its ca_file: No such file"):
        answered(exchange(consumer.url, ca_file))


# -- what comes over it --------------------------------------------------------------------------


@pytest.mark.parametrize("framing", ["length", "until close"])
def test_after_an_abort_nothing_is_taken_for_content(
    consumer: ScriptedConsumer, ca_file: Path, framing: str
) -> None:
    """The peer's records that lie unread then are encrypted: they must not be relayed."""
    sent, done = threading.Event(), threading.Event()

    def script(connection: Connection, _: Received) -> None:
        field = b"Content-Length: 9000000\r\n" if framing == "length" else b""
        connection.send(b"HTTP/1.1 200 OK\r\n%b\r\n" % field + b"a" * 100_000)
        sent.set()
        done.wait(PATIENCE_S)

    consumer.script = script
    with closing(exchange(consumer.url, ca_file)) as one:
        one.send()
        assert sent.wait(PATIENCE_S)
        assert set(one.read()) == {ord("a")}
        one.abort(ClientGone("left"))
        with pytest.raises(ClientGone):
            one.read()
        done.set()


def test_a_connection_that_is_shut_still_decrypts(tls: ssl.SSLContext, ca_file: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sent = Outcome(lambda: sends_records(tls, listener.accept()[0]))
        port = listener.getsockname()[1]
        wire = connect("127.0.0.1", port, timeout=5, tls=trust(str(ca_file)))
        with closing(wire):
            wire.shake_hands()
            assert wire.receive(1) == b"a"
            sent.result()
            wire.shut()
            came = b""
            with suppress(ssl.SSLError):
                while data := wire.receive(65536):
                    came += data
            assert set(came) <= {ord("a")}


def sends_records(tls: ssl.SSLContext, sock: socket.socket) -> None:
    with tls.wrap_socket(sock, server_side=True) as speaking:
        speaking.sendall(b"a" * 100_000)


def test_an_abort_is_seen_by_a_reader_that_waits(consumer: ScriptedConsumer, ca_file: Path) -> None:
    def script(connection: Connection, _: Received) -> None:
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\na")
        connection.wait_closed(PATIENCE_S)

    consumer.script = script
    with closing(exchange(consumer.url, ca_file)) as one:
        one.send()
        assert one.read() == b"a"
        waiting = Outcome(one.read)
        one.abort(ClientGone("left"))
        with pytest.raises(ClientGone):
            waiting.result(2)


def test_an_abort_ends_a_handshake_that_never_ends(ca_file: Path) -> None:
    """A server that takes the connection and says nothing."""
    taken = threading.Event()

    class Silent(ScriptedConsumer):
        def _serve(self, sock: object) -> None:
            taken.set()

    with Silent(echo) as consumer:
        one = exchange(consumer.url.replace("http", "https"), ca_file)
        sending = Outcome(one.send)
        assert taken.wait(PATIENCE_S)
        one.abort(ClientGone("left"))
        with pytest.raises(ClientGone):
            sending.result(1.5)  # less than the time-out of the connection


def test_a_handshake_that_never_ends_is_a_time_out(ca_file: Path) -> None:
    class Silent(ScriptedConsumer):
        def _serve(self, sock: object) -> None:
            pass

    with Silent(echo) as consumer, pytest.raises(ConsumerTimeout, match="no connection within 2 s"):
        exchange(consumer.url.replace("http", "https"), ca_file).send()


def test_a_connection_that_is_cut_is_not_the_end_of_an_answer(
    consumer: ScriptedConsumer, ca_file: Path
) -> None:
    """Without a length only TLS itself says that the end is the end."""

    def script(connection: Connection, _: Received) -> None:
        connection.send(b"HTTP/1.1 200 OK\r\n\r\nall of it?")  # and closes without close_notify

    consumer.script = script
    with pytest.raises(ConsumerUnreachable, match="cut the connection"):
        answered(exchange(consumer.url, ca_file))


def test_a_connection_that_is_ended_properly_is(consumer: ScriptedConsumer, ca_file: Path) -> None:
    def script(connection: Connection, _: Received) -> None:
        connection.send(b"HTTP/1.1 200 OK\r\n\r\nall of it")
        assert isinstance(connection.sock, ssl.SSLSocket)
        connection.sock.unwrap()

    consumer.script = script
    assert answered(exchange(consumer.url, ca_file)) == b"all of it"


def test_interim_and_early_answers_come_through_while_a_body_is_being_sent(
    consumer: ScriptedConsumer, ca_file: Path
) -> None:
    receive = Connection.receive

    def hinting(connection: Connection) -> Received | None:
        while b"\r\n\r\n" not in connection._buffer:
            connection._buffer += connection.sock.recv(1024)
        connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        return receive(connection)

    body = bytes(range(256)) * 40_000
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Connection, "receive", hinting)
        assert answered(exchange(consumer.url, ca_file, body)) == body

    def early(connection: Connection) -> Received | None:
        while b"\r\n\r\n" not in connection._buffer:
            connection._buffer += connection.sock.recv(1024)
        connection.send(answer(b"too much", "413 Content Too Large"))
        done.wait(PATIENCE_S)  # and reads nothing more
        return None

    done = threading.Event()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Connection, "receive", early)
        assert answered(exchange(consumer.url, ca_file, body)) == b"too much"
        done.set()
