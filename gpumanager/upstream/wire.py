"""HTTP/1.1 on a socket, for one request and its answer: as little as that takes, and strict about
what comes back."""

from __future__ import annotations

import contextlib
import http
import http.client
import ipaddress
import re
import select
import socket
import ssl
from collections.abc import Iterable, Iterator
from functools import cache
from typing import IO, Any

import certifi

PIECE_BYTES = 64 * 1024
"""Of a body that is sent from a file."""

_MOST_HEADERS = 100
_LONGEST_LINE = 65536
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_FIELD = re.compile(r"[!-9;-~]+")
"""What may stand before an answer's colon; not all of it is handed on."""

_VALUE = re.compile(r"[\t -~\x80-\xff]*")


def serialise(method: str, target: str, host: str, headers: Iterable[tuple[str, str]]) -> bytes:
    """The head of a request. Raises ValueError for what must not stand in one."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}"]
    for name, value in headers:
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise ValueError(f"header {name!r} cannot be sent")
        lines.append(f"{name}: {value}")
    if not target.isascii() or not target.isprintable() or " " in target:
        raise ValueError("the target cannot be sent")
    return "\r\n".join([*lines, "\r\n"]).encode("latin-1")


def connect(host: str, port: int, *, tls: bool, timeout: float) -> socket.socket:
    """An open connection; `timeout` in seconds for each step. Raises OSError."""
    family = _family(host)
    if family is None:
        sock = socket.create_connection((host, port), timeout)
    else:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            sock.connect((host, port))
        except BaseException:
            sock.close()
            raise
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if not tls:
        return sock
    try:
        return _tls().wrap_socket(sock, server_hostname=host)
    except BaseException:
        sock.close()
        raise


@cache
def _family(host: str) -> socket.AddressFamily | None:
    """The family of an address; None for a name, which has to be looked up."""
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return None
    return socket.AF_INET6 if version == 6 else socket.AF_INET


@cache
def is_local(host: str) -> bool:
    """Whether a host is surely this machine, by its address or the one name that stands for it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certifi.where())


