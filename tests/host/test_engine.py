"""Containers, with a stand-in for the engine on a Unix socket."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from gpumanager.host import engine as engine_socket
from gpumanager.host.errors import ReclaimFailed


class Engine(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

    def __init__(self, path: str) -> None:
        self.asked: list[str] = []
        self.status = 204
        self.body = b""
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                engine.asked.append(self.path)
                self.send_response(engine.status)
                self.send_header("Content-Length", str(len(engine.body)))
                self.end_headers()
                self.wfile.write(engine.body)

            def address_string(self) -> str:
                return "unix"

            def log_message(self, *args: Any) -> None:
                pass

        super().__init__(path, Handler)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "docker.sock")


@pytest.fixture
def engine(path: str) -> Iterator[Engine]:
    with Engine(path) as engine:
        thread = threading.Thread(target=engine.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield engine
        engine.shutdown()
        thread.join(5)


def test_a_container_is_stopped_and_started(engine: Engine, path: str) -> None:
    engine_socket.stop("comfyui", path, 12.4)
    engine.status = 304  # it is, already
    engine_socket.start("comfyui", path, 60)
    assert engine.asked == [
        "/v1.24/containers/comfyui/stop?t=12",
        "/v1.24/containers/comfyui/start",
    ]


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (404, b'{"message": "No such container: x"}', "404 No such container: x"),
        (500, b"oops", "500 oops"),
        (409, b"[1]", r"409 \[1\]"),
        (302, b"", "302"),
    ],
)
def test_the_engines_own_words_are_told(
    engine: Engine, path: str, status: int, body: bytes, words: str
) -> None:
    engine.status, engine.body = status, body
    with pytest.raises(ReclaimFailed, match=f"container x, stop: {words}"):
        engine_socket.stop("x", path, 1)


def test_an_engine_that_is_not_there_is_told(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ReclaimFailed, match="No such file or directory"):
        engine_socket.stop("x", path, 1)
    monkeypatch.setattr(engine_socket, "default_sockets", lambda: (path,))
    with pytest.raises(ReclaimFailed, match="set `socket`"):
        engine_socket.stop("x", None, 1)


def test_the_first_engine_there_is_is_taken(
    engine: Engine, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_socket, "default_sockets", lambda: ("/nowhere/sock", path))
    engine_socket.start("x", None, 5)
    assert len(engine.asked) == 1
    assert all(each.startswith("/") for each in engine_socket.default_sockets())


def test_one_that_hangs_is_not_waited_for_for_ever(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_socket, "CALL_TIMEOUT_S", 0.1)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(path)
        silent.listen(1)
        with pytest.raises(ReclaimFailed, match="gave no answer within"):
            engine_socket.stop("x", path, 0.1)
