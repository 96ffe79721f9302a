"""Hundreds of clients that do whatever comes into their heads: good requests, bad ones, halves of
them, more than one at once, in pieces; they read, or do not, and leave when they like."""

from __future__ import annotations

import logging
import random
import socket
from collections.abc import Iterator
from functools import partial

import pytest

from gpumanager.errors import TruncatedAnswer
from gpumanager.keys import ApiKey
from tests.support.broker import LiveBroker, config_for, live_broker
from tests.support.sockets import ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S, Outcome

KEY = "alice-has-a-long-key"
CLIENTS = 8
CONNECTIONS = 150
"""Of each, one after the other."""

METHODS = [b"GET", b"POST", b"POST", b"HEAD", b"DELETE", b"OPTIONS", b"get"]
VERSIONS = [b" HTTP/1.1", b" HTTP/1.1", b" HTTP/1.1", b" HTTP/1.0", b" HTTP/2.0", b""]
TARGETS = [
    *(b"/v1/tts", b"/healthz", b"/v1/status", b"/audio/a", b"/audio/..;/x", b"/", b"*", b"//x"),
    *(b"http://localhost/v1/tts", b"http://[::1/", b"/\xff", b"/v1/queue/1", b"x"),
]
HEADERS = [
    *(b"Host: evil", b"Host:", b"Content-Length: 5", b"Content-Length: 0", b" folded"),
    *(b"Content-Length: 3000000", b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip"),
    *(b"Expect: 100-continue", b"Connection: close", b"Connection: keep-alive", b"Prefer: wait=1"),
    *(b"X-A: \x85\xff", b"Origin: http://x", b"Content-Length: 99999999999999999999999999"),
]
BODIES = [
    *(b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"zz\r\n", b"0\r\nA: b\r\n\r\n", b"\r\n\r\n"),
    *(b"1\r\nx\r\n" * 300, b"x" * 3000, b"1" * 3000),
]


@pytest.fixture(params=["open", "guarded"])
def broker(request: pytest.FixtureRequest) -> Iterator[LiveBroker]:
    sizes = random.Random(0)
    keys = [ApiKey("alice", KEY)] if request.param == "guarded" else []
    with (
        ScriptedConsumer(
            lambda peer, _: peer.send(answer(b"x" * sizes.choice([3, 3000, 3_000_000])))
        ) as consumer,
        live_broker(config_for(consumer.url, max_body_mib=2), keys=keys) as running,
    ):
        yield running


def a_request(chance: random.Random) -> bytes:
    lines = [chance.choice(METHODS) + b" " + chance.choice(TARGETS) + chance.choice(VERSIONS)]
    lines += [line for line in (b"Host: localhost", b"X-Api-Key: " + KEY.encode()) if odds(chance)]
    lines += chance.sample(HEADERS, chance.randint(0, 3))
    data = bytearray(b"\r\n".join(lines) + b"\r\n\r\n" + chance.choice(BODIES))
    if chance.random() < 0.15:
        for _ in range(3):
            data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data)


def odds(chance: random.Random) -> bool:
    return chance.random() < 0.7


def behave_oddly(port: int, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(CONNECTIONS):
        try:
            with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as sock:
                sock.settimeout(chance.choice([0.01, 0.05]))
                if chance.random() < 0.2:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                data = b"".join(a_request(chance) for _ in range(chance.choice([1, 1, 2, 3])))
                while data:
                    size = chance.choice([1, 7, 100, 5000, 100_000])
                    sock.sendall(data[:size])
                    data = data[size:]
                while odds(chance) and sock.recv(chance.choice([10, 65536])):
                    pass
                if chance.random() < 0.3:
                    sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # refused, reset or not answered: all of that is meant


@pytest.mark.timeout(120)
def test_whatever_clients_do_nothing_is_left_of_them(
    broker: LiveBroker, caplog: pytest.LogCaptureFixture
) -> None:
    odd = [Outcome(partial(behave_oddly, broker.port, seed)) for seed in range(CLIENTS)]
    for client in odd:
        client.result(100)
    broker.await_idle()
    assert broker.get("/healthz").status_code == 200
    assert broker.post("/v1/tts", headers={"X-Api-Key": KEY}).status_code == 200
    broken = [r for r in caplog.records if r.exc_info or r.levelno >= logging.ERROR]
    assert [record.getMessage() for record in broken if not _cut_off(record)] == []


def _cut_off(record: logging.LogRecord) -> bool:
    """Whether it is waitress's trace of an answer that broke off, which the log leaves out."""
    return record.exc_info is not None and isinstance(record.exc_info[1], TruncatedAnswer)