def send(sock: socket.socket, head: bytes, body: bytes | IO[bytes] | None) -> None:
    """Send a request, unless the consumer answers before it has read all of it: it will not read
    the rest, and might not close either. Raises OSError, not for a consumer that closed its end:
    there may be an answer."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        if body is None or isinstance(body, bytes):
            whole = head if body is None else head + body
            if len(whole) <= PIECE_BYTES:
                sock.sendall(whole)
                return
            pieces = [whole[at : at + PIECE_BYTES] for at in range(0, len(whole), PIECE_BYTES)]
            source: Iterable[bytes] = pieces
        else:
            sock.sendall(head)
            source = iter(lambda: body.read(PIECE_BYTES), b"")
        for piece in source:
            if _answered_early(sock):
                return
            sock.sendall(piece)


def _answered_early(sock: socket.socket) -> bool:
    """True if there is something to read while the request is still being sent; waits, within the
    socket's time-out, until it can be sent on or there is. TLS has messages of its own to read,
    so there it is not known."""
    if isinstance(sock, ssl.SSLSocket):
        return False
    poll = select.poll()
    poll.register(sock, select.POLLIN | select.POLLOUT)
    timeout = sock.gettimeout()
    events = dict(poll.poll(None if timeout is None else timeout * 1000))
    return bool(events.get(sock.fileno(), 0) & select.POLLIN)


class Head:
    """The headers of an answer, in their order, repeated ones kept."""

    def __init__(self, fields: list[tuple[str, str]]) -> None:
        self._fields = fields

    def items(self) -> Iterator[tuple[str, str]]:
        """Name and value of each."""
        return iter(self._fields)

    def get(self, name: str, default: str | None = None) -> str | None:
        """The first value of `name`, whatever the case."""
        wanted = name.lower()
        return next((v for n, v in self._fields if n.lower() == wanted), default)


class Answer(http.client.HTTPResponse):
    """An answer: its head is complete before `begin` returns, interim ones (1xx) skipped; `read1`
    knows the end of the body from an end of the connection."""

    headers: Any
    msg: Any

    def __init__(self, sock: socket.socket, method: str) -> None:
        super().__init__(sock, method=method)
        self._sock = sock
        try:
            self.begin()
        except BaseException:
            self.close()
            raise

    def begin(self) -> None:
        """Read the head. Raises OSError, or http.client.HTTPException for what is no valid one."""
        fp: Any = self.fp
        status, reason, version = self._status_line()
        while 100 <= status < 200:
            if status == http.HTTPStatus.SWITCHING_PROTOCOLS:
                raise http.client.BadStatusLine("101 without having been asked to upgrade")
            _read_fields(fp)
            status, reason, version = self._status_line()
        self.code = self.status = status
        self.reason = reason.strip()
        self.version = 10 if version in ("HTTP/1.0", "HTTP/0.9") else 11
        self.headers = self.msg = Head(_read_fields(fp))
        self.chunked = (self.headers.get("transfer-encoding") or "").lower() == "chunked"
        self.chunk_left = None
        self.length = None if self.chunked else _length(self.headers)
        if status in (204, 304) or self._method == "HEAD":  # type: ignore[attr-defined]
            self.length = 0
        self.will_close = True  # a connection serves one exchange

    def _status_line(self) -> tuple[int, str, str]:
        version, status, reason = self._read_status()  # type: ignore[attr-defined]
        if not version.startswith("HTTP/1."):
            raise http.client.UnknownProtocol(version)
        return status, reason, version

    @property
    def length_remaining(self) -> int | None:
        """Bytes of the body still to come; None where that is not known before its end."""
        return self.length

    def read1(self, n: int = -1, *, decode_content: bool = False) -> bytes:  # noqa: ARG002
        """The next bytes of the body as they come, undecoded, at most `n`; b"" at its end.
        Raises IncompleteRead if it breaks off. The other parameter is urllib3's."""
        data = super().read1(n)
        if not data and self.length:
            raise http.client.IncompleteRead(b"", self.length)
        return data

    @property
    def reader(self) -> Any:
        """What buffers the socket; None once the body was read to its end."""
        return self.fp

    def close(self) -> None:
        super().close()
        self._sock.close()


def _read_fields(fp: Any) -> list[tuple[str, str]]:
    """The headers up to the empty line. Continued lines are joined (RFC 9112 section 5.2)."""
    fields: list[tuple[str, str]] = []
    while True:
        line = fp.readline(_LONGEST_LINE + 1)
        if len(line) > _LONGEST_LINE:
            raise http.client.LineTooLong("header line")
        if not line:
            raise http.client.RemoteDisconnected("connection closed within the answer's head")
        if line in (b"\r\n", b"\n"):
            return fields
        if len(fields) >= _MOST_HEADERS:
            raise http.client.HTTPException(f"got more than {_MOST_HEADERS} headers")
        text = line.decode("latin-1").rstrip("\r\n")
        if text[0] in " \t" and fields:
            name, before = fields[-1]
            fields[-1] = (name, f"{before} {text.strip()}".strip())
            continue
        name, colon, value = text.partition(":")
        if not colon or not _FIELD.fullmatch(name):
            # What comes after it, the framing perhaps, cannot be relied on.
            raise http.client.HTTPException("malformed header")
        fields.append((name, value.strip(" \t")))


def _length(head: Head) -> int | None:
    """The length that the head gives, None if it gives none that can be read. Raises
    HTTPException for several that differ."""
    given = {value for name, value in head.items() if name.lower() == "content-length"}
    if len(given) > 1:
        raise http.client.HTTPException("two lengths that differ")
    text = given.pop() if given else ""
    return int(text) if text.isascii() and text.isdigit() else None
