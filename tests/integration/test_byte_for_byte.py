"""An answer through the broker has the consumer's own bytes: on every drop-in route, below a mount,
and on a port of its own; however the consumer frames it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import yaml

from gpumanager.web.ways import DROP_IN
from tests.support.broker import live_broker
from tests.support.ports import free_port
from tests.support.sockets import Answer, Connection, RawClient, Received, ScriptedConsumer

OURS = {"x-request-id", "server-timing"}
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "via"}

BODY = bytes(range(256)) * 300
EVENTS = [b'data: {"n": %d}\n\n' % number for number in range(50)] + [b"data: [DONE]\n\n"]
HEAD = (
    "Content-Type: {}\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nX-Odd:  two  words \r\n"
    'ETag: W/"1"\r\nServer: it/1.0\r\nDate: Mon, 11 May 2026 11:33:39 GMT\r\n'
)


def _plain(status: str, body: bytes, kind: str = "application/octet-stream") -> list[bytes]:
    head = f"HTTP/1.1 {status}\r\n{HEAD.format(kind)}Content-Length: {len(body)}\r\n\r\n"
    return [head.encode(), body]


def _chunked(pieces: list[bytes], kind: str) -> list[bytes]:
    head = f"HTTP/1.1 200 OK\r\n{HEAD.format(kind)}Transfer-Encoding: chunked\r\n\r\n"
    chunks = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces]
    return [head.encode(), *chunks, b"0\r\n\r\n"]


SHAPES = {
    "plain": _plain("200 OK", BODY),
    "empty": _plain("200 Fine", b""),
    "gzip": _plain("200 OK", b"\x1f\x8b" + BODY, "text/plain\r\nContent-Encoding: gzip"),
    "an error": _plain("422 Unprocessable Entity", b'{"detail": "no"}', "application/json"),
    "its own 503": _plain("503 Busy Now", b"later", "text/plain\r\nRetry-After: 7"),
    "chunked": _chunked([BODY[:1], BODY[1:50_000], BODY[50_000:]], "application/json"),
    "events": _chunked(EVENTS, "text/event-stream; charset=utf-8"),
    "until it closes": [
        f"HTTP/1.0 200 OK\r\n{HEAD.format('application/x-ndjson')}\r\n".encode(),
        *EVENTS,
    ],
}


@dataclass
class Ends:
    """The ports of a consumer, of a broker in front of it, and of that broker in its place."""

    consumer: ScriptedConsumer
    direct: int
    broker: int
    own: int


@pytest.fixture(scope="module")
def ends() -> Iterator[Ends]:
    def says(connection: Connection, received: Received) -> None:
        for piece in SHAPES[received.header("x-shape") or ""]:
            connection.send(piece)

    kinds = dict.fromkeys(("llm", "embed", "rerank", "tts", "stt", "image", "video"), "it")
    own = free_port()
    with ScriptedConsumer(says) as consumer:
        it = {
            "url": consumer.url,
            "routes": [way.path for way in DROP_IN],
            "paths": {"video": "/v1/video", "tts": "/v1/tts"},
        }
        text = yaml.safe_dump({"routing": kinds, "consumers": {"it": it}, "ports": {own: "it"}})
        with live_broker(text) as broker:
            yield Ends(consumer, int(consumer.url.rpartition(":")[2]), broker.port, own)


def said(port: int, method: str, path: str, shape: str) -> Answer:
    body = b'{"model": "m", "stream": true}' if method == "POST" else None
    headers = (f"X-Shape: {shape}", "Content-Type: application/json", "Connection: close")
    with RawClient(port) as client:
        return client.request(method, path, body, headers).answer()


def same(direct: Answer, through: Answer) -> None:
    """The status line, the headers that are for the reader, and the body."""
    assert through.complete
    status, own_status = (each.raw.partition(b"\r\n")[0] for each in (direct, through))
    assert own_status.partition(b" ")[2] == status.partition(b" ")[2]
    assert through.body == direct.body
    assert kept(through, HOP_BY_HOP | OURS) == kept(direct, HOP_BY_HOP)


def kept(found: Answer, without: set[str]) -> list[tuple[str, str]]:
    """The headers without some. The case of their names says nothing."""
    headers = [(name.lower(), value) for name, value in found.headers]
    return sorted(each for each in headers if each[0] not in without)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_drop_in_route(ends: Ends, shape: str) -> None:
    for path in [*(way.path for way in DROP_IN), "/v1/video", "/v1/tts"]:
        direct = said(ends.direct, "POST", path, shape)
        through = said(ends.broker, "POST", path, shape)
        same(direct, through)
        arrived, sent = ends.consumer.requests[-1], ends.consumer.requests[-2]
        assert (arrived.line, arrived.body) == (sent.line, sent.body)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/a/b?x=%2F&y"), ("POST", "/any"), ("DELETE", "/a%2Fb")]
)
def test_a_mount_and_a_port(ends: Ends, method: str, path: str, shape: str) -> None:
    direct = said(ends.direct, method, path, shape)
    same(direct, said(ends.own, method, path, shape))
    assert ends.consumer.requests[-1].line == ends.consumer.requests[-2].line
    same(direct, said(ends.broker, method, f"/consumers/it{path}", shape))
    assert ends.consumer.requests[-1].line == ends.consumer.requests[-3].line
