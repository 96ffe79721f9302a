"""One request to a consumer and its answer, streamed, bounded in time, and stoppable from
another thread."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import IO, Any
from urllib.parse import urlsplit

import requests
import urllib3

from gpumanager.addresses import is_loopback
from gpumanager.clock import Clock
from gpumanager.config import Timeouts
from gpumanager.errors import BadRequest, BrokerError, ConsumerTimeout, ConsumerUnreachable
from gpumanager.upstream.answer import Answer
from gpumanager.upstream.headers import printable, relayable
from gpumanager.upstream.parsing import InvalidAnswer
from gpumanager.upstream.reasons import in_words, links
from gpumanager.upstream.transport import OneShotAdapter, dialling
from gpumanager.upstream.watcher import Watcher
from gpumanager.upstream.wire import Wire, serialise

READ_BYTES = 256 * 1024

AHEAD_BYTES = 8 * 1024
"""The largest body of a request that is sent by whoever hands the GPU over: any socket's buffer
has room for that."""

AHEAD_S = 0.05
"""For a connection on this machine, which is there in a tenth of a millisecond, or not at all."""


@dataclass(frozen=True, slots=True)
class Outbound:
    """What is sent. `target` is path and query, to the letter; `body` is bytes, or a file of
    `length` bytes; `headers` are end-to-end ones without Host and Content-Length; `ca_file` is who
    has to have signed the certificate of an https host, None: the usual ones."""

    method: str
    base_url: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes | IO[bytes] | None = None
    length: int | None = None
    ca_file: str | None = None


class Exchange:
    """Owned by one thread, which calls `send`, then `read` until it returns b"", and `close`
    in a `finally`. Any thread may call `abort`. All that can be prepared is prepared when it is
    made: raises BadRequest for what cannot be sent.
    """

    def __init__(
        self, consumer: str, outbound: Outbound, timeouts: Timeouts, watcher: Watcher, clock: Clock
    ) -> None:
        self._consumer = consumer
        self._outbound = outbound
        self._address = _address(outbound.base_url)
        self._prepared = self._prepare()
        body = outbound.body
        self._body_at = 0 if body is None or isinstance(body, bytes) else body.tell()
        self._timeouts = timeouts
        self._watcher = watcher
        self._clock = clock
        self._guard = threading.Lock()
        self._wire: Wire | None = None
        self._begun: Answer | None = None
        self._failure: BrokerError | None = None
        self._timed_out = False
        self._kept = False
        self._rest: socket.socket | None = None
        self._discarded: BrokerError | None = None
        self._ended = False
        self._reached = False
        self._unwatch: Callable[[], object] | None = None
        self._deadline = 0.0
        self._overdue: BrokerError | None = None
        self._raw: Any = None
        self._ahead: deque[bytes] = deque()
        self.status = 0
        self.reason = ""
        self.headers: list[tuple[str, str]] = []

    # -- Dial ------------------------------------------------------------------------------

    @property
    def address(self) -> tuple[str, int, bool]:
        return self._address[:3]

    @property
    def ca_file(self) -> str | None:
        return self._outbound.ca_file

    @property
    def head(self) -> bytes:
        return self._head

    @property
    def body(self) -> bytes | IO[bytes] | None:
        return self._outbound.body

    def connected(self, wire: Wire) -> None:
        with self._guard:
            if self._failure is not None:
                raise OSError("aborted")
            self._wire = wire
            if self._kept:
                self._rest = wire.twin()
        wire.shake_hands()
        wire.timeout = self._timeouts.first_byte
        self._reached = True

    # -- any thread ------------------------------------------------------------------------

    def abort(self, error: BrokerError) -> bool:
        """End it: the connection is shut down, which the consumer sees at once, and the owner's
        call raises `error`. False if it was over already."""
        with self._guard:
            if self._ended:
                return False
            if self._failure is None:
                self._failure = error
                self._timed_out = isinstance(error, ConsumerTimeout)
            if self._wire is not None:
                self._wire.shut()
            return True

    def discard(self, error: BrokerError) -> None:
        """Let the consumer finish, but drop its answer; the owner's call raises `error` then.
        For a consumer that would work on if its connection were closed."""
        with self._guard:
            if self._discarded is None:
                self._discarded = error

    # -- the owner -------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """True once the answer was read to its end, broke off, or was closed."""
        return self._ended and not self._ahead

    @property
    def consumer_done(self) -> bool:
        """True once nothing more comes from the consumer, read by the owner or not."""
        return self._ended

    @property
    def reached(self) -> bool:
        """True once the consumer accepted the connection."""
        return self._reached

    @property
    def aborted(self) -> bool:
        """True if it was ended by `abort`."""
        return self._failure is not None

    @property
    def timed_out(self) -> bool:
        """True if it ended with a ConsumerTimeout."""
        return self._timed_out

    def keep_for_its_end(self) -> None:
        """Before it is sent: if there is no answer in time, keep the connection, for
        `await_its_end`. Then a consumer that drips the head of its answer byte by byte has until
        the total time-out, too."""
        self._kept = True

    def await_its_end(self, seconds: float) -> bool:
        """After a time-out, if it was kept: True once the consumer has closed the connection, as
        it was asked to do at the end of its answer; False if it has not within `seconds`."""
        rest = self._rest
        if rest is None:
            return True
        deadline = self._clock.monotonic() + seconds
        poll = select.poll()
        poll.register(rest, select.POLLIN)
        while True:
            remaining = max(0.0, deadline - self._clock.monotonic())
            if not poll.poll(remaining * 1000):
                return False
            try:
                if not rest.recv(READ_BYTES):
                    return True
            except BlockingIOError:
                continue
            except OSError:
                return True

    def send_ahead(self, adapter: OneShotAdapter) -> None:
        """Connect and send, where that can be done without a wait: a small request to this
        machine. For any thread, once, before the owner's `send`, which goes on from there, or
        does all of it. Never raises."""
        host, _, tls = self.address
        body = self._outbound.body
        small = body is None or (isinstance(body, bytes) and len(body) <= AHEAD_BYTES)
        if small and not tls and is_loopback(host):
            self._begun = adapter.send_ahead(self, self._outbound.method, AHEAD_S)

    @property
    def begun(self) -> Answer | None:
        return self._begun

    def send(self, adapter: OneShotAdapter) -> None:
        """Send the request and return when the answer's head is there.

        Raises ConsumerUnreachable, ConsumerTimeout, BadRequest for what cannot be sent, or the
        error of `abort`.
        """
        timeouts = self._timeouts
        began = self._clock.monotonic()
        to_head = timeouts.connect + timeouts.first_byte
        if to_head < timeouts.total and not self._kept:
            self._bound(began + to_head, f"no answer within {timeouts.first_byte:g} s")
        else:
            self._bound(began + timeouts.total, f"not done within {timeouts.total:g} s")
        self._unwatch = self._watcher.watch(self._is_overdue, self._abort_overdue)
        try:
            with dialling(self):
                response = adapter.send(
                    self._prepared, stream=True, timeout=_timeout(timeouts.connect), proxies={}
                )
        except Exception as error:
            self._stop()
            raise self._explain(error) from error
        self._bound(began + timeouts.total, f"not done within {timeouts.total:g} s")
        if self._wire is not None:
            self._wire.timeout = timeouts.idle
        self._raw = response.raw
        self._raise_if_unwanted()
        self.status = response.status_code
        self.reason = printable(response.reason or "")
        try:
            self.headers = relayable(self.status, self._raw.headers.items())
        except ValueError as error:
            self.close()
            raise self._explain(InvalidAnswer(str(error))) from error
        if self._raw.length_remaining == 0:
            self._end()
        self.take_in()

    def take_in(self) -> None:
        """What has come of the body already, have it at once; `read` returns it. If it is all, the
        consumer is done, and whoever waits for it need not wait for what becomes of the answer
        here; if it is broken, nothing of the answer was handed on yet. Raises as `read`."""
        come = not self._ahead and isinstance(self._raw, Answer) and self._raw.ready()
        if come and (data := self._read_on()):
            self._ahead.append(data)

    def read(self) -> bytes:
        """The next bytes of the body as they come, undecoded; b"" at the end.

        Raises ConsumerUnreachable, ConsumerTimeout or the error of `abort` if it breaks off.
        The exchange ends with the last byte, before that byte is returned.
        """
        return self._ahead.popleft() if self._ahead else self._read_on()

    def rest(self) -> list[bytes]:
        """What `read` would still return, once the consumer is done: it is all there."""
        rest = list(self._ahead)
        self._ahead.clear()
        return rest

    def read_ahead(self, limit: int) -> bytes | None:
        """The whole body, if it has no more than `limit` bytes; None if it has. `read` returns
        what was read here once more. Raises as `read`."""
        parts = list(self._ahead)
        size = sum(map(len, parts))
        while size <= limit:
            data = self._read_on()
            if not data:
                return b"".join(parts)
            parts.append(data)
            self._ahead.append(data)
            size += len(data)
        return None

    def request_line(self, base_path: str) -> tuple[str, str]:
        """The method, and the path behind the consumer's base path, without its query."""
        path = self._outbound.target.partition("?")[0]
        return self._outbound.method, path.removeprefix(base_path)

    def request_text(self, limit: int) -> bytes:
        """What the client said: the target, and of the body at most `limit` bytes. For after the
        request was sent."""
        body = self._outbound.body
        if body is not None and not isinstance(body, bytes):
            try:
                body.seek(self._body_at)
                body = body.read(limit)
            except (OSError, ValueError):
                body = None
        return self._outbound.target.encode() + b"\n" + (body or b"")[:limit]

    def again(self) -> Exchange | None:
        """A new exchange, not yet sent, for the same request; None if its body cannot be had a
        second time."""
        body = self._outbound.body
        if body is not None and not isinstance(body, bytes):
            try:
                body.seek(self._body_at)
            except (OSError, ValueError):
                return None
        return Exchange(self._consumer, self._outbound, self._timeouts, self._watcher, self._clock)

    def _read_on(self) -> bytes:
        if self._ended:
            return b""
        try:
            data: bytes = self._raw.read1(READ_BYTES, decode_content=False)
        except Exception as error:
            self._stop()
            raise self._explain(error) from error
        self._raise_if_unwanted()
        if not data or self._raw.length_remaining == 0:
            self._end()
        return data

    def ready(self, timeout: float = 0.0) -> bool:
        """True if `read` would not have to wait, within `timeout` seconds."""
        if self._ahead or self._ended or not isinstance(self._raw, Answer):
            return True
        return self._raw.ready(timeout)

    def drain(self) -> None:
        """Read the rest and drop it, within the time-outs. Never raises."""
        with contextlib.suppress(BrokerError):
            while self._raw is not None and self.read():
                pass

    def close(self) -> None:
        """Close the connection, for good. Idempotent, never raises."""
        self._stop()
        if self._rest is not None:
            self._rest.close()

    def _stop(self) -> None:
        """Read no more. A connection that was kept stays open."""
        self._end()
        if self._raw is not None:
            self._raw.close()
        elif self._begun is not None:
            self._begun.close()

    def _end(self) -> None:
        """Nothing more comes. The connection is closed later: that takes a while, in which the
        next job could run."""
        with self._guard:
            if self._ended:
                return
            self._ended = True
            self._wire = None
        if self._unwatch is not None:
            self._unwatch()

    def _raise_if_unwanted(self) -> None:
        """Raise the error of `abort`: what was read since may be the end that it made. Or that of
        `discard`, once the consumer has finished."""
        with self._guard:
            failure, discarded, self._discarded = self._failure, self._discarded, None
        if failure is not None:
            self._stop()
            raise failure
        if discarded is not None:
            self.drain()
            self._stop()
            raise discarded

    # -- inside ----------------------------------------------------------------------------

    def _prepare(self) -> requests.PreparedRequest:
        """A request that `requests` has not touched: nothing added, nothing re-encoded."""
        outbound = self._outbound
        headers = list(outbound.headers)
        if outbound.length is not None:
            headers.append(("Content-Length", str(outbound.length)))
        headers.append(("Connection", "close"))
        try:
            self._head = serialise(outbound.method, outbound.target, self._address[3], headers)
        except ValueError as error:
            message = f"the request cannot be sent to {self._consumer}: {error}"
            raise BadRequest(message, consumer=self._consumer) from None
        prepared = requests.PreparedRequest()
        prepared.method = outbound.method
        prepared.url = outbound.base_url + outbound.target
        prepared.headers = dict(headers)  # type: ignore[assignment]  # for whoever looks
        prepared.body = outbound.body  # type: ignore[assignment]  # or a file
        prepared.hooks = {}
        return prepared

    def _bound(self, deadline: float, message: str) -> None:
        """Have the watcher abort at `deadline` (monotonic), which no slow trickle puts off."""
        self._overdue = ConsumerTimeout(f"{self._consumer}: {message}", consumer=self._consumer)
        self._deadline = deadline

    def _is_overdue(self) -> bool:
        return self._clock.monotonic() >= self._deadline

    def _abort_overdue(self) -> None:
        if self._overdue is not None:
            self.abort(self._overdue)

    def _explain(self, error: Exception) -> BrokerError:
        """The broker's error for what `requests`, urllib3 or the socket raised."""
        with self._guard:
            if self._failure is not None:
                return self._failure
        explained = self._named(error)
        self._timed_out = isinstance(explained, ConsumerTimeout)
        return explained

    def _named(self, error: Exception) -> BrokerError:
        name = self._consumer
        chain = list(links(error))
        if any(isinstance(link, ConnectionRefusedError) for link in chain):
            message = f"{name} refused the connection"
            return ConsumerUnreachable(message, consumer=name, nothing_listens=True)
        if any(map(_is_timeout, chain)):
            if any(isinstance(link, urllib3.exceptions.ConnectTimeoutError) for link in chain):
                what, seconds = "no connection", self._timeouts.connect
            elif self._raw is None:
                what, seconds = "no answer", self._timeouts.first_byte
            else:
                what, seconds = "nothing more came", self._timeouts.idle
            return ConsumerTimeout(f"{name}: {what} within {seconds:g} s", consumer=name)
        if isinstance(error, ValueError) and not isinstance(error, requests.RequestException):
            return BadRequest(f"the request cannot be sent to {name}", consumer=name)
        return ConsumerUnreachable(f"{name} {in_words(chain)}", consumer=name)


@cache
def _address(base_url: str) -> tuple[str, int, bool, str]:
    """Host, port, whether to speak TLS, and what goes into Host."""
    parts = urlsplit(base_url)
    tls = parts.scheme == "https"
    return parts.hostname or "", parts.port or (443 if tls else 80), tls, parts.netloc


@cache
def _timeout(connect_s: float) -> Any:
    """As `requests` would make of a number, each time."""
    return urllib3.Timeout(connect=connect_s)


def _is_timeout(link: BaseException) -> bool:
    return isinstance(link, TimeoutError | urllib3.exceptions.TimeoutError)
