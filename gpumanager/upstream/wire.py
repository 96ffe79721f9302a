"""A connection for one request and its answer, which never waits for the peer without a bound."""

from __future__ import annotations

import contextlib
import http
import io
import ipaddress
import os
import re
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import IO

import certifi

from gpumanager.upstream.parsing import Body, BrokenAnswer, HeadReader, InvalidAnswer, body_of

PIECE_BYTES = 64 * 1024
"""Of a body that is being sent."""

READ_BYTES = 64 * 1024
"""Of an answer, where nobody says how much."""

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
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


class Wire:
    """An open connection for one request and its answer. It stands where `requests` has one of
    urllib3's responses. One thread owns it; any may `shut` it.

    `timeout` is how long, in seconds, the owner's calls wait for the peer to take or say anything.
    `status`, `reason` and `fields` (the headers in their order, repeated ones kept) are there after
    `await_head`, and then `read1` gives the body. `length_remaining` is how many bytes of that are
    still to come from `read1`; None where that is not known yet. `close` is idempotent.
    """

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        sock.setblocking(False)
        self.close: Callable[[], object] = sock.close
        self._sock = sock
        self._poll = select.poll()
        self.timeout = timeout
        self._method = ""
        self._head = HeadReader()
        self._body: Body | None = None
        self._content = b""
        self._behind = b""
        self._fault: Exception | None = None
        self.status = 0
        self.reason = ""
        self.fields: list[tuple[str, str]] = []
        self.length_remaining: int | None = None

    def shut(self) -> None:
        """End it, from any thread: the peer sees it at once, and the owner's call sees an end.

        The socket itself is shut: `SSLSocket.shutdown` would have the owner read on without
        decrypting, and take the peer's last records for content.
        """
        with contextlib.suppress(OSError):  # the peer was faster
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def twin(self) -> socket.socket:
        """The same connection once more, without TLS, and open when this one is closed."""
        return socket.socket(fileno=os.dup(self._sock.fileno()))

    def hand_over(self) -> tuple[socket.socket, bytes]:
        """After a 101: the socket, which does not block and is the caller's from now on, and what
        has come on it behind the head. `close` does nothing any more."""
        self.close = lambda: None
        return self._sock, self._behind

    def shake_hands(self) -> None:
        """Begin TLS, where the connection has it. Raises OSError."""
        until = time.monotonic() + self.timeout
        while isinstance(self._sock, ssl.SSLSocket):
            try:
                self._sock.do_handshake()
                return
            except ssl.SSLWantReadError:
                self._await(select.POLLIN, until)
            except ssl.SSLWantWriteError:
                self._await(select.POLLOUT, until)

    def send(
        self, method: str, head: bytes, body: bytes | IO[bytes] | None, *, upgrade: bool = False
    ) -> None:
        """Send a request. Whatever comes meanwhile is taken in; once the head of the answer is
        complete, the rest is not sent: a consumer that answers before it has read all may read no
        more. `upgrade`: it asks for another protocol, so that 101 is an answer. Raises as
        `await_head`, but not for a peer that closed its end: there may be an answer."""
        self._method = method
        if upgrade:
            self._head = HeadReader(upgrade=True)
        source = io.BytesIO(body or b"") if body is None or isinstance(body, bytes) else body
        piece = head + source.read(max(0, PIECE_BYTES - len(head)))
        rest = memoryview(piece)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while rest:
                wanted = select.POLLIN | select.POLLOUT
                try:
                    rest = rest[self._sock.send(rest) :]
                except (BlockingIOError, ssl.SSLWantWriteError):
                    pass
                except ssl.SSLWantReadError:
                    wanted = select.POLLIN
                if not rest and len(piece) < PIECE_BYTES:
                    return  # that was the last one, or the only one
                came = self._await(wanted, time.monotonic() + self.timeout)
                while came & ~select.POLLOUT and (data := self._receive_now()) is not None:
                    self._hear(data)
                    if self._body is not None:
                        return
                if not rest:
                    piece = source.read(PIECE_BYTES)
                    rest = memoryview(piece)

    def await_head(self) -> None:
        """Return when the head of the answer is complete. Raises OSError, and InvalidAnswer or
        BrokenAnswer if it never will be."""
        while self._body is None:
            if self._fault is not None:
                raise self._fault
            self._hear(self.receive(READ_BYTES))

    def read1(self, n: int = -1, *, decode_content: bool = False) -> bytes:  # noqa: ARG002
        """The next bytes of the body as they come, undecoded, at most `n`; b"" at its end. Raises
        OSError, InvalidAnswer or BrokenAnswer if it breaks off. `decode_content` is there because
        urllib3 has it."""
        most = n if n > 0 else READ_BYTES
        while not self._content and self.length_remaining != 0:
            if self._fault is not None:
                raise self._fault
            self._hear(self.receive(most))
        content, self._content = self._content[:most], self._content[most:]
        if self.length_remaining is not None:
            self.length_remaining -= len(content)
        return content

    def ready(self, timeout: float = 0.0) -> bool:
        """True if `read1` would not have to wait. Looks again if something comes within `timeout`
        seconds. What has come already is taken in; what of it is framing makes nothing ready."""
        while not self._content and self._fault is None and self.length_remaining != 0:
            try:
                data = self._receive_now()
            except OSError as error:
                self._fault = error  # said once only: without it the end would look like a good one
                break
            if data is not None:
                self._hear(data)
            elif timeout > 0:
                self._poll.register(self._sock, select.POLLIN)
                self._poll.poll(timeout * 1000)
                timeout = 0.0
            else:
                return False
        return True

    def receive(self, most: int) -> bytes:
        """The next bytes, at most `most`; b"" at the end. Raises OSError."""
        until = time.monotonic() + self.timeout
        while True:
            try:
                return self._sock.recv(most)
            except (BlockingIOError, ssl.SSLWantReadError):
                self._await(select.POLLIN, until)
            except ssl.SSLWantWriteError:
                self._await(select.POLLOUT, until)

    def _receive_now(self) -> bytes | None:
        """What has come already; None if nothing has. Raises OSError."""
        try:
            return self._sock.recv(READ_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None

    def _hear(self, data: bytes) -> None:
        """Take in what came; b"" is the end of the connection."""
        body = self._body
        if body is None:
            head = self._head
            try:
                rest = head.feed(data)
                if rest is None:
                    return
                body = self._body = body_of(self._method, head.status, head.fields)
            except (InvalidAnswer, BrokenAnswer) as error:
                self._fault = error
                raise
            self.status, self.reason, self.fields = head.status, head.reason, head.fields
            self.length_remaining = body.left
            if not rest:
                return
            data = rest
        if self.status == http.HTTPStatus.SWITCHING_PROTOCOLS:
            self._behind += data  # in the other protocol
        elif body.left != 0:
            self._content += body.feed(data)
            left, self._fault = body.left, body.fault
            self.length_remaining = None if left is None else left + len(self._content)

    def _await(self, events: int, until: float) -> int:
        """The events that came. Raises TimeoutError."""
        self._poll.register(self._sock, events)
        came = self._poll.poll(max(0.0, until - time.monotonic()) * 1000)
        if not came:
            raise TimeoutError("timed out")
        return came[0][1]


def connect(
    host: str,
    port: int,
    *,
    timeout: float,
    tls: ssl.SSLContext | None,
    address: str | None = None,
) -> Wire:
    """An open connection, on which TLS has yet to begin if it is to have it; `timeout` in seconds
    for each address that the host has. `address`: the one to connect to; None: the host is looked
    up. Raises OSError."""
    to = host if address is None else address
    family = _family(to)
    if family is None:
        sock = socket.create_connection((to, port), timeout)
    else:
        sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family is not None:
            sock.settimeout(timeout)
            sock.connect((to, port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            sock = tls.wrap_socket(
                sock,
                server_hostname=host,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=False,  # or a cut connection would pass for the end
            )
        return Wire(sock, timeout)
    except BaseException:
        sock.close()
        raise


@lru_cache(maxsize=1024)
def _family(host: str) -> socket.AddressFamily | None:
    """The family of an address; None for a name, which has to be looked up."""
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return None
    return socket.AF_INET6 if version == 6 else socket.AF_INET


def trust(ca_file: str | None) -> ssl.SSLContext:
    """Trust in who signed with one of `ca_file`; None: of SSL_CERT_FILE, as other programs do, or
    of the public authorities. A file that was changed is read again. Raises OSError."""
    file = ca_file or os.environ.get("SSL_CERT_FILE") or certifi.where()
    try:
        return _trust(file, os.stat(file).st_mtime_ns)
    except OSError as error:
        what = "its ca_file" if ca_file else "SSL_CERT_FILE"
        raise OSError(error.errno, f"no certificates in {what}: {error.strerror}") from error


@lru_cache(maxsize=64)
def _trust(file: str, changed_ns: int) -> ssl.SSLContext:  # noqa: ARG001  # a part of the key
    return ssl.create_default_context(cafile=file)
