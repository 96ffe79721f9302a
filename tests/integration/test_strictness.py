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
