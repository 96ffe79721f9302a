"""The outermost layer: what a request holds is given back once, however it ends."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gpumanager.clock import SystemClock
from gpumanager.web.guard import Guard
from gpumanager.web.record import record_of, shown
from tests.support.events import ignore

ENVIRON = {"REQUEST_METHOD": "POST", "PATH_INFO": "/v1/tts", "HTTP_X_REQUEST_ID": "abc"}
App = Callable[[dict[str, Any], Any], Any]


class Server:
    """A WSGI server's side. `rejects` makes its first start_response raise, as waitress does
    for a header it does not allow."""

    def __init__(self, app: App, *, rejects: bool = False) -> None:
        self.given_back: list[str] = []
        self.rejects = rejects
        self.status = ""
        self.headers: list[tuple[str, str]] = []

        def holding(environ: dict[str, Any], start_response: Any) -> Any:
            record_of(environ).stack.callback(lambda: self.given_back.append("gpu"))
            return app(environ, start_response)

        self.guard = Guard(holding, SystemClock(), ignore)

    def start_response(self, status: str, headers: Any, exc_info: Any = None) -> Any:
        self.status, self.headers = status, headers
        if self.rejects and not exc_info:
            raise AssertionError("a hop-by-hop header")
        return lambda data: None

    def run(self, *, close: bool = True) -> bytes:
        body = self.guard(dict(ENVIRON), self.start_response)
        try:
            return b"".join(body)
        finally:
            if close and hasattr(body, "close"):
                body.close()
                body.close()


def good(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [("X-Request-Id", "other")])
    return [b"fine"]


def test_a_good_answer_gives_back_when_it_is_closed() -> None:
    server = Server(good)
    body = server.guard(dict(ENVIRON), server.start_response)
    assert server.guard.unfinished() == 1
    assert b"".join(body) == b"fine"
    assert server.given_back == []
    body.close()  # type: ignore[attr-defined]
    assert server.given_back == ["gpu"]
    assert server.guard.unfinished() == 0
    assert server.headers == [("X-Request-Id", "abc")]


def raises(environ: Any, start_response: Any) -> list[bytes]:
    raise RuntimeError("secret detail")


def raises_after_start(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    raise RuntimeError("secret detail")


@pytest.mark.parametrize(
    ("app", "rejects"), [(raises, False), (raises_after_start, False), (good, True)]
)
def test_an_application_that_breaks_is_a_500_in_the_envelope(
    app: App, rejects: bool, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(app, rejects=rejects)
    body = json.loads(server.run())
    assert server.status.startswith("500 ")
    assert body["error"] == "internal_error"
    assert "secret" not in body["message"]
    assert ("Content-Type", "application/json") in server.headers
    assert ("X-Request-Id", "abc") in server.headers
    assert server.given_back == ["gpu"]
    assert server.guard.unfinished() == 0
    assert any(r.exc_info and getattr(r, "request_id", "") == "abc" for r in caplog.records)


def test_an_interrupt_gives_back_and_goes_on() -> None:
    def interrupted(environ: Any, start_response: Any) -> list[bytes]:
        raise KeyboardInterrupt

    server = Server(interrupted)
    with pytest.raises(KeyboardInterrupt):
        server.run()
    assert server.given_back == ["gpu"]


class Body:
    """A body that breaks where it is told to."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __iter__(self) -> Iterator[bytes]:
        yield b"first"
        if self.where == "between":
            raise RuntimeError("broke off")

    def close(self) -> None:
        if self.where == "close":
            raise RuntimeError("broke off")


@pytest.mark.parametrize("where", ["between", "close"])
def test_a_body_that_breaks_gives_back(where: str) -> None:
    def app(environ: Any, start_response: Any) -> Body:
        start_response("200 OK", [])
        return Body(where)

    server = Server(app)
    with pytest.raises(RuntimeError, match="broke off"):
        server.run()
    assert server.given_back == ["gpu"]


def test_a_body_that_is_closed_unread_gives_back() -> None:
    server = Server(good)
    server.guard(dict(ENVIRON), server.start_response).close()  # type: ignore[attr-defined]
    assert server.given_back == ["gpu"]


def test_a_clean_up_that_fails_hinders_neither_the_rest_nor_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        record_of(environ).stack.callback(lambda: 1 // 0)
        return good(environ, start_response)

    server = Server(app)
    with caplog.at_level(logging.INFO):
        assert server.run() == b"fine"
    assert server.given_back == ["gpu"]
    assert [r.message for r in caplog.records] == ["clean-up failed", "request"]


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("/a", "/a"),
        ("/\xc3\xa4", "/ä"),
        ("/\x85", "/\\x85"),
        ("/\u20ac", "/?"),
        ("/" + "a" * 255, "/" + "a" * 255),
        ("/" + "a" * 256, "/" + "a" * 254 + "…"),
        ("/" + "\xc3\xa4" * 9_000, "/" + "ä" * 254 + "…"),
    ],
)
def test_a_path_is_kept_as_it_was_meant_and_not_longer_than_it_can_be_read(
    text: str, seen: str
) -> None:
    assert shown(text) == seen
