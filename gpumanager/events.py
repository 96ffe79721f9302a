"""What has happened lately: a bounded log of events, each with a number that rises by one.

Most events are log records: the package logs what happens under fixed messages, and a handler
takes those in `LOGGED` over, so that the log and the events cannot tell two stories. What comes
too often for a log line of its own, the end of every job, is noted directly.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from gpumanager.clock import Clock, rfc3339

log = logging.getLogger(__name__)

KEPT = 5000
"""Events in memory: an hour of jobs of a second each, with what happens around them."""

LOGGED = {
    "evicted": "evicted",
    "eviction failed": "eviction_failed",
    "loaded": "loaded",
    "brought back": "brought_back",
    "consumer healthy": "healthy",
    "consumer unhealthy": "unhealthy",
    "partly on the CPU": "on_cpu",
    "breaker open": "breaker_open",
    "breaker closed": "breaker_closed",
    "out of memory": "out_of_memory",
    "out of memory not believed": "out_of_memory_doubted",
    "out of memory healed": "healed",
    "gpu unavailable": "gpu_lost",
    "gpu available": "gpu_found",
    "answer truncated": "truncated",
    "quarantined": "quarantined",
    "pinned": "pinned",
    "unpinned": "unpinned",
    "forgotten": "forgotten",
    "still busy": "still_busy",
    "cancel failed": "cancel_failed",
    "housekeeping failed": "housekeeping_failed",
    "config reloaded": "reloaded",
    "config not reloaded": "not_reloaded",
    "draining": "draining",
}
"""Log messages that are events, and their names as such."""

_RECORDS_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. `fields` can be expressed in JSON; durations in them end in
    `_ms`, or are `ms`; times are RFC 3339."""

    number: int
    at: datetime
    name: str
    level: str
    fields: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The event as one flat object."""
        return {
            "number": self.number,
            "time": rfc3339(self.at),
            "event": self.name,
            "level": self.level,
            **self.fields,
        }


@dataclass(frozen=True, slots=True)
class Excerpt:
    """Events in their order. `last` is the number to ask from next; `missed` counts those that
    came after the one asked from, but are kept no more."""

    events: tuple[Event, ...]
    last: int
    missed: int


class EventLog:
    """The latest `keep` events. Safe from any thread. `boot` differs from run to run, so that a
    reader notices that the numbers began anew."""

    def __init__(self, clock: Clock, *, keep: int = KEPT) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._events: deque[Event] = deque(maxlen=keep)
        self._last = 0
        self._listeners: tuple[Callable[[Event], object], ...] = ()
        self.boot = secrets.token_hex(4)

    def listen(self, listener: Callable[[Event], object]) -> None:
        """Have every event from now on handed to `listener`, on the thread it happens on: it
        must be quick."""
        with self._lock:
            self._listeners += (listener,)

    def note(
        self, name: str, fields: Mapping[str, Any], level: str = "info", *, keep: bool = True
    ) -> None:
        """Something happened. Fields that are None are left out. Without `keep` only the
        listeners are told. Never raises."""
        at = self._clock.now()
        fields = {key: value for key, value in fields.items() if value is not None}
        with self._lock:
            number = self._last + 1 if keep else 0
            event = Event(number, at, name, level, fields)
            if keep:
                self._last = number
                self._events.append(event)
            listeners = self._listeners
        for listener in listeners:
            try:
                listener(event)
            except Exception:
                log.exception("a listener failed")

    def since(self, number: int, limit: int | None = None) -> Excerpt:
        """What came after event `number`, at most the first `limit`; from the beginning, if there
        was no such event yet in this run."""
        with self._lock:
            events, last = tuple(self._events), self._last
        if number > last:
            number = 0
        found = tuple(event for event in events if event.number > number)
        missed = found[0].number - number - 1 if found else 0
        if limit is not None and len(found) > limit:
            found = found[:limit]
            last = found[-1].number if found else number
        return Excerpt(found, last, missed)


class EventHandler(logging.Handler):
    """Takes log records that are events over into an EventLog."""

    def __init__(self, events: EventLog) -> None:
        super().__init__(logging.INFO)
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        name = LOGGED.get(record.msg) if isinstance(record.msg, str) else None
        if name is None:
            return
        fields = {key: value for key, value in vars(record).items() if key not in _RECORDS_OWN}
        self._events.note(name, fields, record.levelname.lower())
