"""One-shot HTTP connections for `requests`, each open to being ended from another thread.

Every exchange opens a connection of its own and closes it at its end. On loopback that costs a
tenth of a millisecond; in return an idle connection that the consumer closes just as it is
reused, after which nobody can know whether the job ran, cannot happen, and a consumer that
serves one connection at a time is never blocked by an idle one.
"""

from __future__ import annotations

import http
import http.client
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Protocol

import requests.adapters
import urllib3.connection
import urllib3.connectionpool


class Dial(Protocol):
    """What a connection tells, and asks of, the exchange it is opened for."""

    @property
    def target(self) -> str:
        """The request target, to be sent to the letter."""

    def connected(self, sock: Any) -> None:
        """The socket is open. May raise OSError to end the exchange at once."""


class _CurrentDial(threading.local):
    dial: Dial | None = None


_current = _CurrentDial()


@contextmanager
def dialling(dial: Dial) -> Iterator[None]:
    """Connections opened by this thread meanwhile belong to `dial`."""
    _current.dial = dial
    try:
        yield
    finally:
        _current.dial = None


class _EndOfHeadChecked:
    """Reads a head, and takes the end of the connection for what it is. http.client would take
    it for the end of the head."""

    def __init__(self, reader: BinaryIO) -> None:
        self._reader = reader

    def readline(self, limit: int) -> bytes:
        line = self._reader.readline(limit)
        if not line:
            raise http.client.RemoteDisconnected("connection closed within the answer's head")
        return line

    def close(self) -> None:
        self._reader.close()


class _Response(http.client.HTTPResponse):
    """An answer whose head is complete, with any interim answers (1xx) before it skipped."""

    def begin(self) -> None:
        reader: Any = self.fp
        self.fp: Any = _EndOfHeadChecked(reader)
        super().begin()
        while 100 <= self.status < 200:
            if self.status == http.HTTPStatus.SWITCHING_PROTOCOLS:
                raise http.client.BadStatusLine("101 without having been asked to upgrade")
            self.headers: Any = None
            super().begin()
        if not self.headers.is_multipart() and self.headers.get_payload():
            # The parser gave up at a line that is no header: what came after it, the framing
            # perhaps, is lost.
            raise http.client.HTTPException("malformed header")
        if self.fp is not None:
            self.fp = reader


class _Announced:
    """Mixed into urllib3's connections: hands the socket over as soon as there is one, and
    sends the exact target, which urllib3 would otherwise normalise."""

    response_class: Any = _Response
    sock: Any

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]  # the mixin's base is a connection
        if _current.dial is not None:
            _current.dial.connected(self.sock)

    def send(self, data: Any) -> None:
        """Send, unless the consumer has answered already: it will not read the rest, and might
        neither close. urllib3 takes a broken pipe for that, and reads the answer."""
        if self.sock is not None and _answered_early(self.sock):
            raise BrokenPipeError("the consumer answered before it had read the request")
        super().send(data)  # type: ignore[misc]

    def putrequest(
        self, method: str, url: str, skip_host: bool = False, skip_accept_encoding: bool = False
    ) -> None:
        if _current.dial is not None:
            url = _current.dial.target
        super().putrequest(  # type: ignore[misc]
            method, url, skip_host=skip_host, skip_accept_encoding=skip_accept_encoding
        )


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


class _HTTPConnection(_Announced, urllib3.connection.HTTPConnection):
    pass


class _HTTPSConnection(_Announced, urllib3.connection.HTTPSConnection):
    pass


class _CloseAfterUse:
    """Mixed into urllib3's pools: a connection handed back is closed, never kept."""

    def _put_conn(self, conn: Any) -> None:
        if conn is not None:
            conn.close()


class _HTTPPool(_CloseAfterUse, urllib3.connectionpool.HTTPConnectionPool):
    ConnectionCls = _HTTPConnection


class _HTTPSPool(_CloseAfterUse, urllib3.connectionpool.HTTPSConnectionPool):
    ConnectionCls = _HTTPSConnection


class OneShotAdapter(requests.adapters.HTTPAdapter):
    """A `requests` adapter whose connections serve one exchange each. Safe from any thread."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
