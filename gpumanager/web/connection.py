"""A client's connection: waitress's, with bounds on the patience that a client may ask for."""

from __future__ import annotations

import logging
import select
import socket
import struct
import time
from contextlib import suppress
from typing import Any

from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.utilities import Error, InternalServerError

from gpumanager.errors import BrokerError
from gpumanager.web.answering import JsonErrorTask, OneSendTask, Switch
from gpumanager.web.parsing import Admitted, StrictRequestParser, TookTooLong
from gpumanager.web.record import LOCAL_ADDRESS

log = logging.getLogger(__name__)

LEAST_RATE = 1024
"""Bytes a second that a client has to take of an answer that is ready, and to give of a body, on
the average of each `RATE_WINDOW_S`: less than any audio that is played as it comes."""

RATE_WINDOW_S = 60.0

HEAD_S = 15.0
"""What a client has to send the head of a request, from its first byte, or from the connection."""

LINGER_S = 2.0
"""How long a client that sends on after it was refused is listened to, so that it can read why: to
close at once would be a reset, which takes the answer with it."""

LINGER_BYTES = 4 * 1024 * 1024
"""Likewise, how much of it."""

LOOK_S = 0.5
"""How often a connection is looked at."""

ADMIT = "gpumanager.admit"
"""Under this name an application leaves in its `extensions` what is asked before a body is taken:
called with a WSGI environ of the head alone; returns whose key it is, raises BrokerError."""

_WITH_RESET = struct.pack("ii", 1, 0)


