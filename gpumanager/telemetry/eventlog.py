"""What has happened lately: the latest events, each with a number that rises by one."""

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
from gpumanager.telemetry.events import Event

log = logging.getLogger("gpumanager.events")

KEPT = 5000
"""Events in memory: an hour of jobs of a second each, with what happens around them."""

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


@dataclass(frozen=True, slots=True)
class Recorded:
    """An event as it was recorded: with its number, 0 if it is not kept, and its time. `fields` are
    those that the reader may see."""

    number: int
    at: datetime
    event: Event
    fields: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The event as one flat object."""
        return {
            "number": self.number,
            "time": rfc3339(self.at),
            "event": self.event.name,
            "level": self.event.level,
            **self.fields,
        }


@dataclass(frozen=True, slots=True)
class Excerpt:
    """Events in their order. `last` is the number to ask from next; `missed` counts those that
    came after the one asked from, but are kept no more."""

    events: tuple[Recorded, ...]
    last: int
    missed: int


class EventLog:
    """The latest `keep` events. Safe from any thread. `boot` differs from run to run, so that a
    reader notices that the numbers began anew."""

    def __init__(self, clock: Clock, *, keep: int = KEPT) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._events: deque[Recorded] = deque(maxlen=keep)
        self._last = 0
        self._listeners: tuple[Callable[[Recorded], object], ...] = ()
        self.boot = secrets.token_hex(4)

    def listen(self, listener: Callable[[Recorded], object]) -> None:
        """Have every event from now on handed to `listener`, on the thread it happens on: it
        must be quick."""
        with self._lock:
            self._listeners += (listener,)

    def emit(self, event: Event) -> None:
        """It happened: log it, number it, tell the listeners. Never raises."""
        at, fields = self._clock.now(), event.fields
        kept = event.kept_with is None or event.kept_with in fields
        if event.message is not None:
            log.log(_LEVELS[event.level], event.message, extra=fields)
        with self._lock:
            number = self._last + 1 if kept else 0
            recorded = Recorded(number, at, event, fields)
            if kept:
                self._last = number
                self._events.append(recorded)
            listeners = self._listeners
        for listener in listeners:
            try:
                listener(recorded)
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
