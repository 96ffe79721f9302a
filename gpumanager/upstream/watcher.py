"""Looks after everything that waits: clients that may leave, deadlines that may pass. A thousand
waiters cost one sweep over a list five times a second, not a thousand timers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from itertools import count

log = logging.getLogger(__name__)

SWEEP_S = 0.2
"""Seconds between two looks, and so the delay with which a condition is noticed at worst."""


class Watcher:
    """Calls an action, once, when its condition has come true.

    `sweep` is the body of a periodic worker. Conditions must be quick and must not block;
    actions run on the worker's thread. Safe from any thread: each change of the dictionary, and
    its copy, is one step of the interpreter's.
    """

    def __init__(self) -> None:
        self._watches: dict[int, tuple[Callable[[], bool], Callable[[], object]]] = {}
        self._numbers = count()

    def watch(self, due: Callable[[], bool], act: Callable[[], object]) -> Callable[[], object]:
        """Have `act` called within one sweep after `due` returns True. Returns what stops it, as
        often as it is called; an action that has begun may still end after that."""
        number = next(self._numbers)
        self._watches[number] = (due, act)
        return partial(self._watches.pop, number, None)

    def sweep(self) -> float:
        """Look once at everything; returns the seconds until the next look."""
        for number, (due, act) in self._watches.copy().items():
            try:
                if due() and self._watches.pop(number, None) is not None:
                    act()
            except Exception:
                self._watches.pop(number, None)
                log.exception("watch failed")
        return SWEEP_S

    def __len__(self) -> int:
        """How much is being looked after."""
        return len(self._watches)
