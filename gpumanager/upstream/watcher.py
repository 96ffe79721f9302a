"""Looks after everything that waits: clients that may leave, deadlines that may pass. A thousand
waiters cost one sweep over a list five times a second, not a thousand timers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

SWEEP_S = 0.2
"""Seconds between two looks, and so the delay with which a condition is noticed at worst."""


class Watch:
    """A condition that is being looked after. `stop` is idempotent."""

    __slots__ = ("_act", "_due", "_watcher")

    def __init__(
        self, watcher: Watcher, due: Callable[[], bool], act: Callable[[], object]
    ) -> None:
        self._watcher = watcher
        self._due = due
        self._act = act

    def stop(self) -> None:
        """Look no more. An action that has begun may still end after this."""
        self._watcher._forget(self)


class Watcher:
    """Calls an action, once, when its condition has come true.

    `sweep` is the body of a periodic worker. Conditions must be quick and must not block;
    actions run on the worker's thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: dict[int, Watch] = {}

    def watch(self, due: Callable[[], bool], act: Callable[[], object]) -> Watch:
        """Have `act` called within one sweep after `due` returns True."""
        watch = Watch(self, due, act)
        with self._lock:
            self._watches[id(watch)] = watch
        return watch

    def sweep(self) -> float:
        """Look once at everything; returns the seconds until the next look."""
        with self._lock:
            watches = list(self._watches.values())
        for watch in watches:
            try:
                if watch._due():
                    self._forget(watch)
                    watch._act()
            except Exception:
                self._forget(watch)
                log.exception("watch failed")
        return SWEEP_S

    def __len__(self) -> int:
        """How much is being looked after."""
        return len(self._watches)

    def _forget(self, watch: Watch) -> None:
        with self._lock:
            self._watches.pop(id(watch), None)
