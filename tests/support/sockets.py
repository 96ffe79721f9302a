"""Real sockets on loopback: a consumer that does exactly what a test says, and a client that
sees exactly what came."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.support.threads import PATIENCE_S


@dataclass
class Received:
    """One request as it arrived: the head to the letter, then the body."""

    head: bytes
    body: bytes

    @property
    def line(self) -> bytes:
        return self.head.split(b"\r\n", 1)[0]

    @property
    def headers(self) -> list[tuple[str, str]]:
        lines = self.head.decode("latin-1").split("\r\n")[1:]
        return [
            (name.lower(), value.strip()) for name, _, value in (x.partition(":") for x in lines)
        ]

    def header(self, name: str) -> str | None:
        return dict(self.headers).get(name.lower())


class Connection:
    """The consumer's end of one connection, in a test's hands."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = b""

    def receive(self) -> Received | None:
        """The next request, or None if the peer closed instead."""
        while b"\r\n\r\n" not in self._buffer:
            data = self.sock.recv(65536)
            if not data:
                return None
            self._buffer += data
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        received = Received(head, b"")
        length = int(received.header("content-length") or 0)
        came = bytearray(self._buffer)
        while len(came) < length:
            data = self.sock.recv(65536)
            if not data:
                break
            came += data
        received.body, self._buffer = bytes(came[:length]), bytes(came[length:])
        return received

    def rest(self) -> bytes:
        """What came behind the last request, which is its no more."""
        rest, self._buffer = self._buffer, b""
        return rest

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def wait_closed(self, timeout: float = PATIENCE_S) -> bool:
        """True once the peer has closed or reset the connection."""
        self.sock.settimeout(timeout)
        try:
            while self.sock.recv(65536):
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True

    def reset(self) -> None:
        """Close with a RST instead of a FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


Script = Callable[[Connection, Received], None]


class ScriptedConsumer:
    """A server whose connections each run `script` once, for their first request.

    `requests` holds what arrived; `receive_bytes` is how much may lie unread at its end;
    with `tls` it speaks that. A context manager; its threads end with it.
    """

    def __init__(
        self,
        script: Script,
        *,
        receive_bytes: int | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.script = script
        self._tls = tls
        self.requests: list[Received] = []
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        if receive_bytes is not None:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._accept, name="consumer", daemon=True)

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def __enter__(self) -> ScriptedConsumer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(PATIENCE_S)
        for sock in self._open:
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(sock)
            threading.Thread(target=self._serve, args=(sock,), name="consumer", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
            connection = Connection(sock)
            received = connection.receive()
            if received is not None:
                self.requests.append(received)
                self.script(connection, received)
        except OSError:
            pass  # the peer is gone, which is often the point
        finally:
            sock.close()


def answer(
    body: bytes = b"{}",
    status: str = "200 OK",
    headers: tuple[str, ...] = ("Content-Type: application/json",),
) -> bytes:
    """A whole, plain HTTP answer."""
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


@dataclass
class Answer:
    """One answer as a client saw it on the wire. `complete` is False if it broke off."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    complete: bool
    raw: bytes = field(repr=False, default=b"")

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def header(self, name: str) -> str | None:
        values = self.all(name)
        return values[0] if values else None


class RawClient:
    """A client that speaks HTTP by hand, one request on one connection."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        self.buffer = b""

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> RawClient:
        self.sock.sendall(data)
        return self

    def request(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        headers: tuple[str, ...] = (),
        version: str = "1.1",
    ) -> RawClient:
        lines = [f"{method} {target} HTTP/{version}", "Host: localhost", *headers]
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        return self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b""))

    def until(self, marker: bytes) -> bytes:
        """Everything received so far, as soon as `marker` is in it."""
        while marker not in self.buffer:
            data = self.sock.recv(65536)
            if not data:
                raise EOFError(f"{marker!r} never came; got {self.buffer[-1000:]!r}")
            self.buffer += data
        return self.buffer

    def answer(self, *, head_only: bool = False) -> Answer:
        """The whole answer, as far as it came."""
        head = self.until(b"\r\n\r\n").partition(b"\r\n\r\n")[0].decode("latin-1")
        lines = head.split("\r\n")
        headers = [
            (name, value.strip()) for name, _, value in (x.partition(":") for x in lines[1:])
        ]
        found = Answer(int(lines[0].split()[1]), headers, b"", complete=True)
        rest = bytearray(self.buffer.partition(b"\r\n\r\n")[2])
        if head_only or found.status in (204, 304):
            return found
        length = found.header("Content-Length")
        if (found.header("Transfer-Encoding") or "") == "chunked":
            found.body, found.complete = self._chunked(rest)
        elif length is not None:
            while len(rest) < int(length) and (data := self._more()):
                rest += data
            found.body, found.complete = bytes(rest), len(rest) == int(length)
        else:
            try:
                while data := self.sock.recv(65536):
                    rest += data
            except ConnectionResetError:
                found.complete = False
            found.body = bytes(rest)
        found.raw = self.buffer
        return found

    def _more(self) -> bytes:
        try:
            return self.sock.recv(65536)
        except ConnectionResetError:
            return b""

    def _chunked(self, rest: bytearray) -> tuple[bytes, bool]:
        body = bytearray()
        while True:
            while (end := rest.find(b"\r\n")) < 0:
                if not (data := self._more()):
                    return bytes(body), False
                rest += data
            size = int(rest[:end], 16)
            del rest[: end + 2]
            while len(rest) < size + 2:
                if not (data := self._more()):
                    return bytes(body + rest[:size]), False
                rest += data
            body += rest[:size]
            del rest[: size + 2]
            if size == 0:
                return bytes(body), True
