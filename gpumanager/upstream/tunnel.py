"""The bytes of one WebSocket between its client and its consumer: what is to be done when one of
the two can be read or written. Knows no threads and waits for nothing."""

from __future__ import annotations

import contextlib
import selectors
import socket
import ssl
from collections.abc import Callable

from gpumanager.upstream.frames import Frames, close_frame

PIECE_BYTES = 64 * 1024
"""What is read at once, and so the most that waits for an end that takes nothing: as long as
anything does, nothing more is read for it."""

PIECES_AT_ONCE = 8
"""Of one connection, before the others have their turn."""

LINGER_S = 30.0
"""How long one end may go on after the other one has ended, though the two have not said so."""

GOODBYE_S = 2.0
"""How long the ends have to end once both were told."""

_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)
"""A peer that vanished without a word is noticed within two minutes."""

_BLOCKED = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

Connection = tuple[socket.socket, bytes]
"""One that does not block, and what was read from it behind the head of its request or answer."""


class End:
    """One of the two connections. `out` is what it has yet to take; `over`: it says nothing more;
    `shut`: it is told nothing more; `parted`: it was told that this is the end."""

    __slots__ = ("blocked", "frames", "name", "out", "over", "parted", "shut", "sock")

    def __init__(self, name: str, sock: socket.socket, out: bytes) -> None:
        self.name = name
        self.sock = sock
        self.out = b""
        self.frames = Frames()
        self.over = self.shut = self.parted = self.blocked = False
        for option in _KEEPALIVE:
            with contextlib.suppress(OSError):  # a Unix socket, or one that is gone already
                sock.setsockopt(*option)
        self.say(memoryview(out))

    def say(self, data: memoryview) -> None:
        """Pass `data` on to it, or keep what it does not take now."""
        self.frames.advance(data)
        sent = 0
        if not self.out:
            try:
                sent = self.sock.send(data)
            except _BLOCKED:
                pass
            except OSError:
                self.fail()
                return
        if sent < len(data):
            self.out += bytes(data[sent:])

    def flush(self) -> None:
        """Have it take what it has yet to take."""
        try:
            while self.out:
                self.out = self.out[self.sock.send(self.out) :]
        except _BLOCKED:
            return
        except OSError:
            self.fail()

    def part(self) -> None:
        """Tell it that this is the end, if that can be said here."""
        if not self.parted and self.frames.between:
            if not self.frames.closed:
                self.say(memoryview(close_frame(masked=self.name == "consumer")))
            self.parted = True

    def fail(self) -> None:
        """Its socket takes nothing more: drop what waits for it."""
        self.out, self.shut = b"", True

    def wanted(self, other: End) -> int:
        """The selector's events to wait for, 0: none."""
        events = 0
        if not self.over and not other.out:
            events |= selectors.EVENT_READ
        if self.out or self.blocked:
            events |= selectors.EVENT_WRITE
        return events


class Relay:
    """Both connections of a WebSocket, which are its own from now on. Whoever relays lends it a
    `buffer` of PIECE_BYTES; `count` is told how many bytes came from `client` or `consumer`."""

    def __init__(
        self,
        client: Connection,
        consumer: Connection,
        buffer: memoryview,
        count: Callable[[str, int], object],
    ) -> None:
        self._buffer = buffer
        self._count = count
        self.client = End("client", client[0], consumer[1])
        self.consumer = End("consumer", consumer[0], client[1])
        count("client", len(client[1]))
        count("consumer", len(consumer[1]))
        self.ends = (self.client, self.consumer)
        self.deadline: float | None = None
        self.reason: str | None = None
        self._parting = False

    @property
    def over(self) -> bool:
        """Whether both have ended, and all was passed on."""
        return all(end.over and not end.out for end in self.ends)

    def other(self, end: End) -> End:
        """The one on the far side."""
        return self.consumer if end is self.client else self.client

    def serve(self, end: End, events: int, now: float) -> None:
        """Do what can be done now that `end` can be read or written."""
        other = self.other(end)
        blocked, end.blocked = end.blocked, False
        if events & selectors.EVENT_WRITE:
            end.flush()
            if not end.out:
                self._pump(other, end)
        if events & selectors.EVENT_READ or blocked:
            self._pump(end, other)
        self._settle(now)

    def part(self, reason: str, now: float) -> None:
        """End it: tell both ends as soon as a frame is whole, and give them `GOODBYE_S`."""
        if not self._parting:
            self._parting = True
            self.reason = self.reason or reason
            self.deadline = now + GOODBYE_S
            for end in self.ends:
                end.part()
            self._settle(now)

    def close(self) -> None:
        """Close both. Idempotent."""
        for end in self.ends:
            end.sock.close()

    def _pump(self, end: End, other: End) -> None:
        """Pass on what has come from `end`, as long as `other` takes it."""
        for _ in range(PIECES_AT_ONCE):
            if end.over or other.out:
                return
            try:
                size = end.sock.recv_into(self._buffer)
            except ssl.SSLWantWriteError:
                end.blocked = True
                return
            except _BLOCKED:
                return
            except ssl.SSLEOFError:
                size = 0
            except OSError:
                end.fail()
                size = 0
            if not size:
                end.over = True
                self.reason = self.reason or f"the {end.name} ended it"
                return
            self._count(end.name, size)
            self._pass_on(self._buffer[:size], other)
            if size < PIECE_BYTES and not _has_more(end.sock):
                return

    def _pass_on(self, data: memoryview, other: End) -> None:
        if not self._parting:
            other.say(data)
        elif not other.parted:
            other.say(data[: other.frames.until_whole(data)])
            other.part()

    def _settle(self, now: float) -> None:
        for end in self.ends:
            if not end.out and not end.shut and (self.other(end).over or end.parted):
                end.shut = True
                with contextlib.suppress(OSError):
                    # Of the socket itself: TLS would have it read on without decrypting.
                    socket.socket.shutdown(end.sock, socket.SHUT_WR)
        if self.deadline is None and any(end.over or end.shut for end in self.ends):
            said = all(end.frames.closed for end in self.ends)
            self.deadline = now + (GOODBYE_S if said else LINGER_S)


def _has_more(sock: socket.socket) -> bool:
    """Whether it holds something that no selector sees."""
    return isinstance(sock, ssl.SSLSocket) and sock.pending() > 0
