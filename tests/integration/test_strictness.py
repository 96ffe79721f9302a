"""Requests that two servers may read differently: refused over real sockets, never forwarded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.broker import LiveBroker, config_for, live_broker
from tests.support.sockets import ScriptedConsumer, answer


@pytest.fixture
def consumer() -> Iterator[ScriptedConsumer]:
    with ScriptedConsumer(lambda connection, _: connection.send(answer())) as running:
        yield running


@pytest.fixture
def broker(consumer: ScriptedConsumer) -> Iterator[LiveBroker]:
    with live_broker(config_for(consumer.url, allowed_hosts=["gpu.example.org"])) as running:
        yield running


# -- which host a request is for -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("POST /v1/tts HTTP/1.1\r\n", "Host is required"),
        ("GET /healthz HTTP/1.1\r\n", "Host is required"),
        ("POST http://localhost/v1/tts HTTP/1.1\r\n", "Host is required"),
        ("POST /v1/tts HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n", "one Host"),
        ("POST /v1/tts HTTP/1.1\r\nhost: localhost\r\nHOST: evil.example\r\n", "one Host"),
        ("POST /v1/tts HTTP/1.0\r\nHost: localhost\r\nHost: localhost\r\n", "one Host"),
        ("POST /v1/tts HTTP/1.1\r\nHost:\r\nHost:\r\n", "one Host"),
        ("POST /v1/tts HTTP/1.1\r\nHost: localhost, evil.example\r\n", "name or an address"),
        ("POST /v1/tts HTTP/1.1\r\nHost: localhost evil.example\r\n", "name or an address"),
        ("POST /v1/tts HTTP/1.1\r\nHost: evil.example@localhost\r\n", "name or an address"),
        ("POST /v1/tts HTTP/1.1\r\nHost: localhost/x\r\n", "name or an address"),
        ("POST /v1/tts HTTP/1.1\r\nHost: localhost:http\r\n", "name or an address"),
        (f"POST /v1/tts HTTP/1.1\r\nHost: {'a' * 257}\r\n", "longer than 256"),
        ("POST http:///v1/tts HTTP/1.1\r\nHost: localhost\r\n", "path or an http URL"),
        ("POST ftp://localhost/v1/tts HTTP/1.1\r\nHost: localhost\r\n", "path or an http URL"),
        ("POST v1/tts HTTP/1.1\r\nHost: localhost\r\n", "path or an http URL"),
        ("CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n", "path or an http URL"),
        ("POST http://a@localhost/v1/tts HTTP/1.1\r\nHost: localhost\r\n", "name or an address"),
    ],
)
def test_a_request_that_does_not_say_plainly_whom_it_is_for(
    broker: LiveBroker, consumer: ScriptedConsumer, head: str, words: str
) -> None:
    with broker.raw() as client:
        got = client.send(f"{head}Content-Length: 2\r\n\r\n{{}}".encode()).answer()
    assert got.status == 400
    assert b'"bad_request"' in got.body
    assert words.encode() in got.body
    assert consumer.requests == []


@pytest.mark.parametrize(
    ("target", "host", "status"),
    [
        ("http://localhost:8770/v1/tts", "evil.example", 200),
        ("http://gpu.example.org/v1/tts", "evil.example", 200),
        ("HTTPS://GPU.example.org/v1/tts", "localhost", 200),
        ("http://evil.example/v1/tts", "localhost", 403),
        ("http://evil.example/v1/tts", "gpu.example.org", 403),
        ("/v1/tts", "gpu.example.org", 200),
    ],
)
def test_the_authority_of_an_absolute_target_is_what_counts(
    broker: LiveBroker, target: str, host: str, status: int
) -> None:
    with broker.raw() as client:
        client.send(f"POST {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert client.answer().status == status


def test_the_origin_is_held_against_the_authority_of_the_target(broker: LiveBroker) -> None:
    with broker.raw() as client:
        client.send(
            b"POST http://localhost/v1/tts HTTP/1.1\r\nHost: gpu.example.org\r\n"
            b"Origin: http://gpu.example.org\r\n\r\n"
        )
        assert client.answer().status == 403


def test_an_http_url_without_a_path_is_the_root(broker: LiveBroker) -> None:
    with broker.raw() as client:
        got = client.send(b"GET http://localhost HTTP/1.1\r\nHost: localhost\r\n\r\n").answer()
    assert (got.status, got.body[:10]) == (200, b"gpumanager")


def test_http_1_0_may_do_without_a_host(broker: LiveBroker) -> None:
    with broker.raw() as client:
        assert client.send(b"GET /healthz HTTP/1.0\r\n\r\n").answer().status == 200


# -- where a body ends ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        "Content-Length: 5, 5",
        "Content-Length: 5\r\nContent-Length: 5",
        "Content-Length: abc",
        "Content-Length: -5",
        "Content-Length: +5",
        "Content-Length: 0x5",
        "Content-Length: 5_0",
        "Content-Length: 5.0",
        "Content-Length:",
        "Content-Length: \xb2",
        f"Content-Length: {'5' * 5_000}",
        f"Content-Length: {'0' * 5_000}5",
        "Content-Length : 5",
        "Content-Length\t: 5",
        " Content-Length: 5",
        "X-A: b\r\n Content-Length: 5",
        "Content-Length: 5\r\n\t5",
        "Content-Length: 5\rX-A: b",
        "Content-Length: 5\nX-A: b",
        "Content-Length: 5\r\r\nX-A: b",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked, chunked",
        "Transfer-Encoding:",
        "Transfer-Encoding: chunked,",
        "Transfer-Encoding: \x0bchunked",
        "Transfer-Encoding : chunked",
        "Transfer-Encoding:\r\nContent-Length: 5",
        "Transfer-Encoding: chunked\r\nContent-Length: 5",
    ],
)
def test_a_body_whose_end_can_be_read_in_two_ways(
    broker: LiveBroker, consumer: ScriptedConsumer, headers: str
) -> None:
    with broker.raw() as client:
        head = f"POST /v1/tts HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n\r\n"
        got = client.send(head.encode("latin-1") + b"0\r\n\r\n").answer()
    assert (got.status, got.header("Connection")) == (400, "close")
    assert b'"bad_request"' in got.body
    assert consumer.requests == []


@pytest.mark.parametrize("coding", ["gzip, chunked", "identity", "gzip", "chunked, gzip"])
def test_a_coding_that_nobody_knows_is_a_501(
    broker: LiveBroker, consumer: ScriptedConsumer, coding: str
) -> None:
    with broker.raw() as client:
        got = client.request("POST", "/v1/tts", headers=(f"Transfer-Encoding: {coding}",)).answer()
    assert got.status == 501
    assert consumer.requests == []


@pytest.mark.parametrize("target", ["http://[::1/x", "http://[::1", "//[", "http://]/"])
def test_half_an_address_is_an_answer_and_no_trace(
    broker: LiveBroker, caplog: pytest.LogCaptureFixture, target: str
) -> None:
    with broker.raw() as client:
        client.send(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert client.answer().status in (400, 404)
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("length", [(), ("Content-Length: 0",)])
@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/tts"), ("GET", "/healthz")])
def test_there_is_nothing_to_go_on_with_where_there_is_no_body(
    broker: LiveBroker,
    consumer: ScriptedConsumer,
    method: str,
    path: str,
    length: tuple[str, ...],
) -> None:
    """Waitress took what came next for more of the same request."""
    with broker.raw() as client:
        client.request(method, path, headers=("Expect: 100-continue", "X-A: first", *length))
        assert client.answer().status == 200
        assert not client.buffer.startswith(b"HTTP/1.1 100")
        client.buffer = b""
        client.request("POST", "/v1/tts", b"{}", headers=("X-A: second",))
        assert client.answer().status == 200
    assert consumer.requests[-1].header("x-a") == "second"


@pytest.mark.parametrize(
    "path",
    [
        "/audio/..;/x",
        "/audio/..;a=b/x",
        "/audio/.;/x",
        "/audio/..%3b/x",
        "/audio/%2e%2e;/x",
        "/audio/..%253b/x",
        "/audio/a/..;",
        "/audio/..;\\x",
    ],
)
def test_a_path_that_leads_out_behind_a_parameter(
    broker: LiveBroker, consumer: ScriptedConsumer, path: str
) -> None:
    with broker.raw() as client:
        got = client.request("GET", path).answer()
    assert got.status == 400
    assert b"leads out" in got.body
    assert consumer.requests == []


def test_a_path_with_a_parameter_goes_through(
    broker: LiveBroker, consumer: ScriptedConsumer
) -> None:
    with broker.raw() as client:
        assert client.request("GET", "/audio/a;v=1/..b;c").answer().status == 200
    assert consumer.requests[0].line == b"GET /audio/a;v=1/..b;c HTTP/1.1"
