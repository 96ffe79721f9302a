"""A client's connection: waitress's, with bounds on the patience that a client may ask for."""

from __future__ import annotations

import select
import socket
import struct
import time
from contextlib import suppress
from typing import Any

from waitress.channel import HTTPChannel

from gpumanager.web.answering import JsonErrorTask, OneSendTask
from gpumanager.web.parsing import StrictRequestParser

LEAST_RATE = 1024
"""Bytes a second that a client has to take of an answer that is ready, on the average of each
`RATE_WINDOW_S`: less than any audio that is played as it comes."""

RATE_WINDOW_S = 60.0

LOOK_S = 0.5
"""How often a connection is looked at."""

_WITH_RESET = struct.pack("ii", 1, 0)


def close_with_reset(sock: Any) -> None:
    """Have `sock` end with a reset, so that nobody takes its end for the end of an answer."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _WITH_RESET)


class Connection(HTTPChannel):
    """Waitress's channel, which also

    - does not have the main loop turn over and over while a worker is sending: what it has left
      to send afterwards it tells the loop itself;
    - cuts a client off that takes its answer more slowly than `LEAST_RATE`;
    - notices that a client left that had sent the next request already;
    - never ends in mid-answer with what looks like an orderly end.
    """

    error_task_class = JsonErrorTask
    parser_class = StrictRequestParser
    task_class = OneSendTask

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._flushing = False
        self._look_at = 0.0
        self._sent = 0
        self._taking = _Pace()

    # -- the main loop's thread ------------------------------------------------------------

    def readable(self) -> bool:
        """Whether the main loop is to read. It asks at least once a second, of everybody."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            self._look(now)
        return self.connected and bool(super().readable())

    def writable(self) -> bool:
        """Whether the main loop is to send."""
        return self.socket is not None and not self._flushing and bool(super().writable())

    def handle_close(self) -> None:
        """Close it; with a reset, if not all of an answer was sent."""
        if self.total_outbufs_len and self.socket is not None:
            close_with_reset(self.socket)
        super().handle_close()

    def _look(self, now: float) -> None:
        if self._taking.too_slow(now, self._sent, busy=bool(self.total_outbufs_len)):
            self.handle_close()  # its buffers are full: waiting for them to drain is the point

    # -- any thread ------------------------------------------------------------------------

    def check_client_disconnected(self) -> bool:  # type: ignore[override]  # its stub says None
        """Whether the client left. The main loop sees that when it reads, which it does not while
        the next request is there already."""
        if self.connected and len(self.requests) > 1 and self._hung_up():
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

    def send(self, data: bytes, do_close: bool = True) -> int:
        """As waitress's, counted."""
        sent = int(super().send(data, do_close))
        self._sent += sent
        return sent

    def _flush_some(self, do_close: bool = True) -> bool:
        self._flushing = True
        try:
            return bool(super()._flush_some(do_close))  # type: ignore[misc]  # not in its stubs
        finally:
            self._flushing = False
            if not self.total_outbufs_len:
                self._taking.rest()


class _Pace:
    """Whether a count of bytes rises by `LEAST_RATE`, while it is to rise."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._before = 0

    def rest(self) -> None:
        """There is nothing to do at the moment."""
        self._since = None

    def too_slow(self, now: float, count: int, *, busy: bool) -> bool:
        """True if a whole window passed in which it was busy, and did too little."""
        since, before = self._since, self._before
        if not busy:
            self._since = None
        elif since is None or now - since >= RATE_WINDOW_S:
            self._since, self._before = now, count
            return since is not None and count - before < LEAST_RATE * RATE_WINDOW_S
        return False
