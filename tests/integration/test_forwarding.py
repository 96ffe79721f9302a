"""Forwarding over real sockets: what arrives at the consumer, what comes back, and when."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.broker import LiveBroker, config_for, live_broker
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S


def echo(connection: Connection, received: Received) -> None:
    connection.send(answer(received.body, headers=("Content-Type: application/octet-stream",)))


@pytest.fixture
def consumer() -> Iterator[ScriptedConsumer]:
    with ScriptedConsumer(echo) as running:
        yield running


@pytest.fixture
def broker(consumer: ScriptedConsumer) -> Iterator[LiveBroker]:
    with live_broker(config_for(consumer.url)) as running:
        yield running


def test_the_job_goes_to_the_consumers_own_path(
    broker: LiveBroker, consumer: ScriptedConsumer
) -> None:
    assert broker.post("/v1/stt", data=b"abc").content == b"abc"
    assert consumer.requests[0].line == b"POST /api/stt HTTP/1.1"


@pytest.mark.parametrize(
    "query", ["a=1&b=%2f%2F&c=+%20&&=", "q=%zz&x='\"<>[]{}|^`", "?", "a?b=c/../d", "%ff%00"]
)
def test_the_query_arrives_to_the_letter(
    broker: LiveBroker, consumer: ScriptedConsumer, query: str
) -> None:
    with broker.raw() as client:
        assert client.request("POST", f"/v1/tts?{query}", b"x").answer().status == 200
    assert consumer.requests[0].line == f"POST /api/tts?{query} HTTP/1.1".encode()


@pytest.mark.parametrize("query", ["a=\x0f", "a=\x7f", "a=\x01&b"])
@pytest.mark.parametrize("path", ["/v1/tts", "/audio/a.wav"])
def test_a_query_that_cannot_be_sent_is_the_clients_fault(
    broker: LiveBroker, consumer: ScriptedConsumer, path: str, query: str
) -> None:
    method = "GET" if "audio" in path else "POST"
    for _ in range(4):  # and opens no breaker
        with broker.raw() as client:
            got = client.request(method, f"{path}?{query}").answer()
        assert got.status == 400
        assert b'"bad_request"' in got.body
    assert consumer.requests == []
    assert broker.stats.total_jobs == 0


def test_a_path_with_a_query_of_its_own_keeps_it() -> None:
    with ScriptedConsumer(echo) as consumer:
        changes = {"paths": {"tts": "/sleep?level=1"}}
        with live_broker(config_for(consumer.url + "/base/", consumer=changes)) as broker:
            broker.post("/v1/tts?mode=wait", data=b"x")
            broker.post("/v1/tts", data=b"x")
        assert consumer.requests[0].line == b"POST /base/sleep?level=1&mode=wait HTTP/1.1"
        assert consumer.requests[1].line == b"POST /base/sleep?level=1 HTTP/1.1"


def test_the_routes_method_replaces_the_clients() -> None:
    with ScriptedConsumer(echo) as consumer:
        changes = {"paths": {"tts": {"path": "/speak", "method": "PUT"}}}
        with live_broker(config_for(consumer.url, consumer=changes)) as broker:
            broker.post("/v1/tts", data=b"x")
        assert consumer.requests[0].line == b"PUT /speak HTTP/1.1"


def test_end_to_end_headers_go_through_and_nothing_is_added(
    broker: LiveBroker, consumer: ScriptedConsumer
) -> None:
    with broker.raw() as client:
        client.request(
            "POST",
            "/v1/tts",
            b"{}",
            headers=(
                "Authorization: Bearer abc",
                "Accept: text/event-stream",
                "Accept-Encoding: zstd, gzip;q=0.5",
                "Content-Type: application/json; charset=utf-8",
                "Cookie: a=1; b=2",
                "User-Agent: shell/1",
                "X-Forwarded-For: 10.1.2.3",
                "X-Twice: one",
                "X-Twice: two",
                "X-Request-Id: my-id_7",
                "Connection: keep-alive, X-Hop",
                "X-Hop: dropped",
                "Keep-Alive: timeout=5",
                "TE: trailers",
                "Proxy-Authorization: Basic abc",
                "Upgrade: h2c",
            ),
        ).answer()
    assert sorted(consumer.requests[0].headers) == sorted(
        [
            ("host", f"127.0.0.1:{consumer.port}"),
            ("connection", "close"),
            ("content-length", "2"),
            ("authorization", "Bearer abc"),
            ("accept", "text/event-stream"),
            ("accept-encoding", "zstd, gzip;q=0.5"),
            ("content-type", "application/json; charset=utf-8"),
            ("cookie", "a=1; b=2"),
            ("user-agent", "shell/1"),
            ("x-forwarded-for", "10.1.2.3"),
            ("x-twice", "one, two"),
            ("x-request-id", "my-id_7"),
        ]
    )


def test_without_user_agent_and_accept_encoding_none_are_made_up(
    broker: LiveBroker, consumer: ScriptedConsumer
) -> None:
    with broker.raw() as client:
        client.request("POST", "/v1/tts", b"x").answer()
    names = {name for name, _ in consumer.requests[0].headers}
    assert names == {"host", "connection", "content-length", "x-request-id"}


def test_a_body_of_any_size_arrives_byte_for_byte(broker: LiveBroker) -> None:
    for size in (0, 1, 65536, 3 * 1024 * 1024 + 17):
        body = bytes(range(256)) * (size // 256) + bytes(size % 256)
        assert broker.post("/v1/stt", data=body).content == body


def test_a_chunked_upload_arrives_with_its_length(
    broker: LiveBroker, consumer: ScriptedConsumer
) -> None:
    reply = broker.post("/v1/stt", data=iter([b"abc", b"defg"]))
    assert reply.content == b"abcdefg"
    assert consumer.requests[0].header("transfer-encoding") is None
    assert consumer.requests[0].header("content-length") == "7"


def test_a_post_without_a_body_says_so(broker: LiveBroker, consumer: ScriptedConsumer) -> None:
    with broker.raw() as client:
        assert client.request("POST", "/v1/tts").answer().status == 200
    assert consumer.requests[0].header("content-length") == "0"


def test_repeated_headers_and_encoded_bytes_come_back_unchanged(
    broker: LiveBroker, consumer: ScriptedConsumer
) -> None:
    gzipped = b"\x1f\x8b not really, and nobody must look"
    consumer.script = lambda connection, _: connection.send(
        answer(
            gzipped,
            headers=(
                "Content-Encoding: gzip",
                "Content-Type: text/plain",
                "Set-Cookie: a=1; Path=/",
                "Set-Cookie: b=2; Path=/",
                "Server: consumer/1",
                "Keep-Alive: timeout=5",
                "Connection: keep-alive, X-Hop",
                "X-Hop: dropped",
                'ETag: "abc"',
                "X-Request-Id: the-consumers-own",
            ),
        )
    )
    with broker.raw() as client:
        got = client.request("POST", "/v1/tts", b"{}", headers=("X-Request-Id: mine",)).answer()
    assert got.body == gzipped
    assert got.all("Set-Cookie") == ["a=1; Path=/", "b=2; Path=/"]
    assert got.header("Content-Encoding") == "gzip"
    assert got.header("Server") == "consumer/1"
    assert got.header("Etag") == '"abc"'
    assert got.all("X-Request-Id") == ["mine"]
    assert got.header("X-Hop") is None
    assert got.header("Keep-Alive") is None


@pytest.mark.parametrize(
    "status", ["201 Created", "404 Not Found", "422 Odd", "500 Oops", "503 No"]
)
def test_the_consumers_own_errors_pass_verbatim(
    broker: LiveBroker, consumer: ScriptedConsumer, status: str
) -> None:
    consumer.script = lambda connection, _: connection.send(answer(b'{"mine": 1}', status))
    with broker.raw() as client:
        got = client.request("POST", "/v1/tts", b"{}").answer()
    assert got.status == int(status[:3])
    assert got.body == b'{"mine": 1}'


@pytest.mark.parametrize(
    ("sent", "body", "expected"),
    [
        ("X-A: one\r\n  two", b"ok", {"X-A": "one two"}),
        ("X-A: nul\0", b"ok", {"X-A": "nul"}),
        ("X(A): x\r\nX-B: y", b"ok", {"X-B": "y", "X(A)": None}),
        ("X-A: gr\xfc\xdfe", b"ok", {"X-A": "gr\xfc\xdfe"}),
        ("Content-Length: 2\r\nContent-Length: 2", b"ok", {"Content-Length": "2"}),
        ("Content-Length: 2, 2", b"ok", {"Content-Length": "2"}),
        ("Content-Length : 2", b"ok and more", {"Content-Length": "2"}),
        ("X-A: esc\x1b[2Japed", b"ok", {"X-A": "esc [2Japed"}),
        ("X-A: a\rSet-Cookie: b=1", b"ok", {"X-A": "a Set-Cookie: b=1", "Set-Cookie": None}),
        (
            "Content-Length: 99\r\nTransfer-Encoding: chunked",
            b"2\r\nok\r\n0\r\nX-Trailer: t\r\n\r\n",
            {"Content-Length": None, "X-Trailer": None},
        ),
        ("Via: 1.0 old", b"ok", {"X-A": None}),
    ],
)
def test_odd_headers_of_a_consumer(
    broker: LiveBroker,
    consumer: ScriptedConsumer,
    sent: str,
    body: bytes,
    expected: dict[str, str | None],
) -> None:
    head = f"HTTP/1.1 200 OK\r\n{sent}\r\n\r\n".encode("latin-1")
    consumer.script = lambda connection, _: connection.send(head + body)
    with broker.raw() as client:
        got = client.request("POST", "/v1/tts", b"{}").answer()
    assert (got.status, got.body, got.complete) == (200, b"ok", True)
    for name, value in expected.items():
        assert got.header(name) == value
    assert len(got.all("Content-Length")) <= 1


@pytest.mark.parametrize("path", ["/audio/a.wav", "/audio/b.wav?x"])
def test_head_of_audio_tells_the_length_without_the_body(
    broker: LiveBroker, consumer: ScriptedConsumer, path: str
) -> None:
    consumer.script = lambda connection, _: connection.send(
        b"HTTP/1.1 200 OK\r\nContent-Type: audio/wav\r\nContent-Length: 48172\r\n\r\n"
    )
    with broker.raw() as client:
        got = client.request("HEAD", path).answer(head_only=True)
        assert (got.status, got.header("Content-Length")) == (200, "48172")
        # The connection stays usable: nothing of a body was sent.
        client.buffer = b""
        assert client.request("HEAD", path).answer(head_only=True).status == 200
    assert consumer.requests[0].line == f"HEAD {path} HTTP/1.1".encode()


def test_interim_answers_are_skipped(broker: LiveBroker, consumer: ScriptedConsumer) -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
    consumer.script = lambda connection, _: connection.send(interim + answer(b"real"))
    with broker.raw() as client:
        got = client.request("POST", "/v1/tts", b"{}").answer()
    assert (got.status, got.body, got.header("Link")) == (200, b"real", None)


def test_a_redirect_is_not_followed(broker: LiveBroker, consumer: ScriptedConsumer) -> None:
    consumer.script = lambda connection, _: connection.send(
        answer(b"", "302 Found", headers=("Location: /elsewhere",))
    )
    reply = broker.post("/v1/tts", data=b"{}", allow_redirects=False)
    assert (reply.status_code, reply.headers["Location"]) == (302, "/elsewhere")
    assert len(consumer.requests) == 1


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
def test_answers_without_a_body(
    broker: LiveBroker, consumer: ScriptedConsumer, status: str
) -> None:
    head = f'HTTP/1.1 {status}\r\nETag: "x"\r\nLast-Modified: never\r\n\r\n'.encode()
    consumer.script = lambda connection, _: connection.send(head)
    with broker.raw() as client:
        got = client.request("POST", "/v1/tts", b"{}").answer()
    assert got.status == int(status[:3])
    assert got.header("Last-Modified") == "never"
    broker.await_idle()


def test_proxies_and_netrc_of_the_environment_are_ignored(
    broker: LiveBroker,
    consumer: ScriptedConsumer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert broker.post("/v1/tts", data=b"x").status_code == 200
    assert consumer.requests[0].header("authorization") is None


# -- streaming ---------------------------------------------------------------------------------

FRAMINGS: dict[str, tuple[str, Callable[[bytes], bytes], bytes]] = {
    "chunked": (
        "Transfer-Encoding: chunked\r\n",
        lambda b: b"%x\r\n%b\r\n" % (len(b), b),
        b"0\r\n\r\n",
    ),
    "length": ("Content-Length: 36\r\n", lambda b: b, b""),
    "until close": ("Connection: close\r\n", lambda b: b, b""),
}


@pytest.mark.parametrize("framing", FRAMINGS)
def test_every_event_is_relayed_as_it_comes(
    broker: LiveBroker, consumer: ScriptedConsumer, framing: str
) -> None:
    header, frame, end = FRAMINGS[framing]
    seen = [threading.Event() for _ in range(4)]

    def stream(connection: Connection, _: Received) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{header}\r\n"
        connection.send(head.encode())
        # The next event is only sent once the client has the one before.
        for index in range(4):
            assert seen[index].wait(PATIENCE_S)
            if index < 3:
                connection.send(frame(b"data: ev%d\n\n" % index + b" "))
        connection.send(end)

    consumer.script = stream
    with broker.raw() as client:
        client.request("POST", "/v1/llm", b"{}")
        client.until(b"\r\n\r\n")  # the head, before any event
        seen[0].set()
        for index in range(3):
            client.until(b"ev%d\n\n" % index)
            seen[index + 1].set()
        got = client.answer()
    assert got.body == b"data: ev0\n\n data: ev1\n\n data: ev2\n\n "
    assert got.complete


def test_the_gpu_is_free_before_the_client_has_the_end(
    broker: LiveBroker, consumer: ScriptedConsumer
) -> None:
    consumer.script = lambda connection, _: connection.send(answer(b"x" * 1000))
    for _ in range(20):
        broker.post("/v1/tts", data=b"{}")
        assert broker.stats.in_flight == 0
    assert broker.stats.total_jobs == 20


@pytest.mark.parametrize("size_mib", [8, 24])
def test_a_slow_reader_does_not_hold_the_gpu(
    broker: LiveBroker, consumer: ScriptedConsumer, size_mib: int
) -> None:
    body = bytes(range(256)) * 4096 * size_mib
    consumer.script = lambda connection, _: connection.send(answer(body))
    with broker.raw() as slow:
        slow.request("POST", "/v1/image", b"{}")
        slow.until(b"\r\n\r\n")  # and then reads nothing
        broker.await_idle()
        consumer.script = echo
        assert broker.post("/v1/tts", data=b"next").content == b"next"
        got = slow.answer()
    assert got.complete
    assert got.body == body


@pytest.mark.parametrize("framing", ["chunked", "until close"])
def test_what_was_spooled_goes_out_though_the_consumer_says_no_more(
    broker: LiveBroker, consumer: ScriptedConsumer, framing: str
) -> None:
    """The end of a chunk lies there to be read, and is nothing that could be relayed."""
    header, frame, end = FRAMINGS[framing]
    sent, received = threading.Event(), threading.Event()

    def stream(connection: Connection, _: Received) -> None:
        connection.send(f"HTTP/1.1 200 OK\r\n{header}\r\n".encode())
        for piece in [b"x" * 100_000] * 80:
            connection.send(frame(piece))
        connection.send(frame(b"the last of it"))
        sent.set()
        received.wait(PATIENCE_S)
        connection.send(end)

    consumer.script = stream
    with broker.raw() as slow:
        slow.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        slow.request("POST", "/v1/llm", b"{}")
        assert sent.wait(PATIENCE_S)  # more than the connections hold: it was spooled
        slow.until(b"the last of it")
        received.set()
        got = slow.answer()
        assert got.complete
        assert got.body == b"x" * 8_000_000 + b"the last of it"


def test_a_slow_reader_that_leaves_frees_its_thread(
    broker: LiveBroker, consumer: ScriptedConsumer
) -> None:
    body = bytes(24 * 1024 * 1024)
    consumer.script = lambda connection, _: connection.send(answer(body))
    with broker.raw() as slow:
        slow.request("POST", "/v1/image", b"{}").until(b"\r\n\r\n")
        broker.await_idle()
    from tests.support.threads import eventually

    eventually(lambda: broker.broker.guard.unfinished() == 0)


def test_each_job_has_a_connection_of_its_own(
    broker: LiveBroker, consumer: ScriptedConsumer
) -> None:
    for _ in range(3):
        broker.post("/v1/tts", data=b"{}")
    assert consumer.connections == 3


# -- answers about the answer ------------------------------------------------------------------


def test_server_timing_tells_where_the_time_went(broker: LiveBroker) -> None:
    timing = broker.post("/v1/tts", data=b"{}").headers["Server-Timing"]
    phases = dict(part.strip().split(";dur=") for part in timing.split(","))
    assert list(phases) == ["queue", "evict", "upstream"]
    assert all(float(value) >= 0 for value in phases.values())


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-123", True), ("has space", False), ("x" * 129, False), ("", False), ("a\tb", False)],
)
def test_a_well_formed_request_id_is_kept(broker: LiveBroker, given: str, kept: bool) -> None:
    with broker.raw() as client:
        got = client.request("GET", "/healthz", headers=(f"X-Request-Id: {given}",)).answer()
    (value,) = got.all("X-Request-Id")
    assert (value == given) is kept
    assert value


# -- large uploads -------------------------------------------------------------------------------


class NoBody(Connection):
    """Reads only the head of a request."""

    def receive(self) -> Received | None:
        while b"\r\n\r\n" not in self._buffer:
            data = self.sock.recv(1024)
            if not data:
                return None
            self._buffer += data
        return Received(self._buffer.partition(b"\r\n\r\n")[0], b"")


@pytest.mark.parametrize("then", ["closes", "stays open", "resets"])
def test_an_answer_before_the_body_was_read_is_relayed(
    monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    monkeypatch.setattr("tests.support.sockets.Connection.receive", NoBody.receive)

    def early(connection: Connection, _: Received) -> None:
        connection.send(answer(b"too much", "413 Content Too Large"))
        if then == "stays open":
            # Reads nothing, so the broker cannot finish sending.
            threading.Event().wait(1)
        elif then == "resets":
            connection.reset()

    with ScriptedConsumer(early) as consumer, live_broker(config_for(consumer.url)) as broker:
        began = time.monotonic()
        reply = broker.post("/v1/stt", data=bytes(24 * 1024 * 1024))
        # A reset may overtake the answer: then there is none, and that is what is told.
        assert reply.status_code in ((413, 502) if then == "resets" else (413,))
        assert time.monotonic() - began < 3
        broker.await_idle()
        assert len(consumer.requests) == 1


def swollen(sock: socket.socket) -> int:
    """How much lies unread at this end, once no more comes: its peer is stuck in sending."""
    pause = threading.Event()
    before, same = -1, 0
    for _ in range(500):
        (there,) = struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))
        same = same + 1 if there == before and there > 0 else 0
        if same == 5:
            return int(there)
        before = there
        pause.wait(0.02)
    raise TimeoutError("it never stopped")


def test_an_answer_comes_through_while_the_upload_is_stuck(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A consumer that answers when the broker has sent what fits and is in the middle of a piece:
    over a network with a normal MTU the buffers hold less than one."""
    monkeypatch.setattr("tests.support.sockets.Connection.receive", NoBody.receive)
    monkeypatch.setattr("gpumanager.upstream.wire.PIECE_BYTES", 16 * 1024 * 1024)

    def late(connection: Connection, _: Received) -> None:
        assert swollen(connection.sock) < 1024 * 1024
        connection.send(answer(b"too much", "413 Content Too Large"))
        answered.wait(PATIENCE_S)  # and reads nothing more

    answered = threading.Event()
    with ScriptedConsumer(late, receive_bytes=8192) as consumer:
        with live_broker(config_for(consumer.url)) as broker:
            reply = broker.post("/v1/stt", data=bytes(24 * 1024 * 1024))
            answered.set()
            assert (reply.status_code, reply.content) == (413, b"too much")
            broker.await_idle()
        assert len(consumer.requests) == 1


@pytest.mark.parametrize("size", [10, 300_000, 24 * 1024 * 1024])
def test_an_interim_answer_does_not_end_an_upload(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    receive = Connection.receive
    interim = (
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 102 Processing\r\nX-Step: 1\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 102 Proc",
        b"essing\r\n\r\n",
    )

    def hinting(connection: Connection) -> Received | None:
        while b"\r\n\r\n" not in connection._buffer:
            connection._buffer += connection.sock.recv(1024)
        for each in interim:
            connection.send(each)
            connection._buffer += connection.sock.recv(1024) if size > 2048 else b""
        return receive(connection)

    monkeypatch.setattr("tests.support.sockets.Connection.receive", hinting)
    body = bytes(range(256)) * (size // 256) + bytes(size % 256)
    with ScriptedConsumer(echo) as consumer, live_broker(config_for(consumer.url)) as broker:
        assert broker.post("/v1/stt", data=body).content == body
