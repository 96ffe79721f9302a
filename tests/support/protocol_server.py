"""A server that speaks the protocols of OpenAI, Anthropic and Ollama as the real ones do
(`protocol_answers`), says the same to the same request, and remembers what it was asked."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from werkzeug.formparser import FormDataParser

from tests.support.threads import PATIENCE_S

DATE = "Tue, 24 Nov 2026 12:00:00 GMT"


@dataclass
class Request:
    """One request as it arrived."""

    method: str
    path: str
    query: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def content_type(self) -> str:
        return next((v for k, v in self.headers if k.lower() == "content-type"), "")

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def form(self) -> tuple[dict[str, str], dict[str, tuple[str, bytes]]]:
        """The fields of a multipart body, and its files: name and content."""
        kind, _, rest = self.content_type.partition(";")
        options = dict(part.strip().partition("=")[::2] for part in rest.split(";"))
        _, fields, files = FormDataParser().parse(
            io.BytesIO(self.body),
            kind,
            len(self.body),
            {name: value.strip('"') for name, value in options.items()},
        )
        found = {}
        for name, file in files.items():
            with file.stream:
                found[name] = (file.filename or "", file.stream.read())
        return dict(fields.items()), found


@dataclass
class Answer:
    """What it answers: `body` whole, or a list of pieces that are sent one by one."""

    body: bytes | list[bytes]
    status: int = 200
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/json"),)


Answering = Callable[[Request], Answer | None]


@dataclass
class Misbehaviour:
    """What becomes of the jobs: each waits for `release`, if it is `held`; with `drop` the
    connection is closed without an answer, with `break_off` in the middle of one; `says` is
    answered instead."""

    held: bool = False
    release: threading.Event = field(default_factory=threading.Event)
    drop: bool = False
    break_off: bool = False
    says: Answer | None = None


class ProtocolServer:
    """Serves `answering`, which returns None for what it does not know, until the block is left.
    `requests` are those that were no mere look (GET, HEAD)."""

    def __init__(self, answering: Answering) -> None:
        self.answering = answering
        self.requests: list[Request] = []
        self.misbehaves = Misbehaviour()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.port: int = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), name="protocols", daemon=True
        )

    def __enter__(self) -> ProtocolServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.misbehaves.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(PATIENCE_S)

    def behave(self, misbehaviour: Misbehaviour | None = None) -> None:
        """From now on; forgets what it was asked before."""
        self.misbehaves.release.set()
        self.misbehaves = misbehaviour or Misbehaviour()
        self.requests.clear()

    def answer(self, request: Request) -> Answer:
        asked = replace(request, method="GET") if request.method == "HEAD" else request
        answer = self.answering(asked)
        if answer is None:
            return Answer(b'{"error": "not found"}\n', 404)
        if request.method == "POST" and self.misbehaves.says is not None:
            return self.misbehaves.says
        return answer

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def serve(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                parts = urlsplit(self.path)
                request = Request(
                    self.command,
                    parts.path,
                    parts.query,
                    list(self.headers.items()),
                    self.rfile.read(length),
                )
                wrong = outer.misbehaves
                if self.command == "POST":
                    outer.requests.append(request)
                    if wrong.held:
                        wrong.release.wait(PATIENCE_S)
                    if wrong.drop:
                        self.close_connection = True
                        return
                self.send(outer.answer(request), break_off=wrong.break_off)

            do_GET = do_HEAD = do_POST = do_DELETE = serve  # noqa: N815  # http.server's names

            def send(self, answer: Answer, *, break_off: bool) -> None:
                whole = isinstance(answer.body, bytes)
                self.send_response_only(answer.status)
                self.send_header("Date", DATE)
                self.send_header("Server", "protocols/1.0")
                for name, value in answer.headers:
                    self.send_header(name, value)
                if whole:
                    self.send_header("Content-Length", str(len(answer.body)))
                else:
                    self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                if self.command == "HEAD":
                    return
                for piece in self.framed(answer.body):
                    if break_off:
                        self.wfile.write(piece[: len(piece) // 2])
                        self.close_connection = True
                        return
                    self.wfile.write(piece)

            @staticmethod
            def framed(body: bytes | list[bytes]) -> Iterator[bytes]:
                if isinstance(body, bytes):
                    yield body
                    return
                for piece in body:
                    yield b"%x\r\n%s\r\n" % (len(piece), piece)
                yield b"0\r\n\r\n"

            def log_message(self, *args: object) -> None:
                pass

            def log_request(self, *args: object) -> None:
                pass

        return Handler
