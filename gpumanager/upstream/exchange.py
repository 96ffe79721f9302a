"""One request to a consumer and its answer, streamed, bounded in time, and stoppable from
another thread."""

from __future__ import annotations

import contextlib
import http
import select
import socket
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import IO, Any
from urllib.parse import urlsplit

import urllib3

from gpumanager.addresses import is_loopback
from gpumanager.clock import Clock
from gpumanager.config import Timeouts
from gpumanager.errors import BadRequest, BrokerError, ConsumerTimeout
from gpumanager.upstream.headers import check_switch, printable, relayable
from gpumanager.upstream.parsing import BrokenAnswer, InvalidAnswer
from gpumanager.upstream.reasons import explained, too_late
from gpumanager.upstream.transport import ADAPTER, Request, is_hooked
from gpumanager.upstream.watcher import Watcher
from gpumanager.upstream.wire import Wire, connect, serialise, trust

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
    has to have signed the certificate of an https host, None: the usual ones; `upgrade` is the
    protocol that the connection is to speak from the answer on, None: HTTP; `address` is where to
    connect to, None: the host is looked up."""

    method: str
    base_url: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes | IO[bytes] | None = None
    length: int | None = None
    ca_file: str | None = None
    upgrade: str | None = None
    address: str | None = None


class Exchange:
    """Owned by one thread, which calls `send`, then `read` until it returns b"", and `close`
    in a `finally`. Any thread may call `abort`. All that can be prepared is prepared when it is
    made: raises BadRequest for what cannot be sent.

    `reached`: the consumer has accepted the connection, `begun`, and was sent the request.
    `aborted`: it was ended by `abort`. `timed_out`: it has ended with a ConsumerTimeout.
    `consumer_done`: nothing more comes from the consumer, read by the owner or not.
    """

    def __init__(
        self, consumer: str, outbound: Outbound, timeouts: Timeouts, watcher: Watcher, clock: Clock
    ) -> None:
        self._consumer = consumer
        self._outbound = outbound
        self._timeouts = timeouts
        self._watcher = watcher
        self._clock = clock
        body, self._headers = outbound.body, list(outbound.headers)
        if outbound.length is not None:
            self._headers.append(("Content-Length", str(outbound.length)))
        if outbound.upgrade is None:
            self._headers.append(("Connection", "close"))
        else:
            self._headers += [("Connection", "Upgrade"), ("Upgrade", outbound.upgrade)]
        self._address = _address(outbound.base_url)
        try:
            self._head = serialise(
                outbound.method, outbound.target, self._address[3], self._headers
            )
        except ValueError as error:
            message = f"the request cannot be sent to {consumer}: {error}"
            raise BadRequest(message, consumer=consumer) from None
        self._body_at = 0 if body is None or isinstance(body, bytes) else body.tell()
        self._guard = threading.Lock()
        self._wire: Wire | None = None
        self._failure: BrokerError | None = None
        self._discarded: BrokerError | None = None
        self._kept = False
        self._rest: socket.socket | None = None
        self._bound = (0.0, "", 0.0)
        self._unwatch: Callable[[], object] | None = None
        self._raw: Any = None
        self._ahead: deque[bytes] = deque()
        self.begun: Wire | None = None
        self.reached = self.aborted = self.timed_out = self.consumer_done = False
        self.status = 0
        self.reason = ""
        self.headers: list[tuple[str, str]] = []

    # -- any thread ------------------------------------------------------------------------

    def abort(self, error: BrokerError) -> bool:
        """End it: the connection is shut down, which the consumer sees at once, and the owner's
        call raises `error`. False if it was over already."""
        with self._guard:
            if self.consumer_done:
                return False
            if self._failure is None:
                self._failure = error
                self.aborted = True
                self.timed_out = isinstance(error, ConsumerTimeout)
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
        return self.consumer_done and not self._ahead

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

    def send_ahead(self) -> None:
        """Connect and send, where that can be done without a wait: a small request to this
        machine, with nobody in between who is to see it first. For any thread, once, before the
        owner's `send`, which goes on from there, or does all of it. Never raises."""
        host, _, tls, _ = self._address
        body = self._outbound.body
        small = body is None or (isinstance(body, bytes) and len(body) <= AHEAD_BYTES)
        if small and not tls and is_loopback(host) and not is_hooked():
            with contextlib.suppress(
                OSError, urllib3.exceptions.HTTPError, InvalidAnswer, BrokenAnswer
            ):
                self._begin(AHEAD_S)

    def send(self) -> None:
        """Send the request and return when the answer's head is there.

        Raises ConsumerUnreachable, ConsumerTimeout, BadRequest for what cannot be sent, or the
        error of `abort`.
        """
        timeouts, outbound = self._timeouts, self._outbound
        began = self._clock.monotonic()
        to_head = timeouts.connect + timeouts.first_byte
        whole = (began + timeouts.total, "not done", timeouts.total)
        if to_head < timeouts.total and not self._kept:
            self._bound = (began + to_head, "no answer", timeouts.first_byte)
        else:
            self._bound = whole
        self._unwatch = self._watcher.watch(self._is_overdue, self._abort_overdue)
        url = outbound.base_url + outbound.target
        request = Request(outbound.method, url, self._headers, outbound.body, self)
        try:
            response = ADAPTER.send(
                request, stream=True, timeout=_timeout(timeouts.connect), proxies={}
            )
        except Exception as error:
            self.close(for_good=False)
            raise self._explain(error) from error
        self._bound = whole
        if self._wire is not None:
            self._wire.timeout = timeouts.idle
        self._raw = raw = response.raw
        if self.aborted or self._discarded is not None:
            self._raise_unwanted()
        self.status, self.reason = response.status_code, response.reason or ""
        if not self.reason.isprintable():
            self.reason = printable(self.reason)
        try:
            fields = raw.fields if isinstance(raw, Wire) else raw.headers.items()
            if self.status == http.HTTPStatus.SWITCHING_PROTOCOLS:
                check_switch(fields, outbound.upgrade)
            self.headers = relayable(self.status, fields)
        except ValueError as error:
            self.close()
            raise self._explain(InvalidAnswer(str(error))) from error
        self.take_in()

    def take_in(self) -> None:
        """What has come of the body already, have it at once; `read` returns it. If it is all, the
        consumer is done, and whoever waits for it need not wait for what becomes of the answer
        here; if it is broken, nothing of the answer was handed on yet. Raises as `read`."""
        come = not self._ahead and isinstance(self._raw, Wire) and self._raw.ready()
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

    def hand_over(self) -> tuple[socket.socket, bytes]:
        """After the answer 101: the connection, which is the caller's from now on, and what has
        come on it behind the answer."""
        wire: Wire = self._raw
        return wire.hand_over()

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
        if self.consumer_done:
            return b""
        try:
            data: bytes = self._raw.read1(READ_BYTES, decode_content=False)
        except Exception as error:
            self.close(for_good=False)
            raise self._explain(error) from error
        if self.aborted or self._discarded is not None:
            self._raise_unwanted()
        if not data or self._raw.length_remaining == 0:
            self._end()
        return data

    def ready(self, timeout: float = 0.0) -> bool:
        """True if `read` would not have to wait, within `timeout` seconds."""
        if self._ahead or self.consumer_done or not isinstance(self._raw, Wire):
            return True
        return self._raw.ready(timeout)

    def drain(self) -> None:
        """Read the rest and drop it, within the time-outs. Never raises."""
        with contextlib.suppress(BrokerError):
            while self._raw is not None and self.read():
                pass

    def close(self, *, for_good: bool = True) -> None:
        """Read no more. Idempotent, never raises. If it is not `for_good`, a connection that was
        kept stays open."""
        if not self.consumer_done:
            self._end()
        answer = self.begun if self._raw is None else self._raw
        if answer is not None:
            answer.close()
        if for_good and self._rest is not None:
            self._rest.close()

    def _end(self) -> None:
        """Nothing more comes. The connection is closed later: that takes a while, in which the
        next job could run."""
        with self._guard:
            self.consumer_done = True
            self._wire = None
        if self._unwatch is not None:
            self._unwatch()

    def _raise_unwanted(self) -> None:
        """Raise the error of `abort`: what was read since may be the end that it made. Or that of
        `discard`, once the consumer has finished."""
        with self._guard:
            failure, discarded, self._discarded = self._failure, self._discarded, None
        if failure is not None:
            self.close(for_good=False)
            raise failure
        if discarded is not None:
            self.drain()
            self.close(for_good=False)
            raise discarded

    # -- on behalf of `requests` -----------------------------------------------------------

    def urlopen(self, *, timeout: Any, **_: Any) -> Wire:
        """Return with the head of the answer. Raises what a pool of urllib3's would, and
        InvalidAnswer or BrokenAnswer."""
        wire = self._begin(timeout.connect_timeout) if self.begun is None else self.begun
        wire.await_head()
        return wire

    def _begin(self, timeout: float) -> Wire:
        """Connect and send. Whatever this raises, `begun` is what there is to go on with."""
        host, port, tls, _ = self._address
        trusted = trust(self._outbound.ca_file) if tls else None
        try:
            address = self._outbound.address
            wire = connect(host, port, timeout=timeout, tls=trusted, address=address)
            try:
                with self._guard:
                    if self.aborted:
                        raise OSError("aborted")
                    self._wire = wire
                    if self._kept:
                        self._rest = wire.twin()
                if tls:
                    wire.shake_hands()
            except BaseException:
                wire.close()
                raise
        except TimeoutError as error:
            raise urllib3.exceptions.ConnectTimeoutError(str(error)) from error
        self.reached, self.begun = True, wire
        wire.timeout = self._timeouts.first_byte
        outbound = self._outbound
        upgrade = outbound.upgrade is not None
        wire.send(outbound.method, self._head, outbound.body, upgrade=upgrade)
        return wire

    # -- inside ----------------------------------------------------------------------------

    def _is_overdue(self) -> bool:
        return self._clock.monotonic() >= self._bound[0]

    def _abort_overdue(self) -> None:
        _, what, seconds = self._bound
        self.abort(too_late(self._consumer, what, seconds))

    def _explain(self, error: Exception) -> BrokerError:
        """The broker's error for what `requests`, urllib3 or the socket raised."""
        with self._guard:
            if self._failure is not None:
                return self._failure
        found = explained(error, self._consumer, self._timeouts, answered=self._raw is not None)
        self.timed_out = isinstance(found, ConsumerTimeout)
        return found


@lru_cache(maxsize=1024)
def _address(base_url: str) -> tuple[str, int, bool, str]:
    """Host, port, whether to speak TLS, and what goes into Host."""
    parts = urlsplit(base_url)
    tls = parts.scheme == "https"
    return parts.hostname or "", parts.port or (443 if tls else 80), tls, parts.netloc


@cache
def _timeout(connect_s: float) -> Any:
    """As `requests` would make of a number, each time."""
    return urllib3.Timeout(connect=connect_s)
