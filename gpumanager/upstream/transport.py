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
from contextlib import contextmanager, suppress
from types import FunctionType
from typing import IO, Any, Protocol

import requests
import requests.adapters
import urllib3.exceptions

from gpumanager.upstream.answer import Answer
from gpumanager.upstream.parsing import BrokenAnswer, InvalidAnswer
from gpumanager.upstream.wire import Wire, connect, trust


class Dial(Protocol):
    """What a connection is told by, and tells, the exchange it is opened for."""

    @property
    def address(self) -> tuple[str, int, bool]:
        """Host, port, and whether to speak TLS."""

    @property
    def ca_file(self) -> str | None:
        """The certificates that the host's own must be signed by; None: the usual ones."""

    @property
    def head(self) -> bytes:
        """The head of the request, to be sent to the letter."""

    @property
    def body(self) -> bytes | IO[bytes] | None:
        """What comes after it."""

    @property
    def begun(self) -> Answer | None:
        """The answer to come, if the request was sent ahead."""

    def connected(self, wire: Wire) -> None:
        """The connection is open, and TLS yet to begin. May raise OSError to end the exchange."""


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

    def urlopen(self, *, method: str, timeout: Any, **_: Any) -> Answer:
        """Make the current dial's exchange up to the head of the answer."""
        dial = _current.dial
        if dial is None:
            raise RuntimeError("a request outside of an exchange")
        answer = dial.begun
        if answer is not None:
            answer.await_head()
            return answer
        wire = _connected(dial, timeout.connect_timeout)
        try:
            answer = Answer(wire, method)
            wire.send(dial.head, dial.body, answer.hear)
            answer.await_head()
        except BaseException:
            wire.close()
            raise
        return answer


def _connected(dial: Dial, timeout: float) -> Wire:
    host, port, tls = dial.address
    try:
        wire = connect(host, port, timeout=timeout, tls=trust(dial.ca_file) if tls else None)
        try:
            dial.connected(wire)
        except BaseException:
            wire.close()
            raise
    except TimeoutError as error:
        raise urllib3.exceptions.ConnectTimeoutError(str(error)) from error
    return wire


class OneShotAdapter(requests.adapters.HTTPAdapter):
    """A `requests` adapter whose connections serve one exchange each. Safe from any thread."""

    def send_ahead(self, dial: Dial, method: str, timeout: float) -> Answer | None:
        """Send a request that `send` is going to be called for, and not wait for its answer. None,
        and nothing was sent, if there is no connection within `timeout` seconds, or if `send` is
        no longer that of `requests`: whoever put himself there, as mocks do, is to see the request
        before the consumer does, or instead of it."""
        send = type(self).send
        if not isinstance(send, FunctionType) or send.__globals__ is not vars(requests.adapters):
            return None
        try:
            wire = _connected(dial, timeout)
        except (OSError, urllib3.exceptions.ConnectTimeoutError):
            return None
        answer = Answer(wire, method)
        with suppress(OSError, InvalidAnswer, BrokenAnswer):  # `await_head` will say it
            wire.send(dial.head, dial.body, answer.hear)
        return answer

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