class Connection(HTTPChannel):
    """Waitress's channel, which also

    - does not have the main loop turn over and over while a worker is sending: what it has left
      to send afterwards it tells the loop itself;
    - gives a head `HEAD_S`, and cuts a client off that sends its body, or takes its answer, more
      slowly than `LEAST_RATE`;
    - takes no body of a request that will be refused, and lets its client read why;
    - makes way for a new one when there are as many as there may be;
    - notices that a client left that had sent the next request already;
    - reads nothing behind a request that asks for a WebSocket before that is answered, and
      leaves the main loop, open, if the answer is that it is one;
    - never ends in mid-answer with what looks like an orderly end.
    """

    error_task_class = JsonErrorTask
    task_class = OneSendTask

    def __init__(self, server: Any, sock: socket.socket, *args: Any, **more: Any) -> None:
        super().__init__(server, sock, *args, **more)
        self._flushing = False
        self._sent = self._received = 0
        self._giving, self._taking = _Pace(), _Pace()
        now = time.monotonic()
        self._look_at = now + LOOK_S
        self._unchanged_since = now
        self._head_since: float | None = now
        self._parser: StrictRequestParser | None = None
        self._abandoned = False
        self._deaf = False
        self._linger_until: float | None = None
        self._asking: StrictRequestParser | None = None
        self._switch: Switch | None = None
        self.local_address = ""
        with suppress(OSError):  # it may be gone already
            name = sock.getsockname()
            if isinstance(name, tuple):  # a Unix socket has none
                self.local_address = str(name[0])
        if len(self._map) >= self.adj.connection_limit:  # type: ignore[attr-defined]  # not in its stubs
            self._make_way()

    def parser_class(self, adj: Adjustments) -> StrictRequestParser:  # type: ignore[override]
        """Waitress makes its parsers with this."""
        # Behind a middleware it is asked once the body is there.
        asks = ADMIT in getattr(self.server.application, "extensions", {})
        self._parser = StrictRequestParser(adj)
        self._parser.admit = self._admit if asks else None
        return self._parser

    # -- the main loop's thread ------------------------------------------------------------

    def readable(self) -> bool:
        """Whether the main loop is to read. It asks at least once a second, of everybody."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            self._look(now)
        if self._deaf:
            return self.connected
        if self._asking is not None:
            if self.requests or self._switch is not None:
                return False
            self._go_on_in_http(self._asking)
        reads = self.connected and bool(super().readable())
        if self._head_since is not None and (self.requests or not reads):
            self._head_since = now  # it may well wait for an answer first
        return reads

    def handle_read(self) -> None:
        """Read, and drop what comes after a request that was refused."""
        if not self._deaf:
            super().handle_read()
            return
        with suppress(OSError):
            self._received += len(self.recv(self.adj.recv_bytes))  # closes it at the end
        if self._linger_until is not None and self._received > LINGER_BYTES:
            self.handle_close()

    def received(self, data: bytes) -> bool:
        """As waitress's, with an eye on how far the request is."""
        self._received += len(data)
        before = self.request
        try:
            taken = super().received(data)
        except OSError as error:  # large bodies are kept in files
            log.error(  # a trace would tell nothing more
                "a body cannot be kept", extra={"client": self.addr[0], "reason": error.strerror}
            )
            self._give_up(InternalServerError("the disk is full"))
            return False
        request = self.request
        if request is None or request.headers_finished:
            self._head_since = None
        elif self._head_since is None:
            self._head_since = time.monotonic()
        if request is not before or request is None:
            self._unchanged_since = time.monotonic()
        # Not among the requests: a thread may have answered it already.
        self._deaf = self._deaf or (self._parser is not None and self._parser.is_last)
        if request is None:
            if self._parser is not None and self._parser.behind is not None:
                self._asking = self._parser
            self._parser = None
        return taken

    def handle_write(self) -> None:
        """Send; after a refusal half-close, and wait for the client to read it."""
        if self.socket is None:
            return  # the read just before has closed it
        if self._is_to_leave:
            self._leave()
            return
        if not (self._deaf and self.close_when_flushed):
            super().handle_write()
            return
        self._flush_exception(self._flush_some)  # type: ignore[attr-defined]  # not in its stubs
        if self.will_close:
            self.handle_close()
        elif self.socket is not None and not self.total_outbufs_len:
            self.close_when_flushed = False
            self._received = 0
            self._linger_until = time.monotonic() + LINGER_S
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)

    def writable(self) -> bool:
        """Whether the main loop is to send."""
        if self.socket is None or self._flushing:
            return False
        return self._is_to_leave or bool(super().writable())

    def handle_close(self) -> None:
        """Close it; with a reset, if not all of an answer was sent."""
        if self.total_outbufs_len:
            self.end_with_reset()
        super().handle_close()
        if self._switch is not None:
            self._switch.drop()

    @property
    def _is_to_leave(self) -> bool:
        return self._switch is not None and not self.requests

    def _leave(self) -> None:
        """Send what there is to send, then give the connection away and forget it."""
        self._flush_exception(self._flush_some)  # type: ignore[attr-defined]  # not in its stubs
        sock, switch, asking = self.socket, self._switch, self._asking
        if self.will_close:
            self.handle_close()
        elif sock is not None and switch is not None and not self.total_outbufs_len:
            self.socket = self._switch = self._asking = None
            super().handle_close()  # which then has no socket to close, but forgets it
            switch.take(sock, b"" if asking is None else asking.behind or b"")

    def _go_on_in_http(self, asking: StrictRequestParser) -> None:
        """Take up what came behind a request that asked for a WebSocket, and got none."""
        self._asking = None
        if asking.behind:
            self.received(asking.behind)

    def _look(self, now: float) -> None:
        request: Any = self.request
        head_due = self._head_since is not None and now - self._head_since >= HEAD_S
        if self._taking.too_slow(now, self._sent, busy=bool(self.total_outbufs_len)):
            self.handle_close()  # its buffers are full: waiting for them to drain is the point
        elif self._linger_until is not None:
            if now >= self._linger_until:
                self.handle_close()
        elif self.requests:
            self._giving.since = None
        elif self._giving.too_slow(now, self._received, busy=self._in_body):
            self._give_up(TookTooLong("the body came too slowly"))
        elif head_due and request is None:
            self.handle_close()
        elif head_due:
            self._give_up(TookTooLong(f"the head was not complete within {HEAD_S:g} s"))

    @property
    def _in_body(self) -> bool:
        request = self.request
        return request is not None and request.headers_finished and not request.expect_continue

    def _give_up(self, why: Error) -> None:
        """Have the request that is being received answered with an error, when its turn comes."""
        with self.requests_lock:  # type: ignore[attr-defined]  # not in its stubs
            request: Any = self.request
            requests: Any = self.requests
            self.request, self._deaf = None, True
            request.give_up(why)
            requests.append(request)
            if len(requests) == 1:
                self.server.add_task(self)  # type: ignore[arg-type]  # its stub means something else

    def _admit(self, parser: StrictRequestParser) -> Admitted | BrokerError:
        application: Any = self.server.application
        head: Any = parser
        try:
            admitted: Admitted = application.extensions[ADMIT](
                {
                    "REMOTE_ADDR": self.addr[0],
                    LOCAL_ADDRESS: self.local_address,
                    "REQUEST_METHOD": head.command,
                    "PATH_INFO": head.path,
                    **{f"HTTP_{name}": value for name, value in head.headers.items()},
                }
            )
        except BrokerError as error:
            return error
        return admitted

    def _make_way(self) -> None:
        """Close the connection that is worth least. Those that wait for a head go first, then
        those that send a body or take an answer, each time the one that has done so for longest;
        those with a request at work stay."""
        me: Any = self
        everybody = [each for each in me._map.values() if isinstance(each, Connection)]
        others = [each for each in everybody if each is not self and not each.requests]
        if others:
            min(others, key=Connection._worth).handle_close()

    def _worth(self) -> tuple[bool, float]:
        return self._in_body or bool(self.total_outbufs_len), self._unchanged_since

    # -- any thread ------------------------------------------------------------------------

    def switch(self, head: bytes, switch: Switch) -> None:
        """Send the head of an answer, and nothing more: then leave. Raises ClientDisconnected."""
        self.write_soon(head)
        self._switch = switch
        switch.promised = True
        if not self.connected:
            switch.drop()

    def abandon(self) -> None:
        """Send nothing more, and have it end with a reset: what was to be sent is not whole."""
        self._abandoned = True
        self.end_with_reset()

    def end_with_reset(self) -> None:
        """Have it end with a reset, so that nobody takes its end for the end of an answer."""
        sock: Any = self.socket
        with suppress(OSError, AttributeError):  # it is closed already
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _WITH_RESET)

    def check_client_disconnected(self) -> bool:  # type: ignore[override]  # its stub says None
        """Whether the client left. The main loop sees that when it reads, which it does not while
        the next request is there already, or may be none of HTTP."""
        unread = len(self.requests) > 1 or self._asking is not None
        if self.connected and unread and self._hung_up():
            self.connected = False  # as the main loop would; so that the next one is not begun
        return not self.connected

    def _hung_up(self) -> bool:
        sock: Any = self.socket
        poll = select.poll()
        try:
            poll.register(sock.fileno(), select.POLLRDHUP)
            return bool(poll.poll(0))
        except (AttributeError, OSError, ValueError):
            return True  # the main loop has closed it just now

    def service(self) -> None:
        """As waitress's: answer one request, on one of its threads."""
        super().service()
        self._unchanged_since = time.monotonic()

    def _flush_some(self, do_close: bool = True) -> bool:
        if self._abandoned:
            raise ConnectionAbortedError("its answer is not whole")  # waitress closes it
        before = self.total_outbufs_len
        self._flushing = True
        try:
            return bool(super()._flush_some(do_close))  # type: ignore[misc]  # not in its stubs
        finally:
            self._flushing = False
            self._sent += before - self.total_outbufs_len
            if not self.total_outbufs_len:
                self._taking.since = None


class _Pace:
    """Whether a count of bytes rises by `LEAST_RATE`, while it is to rise. `since` is when it was
    last noted; None while there is nothing to do."""

    since: float | None = None
    _before = 0

    def too_slow(self, now: float, count: int, *, busy: bool) -> bool:
        """True if a whole window passed in which it was busy, and did too little."""
        since, before = self.since, self._before
        if not busy:
            self.since = None
        elif since is None or now - since >= RATE_WINDOW_S:
            self.since, self._before = now, count
            return since is not None and count - before < LEAST_RATE * RATE_WINDOW_S
        return False
