"""The one thread that relays WebSockets."""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from gpumanager.clock import Clock
from gpumanager.upstream.tunnel import PIECE_BYTES, Connection, End, Relay

log = logging.getLogger(__name__)

THREAD = "websockets"
JOIN_TIMEOUT_S = 5.0


class Owner(Protocol):
    """Whoever has a WebSocket relayed. Both are called on the thread."""

    def count(self, name: str, size: int) -> None:
        """`size` bytes came from `client` or `consumer`."""

    def ended(self, reason: str) -> None:
        """It is over, and its connections are closed."""


class Relaying:
    """Made and started by whoever has the first WebSocket to relay; `stop` ends it. Raises OSError
    or RuntimeError if there can be no such thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._relays: dict[Owner, Relay] = {}
        self._due: set[Owner] = set()
        self._interests: dict[End, int] = {}
        self._todo: deque[Callable[[], object]] = deque()
        self._stopping = threading.Event()
        self._buffer = memoryview(bytearray(PIECE_BYTES))
        self._selector = selectors.DefaultSelector()
        self._ear, self._bell = socket.socketpair()
        self._ear.setblocking(False)
        self._bell.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name=THREAD, daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            self._let_go()
            raise

    # -- any thread ------------------------------------------------------------------------

    def begin(self, owner: Owner, client: Connection, consumer: Connection) -> None:
        """Relay between these two, which are the thread's from now on."""
        self._do(lambda: self._begin(owner, client, consumer))

    def part(self, owner: Owner, reason: str) -> None:
        """End it with a close frame to both sides."""
        self._do(lambda: self._part(owner, reason))

    def stop(self, reason: str) -> None:
        """Close what is left, and end the thread. Idempotent."""
        self._do(lambda: self._end_all(reason))
        self._stopping.set()
        self._ring()
        self._thread.join(JOIN_TIMEOUT_S)
        if self._thread.is_alive():
            log.warning("thread still running", extra={"worker": THREAD})

    def _do(self, what: Callable[[], object]) -> None:
        self._todo.append(what)
        self._ring()

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # it was rung often enough, or the thread has ended
            self._bell.send(b"\0")

    # -- the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._turn()
            self._work_off()
        finally:
            self._let_go()

    def _turn(self) -> None:
        ready = self._selector.select(self._patience())
        for key, events in ready:
            if key.data is None:
                self._ear.recv(4096)
                continue
            owner, end = key.data
            relay = self._relays.get(owner)
            if relay is not None:
                self._guarded(owner, relay, partial(relay.serve, end, events, self._now()))
        self._work_off()
        for owner in tuple(self._due):
            self._look(owner, self._relays[owner])

    def _work_off(self) -> None:
        while self._todo:
            try:
                self._todo.popleft()()
            except Exception:
                log.exception("worker failed", extra={"worker": THREAD})

    def _begin(self, owner: Owner, client: Connection, consumer: Connection) -> None:
        relay = self._relays[owner] = Relay(client, consumer, self._buffer, owner.count)
        self._look(owner, relay)

    def _part(self, owner: Owner, reason: str) -> None:
        relay = self._relays.get(owner)
        if relay is not None:
            self._guarded(owner, relay, lambda: relay.part(reason, self._now()))

    def _guarded(self, owner: Owner, relay: Relay, what: Callable[[], object]) -> None:
        """Do something with one, whose failure is not that of the others."""
        try:
            what()
        except Exception:
            log.exception("a WebSocket failed")
            self._end(owner, relay, "the broker failed; its log has the details")
        else:
            self._look(owner, relay)

    def _look(self, owner: Owner, relay: Relay) -> None:
        """See what there is to wait for, and whether it is over."""
        if relay.over or (relay.deadline is not None and self._now() >= relay.deadline):
            self._end(owner, relay, relay.reason or "neither side ended it")
            return
        if relay.deadline is not None:
            self._due.add(owner)
        for end in relay.ends:
            wanted, before = end.wanted(relay.other(end)), self._interests.get(end, 0)
            if wanted == before:
                continue
            self._interests[end] = wanted
            if not wanted:
                self._selector.unregister(end.sock)
            elif not before:
                self._selector.register(end.sock, wanted, (owner, end))
            else:
                self._selector.modify(end.sock, wanted, (owner, end))

    def _end(self, owner: Owner, relay: Relay, reason: str) -> None:
        del self._relays[owner]
        self._due.discard(owner)
        for end in relay.ends:
            if self._interests.pop(end, 0):
                self._selector.unregister(end.sock)
        relay.close()
        owner.ended(reason)

    def _end_all(self, reason: str) -> None:
        for owner, relay in tuple(self._relays.items()):
            self._end(owner, relay, relay.reason or reason)

    def _patience(self) -> float | None:
        deadlines = [self._relays[owner].deadline for owner in self._due]
        soonest = min((each for each in deadlines if each is not None), default=None)
        return None if soonest is None else max(0.0, soonest - self._now())

    def _now(self) -> float:
        return self._clock.monotonic()

    def _let_go(self) -> None:
        self._selector.close()
        self._ear.close()
        self._bell.close()
