"""One-shot HTTP connections for `requests`, each open to being ended from another thread.

Every exchange opens a connection of its own and closes it at its end. On loopback that costs less
than a tenth of a millisecond; in return an idle connection that the consumer closes just as it is
reused, after which nobody can know whether the job ran, cannot happen, and a consumer that
serves one connection at a time is never blocked by an idle one.

`requests` is kept for its adapter, which is where the field's tools hook in. What it would do
before and after each request (a pool's keys, a dictionary of headers, cookies) is left out: see
docs/performance.md.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Protocol

import requests
import requests.adapters
import urllib3.exceptions

from gpumanager.upstream import wire


class Dial(Protocol):
    """What a connection is told by, and tells, the exchange it is opened for."""

    @property
    def address(self) -> tuple[str, int, bool]:
        """Host, port, and whether to speak TLS."""

    @property
    def head(self) -> bytes:
        """The head of the request, to be sent to the letter."""

    @property
    def body(self) -> bytes | IO[bytes] | None:
        """What comes after it."""

    @property
    def started(self) -> Any:
        """A socket over which the request was sent already; None if there is none."""

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


class _OneShot:
    """In the place of one of urllib3's pools."""

    def urlopen(self, *, method: str, timeout: Any, **_: Any) -> wire.Answer:
        """Make the current dial's exchange up to the head of the answer."""
        dial = _current.dial
        if dial is None:
            raise RuntimeError("a request outside of an exchange")
        sock, sent = dial.started, dial.started is not None
        if not sent:
            host, port, tls = dial.address
            try:
                sock = wire.connect(host, port, tls=tls, timeout=timeout.connect_timeout)
            except TimeoutError as error:
                raise urllib3.exceptions.ConnectTimeoutError(str(error)) from error
        try:
            dial.connected(sock)
            if not sent:
                wire.send(sock, dial.head, dial.body)
            return wire.Answer(sock, method)
        except BaseException:
            sock.close()
            raise


class OneShotAdapter(requests.adapters.HTTPAdapter):
    """A `requests` adapter whose connections serve one exchange each. Safe from any thread."""

    def get_connection_with_tls_context(self, *_: Any, **__: Any) -> Any:
        return _ONE_SHOT

    def cert_verify(self, *_: Any, **__: Any) -> None:
        """Done where the connection is opened."""

    def request_url(self, request: Any, proxies: Any) -> str:  # noqa: ARG002
        return ""  # the head has the exact target

    def build_response(self, req: Any, resp: Any) -> requests.Response:
        response = requests.Response()
        response.status_code = resp.status
        response.reason = resp.reason
        response.raw = resp
        response.request = req
        return response


_ONE_SHOT = _OneShot()
