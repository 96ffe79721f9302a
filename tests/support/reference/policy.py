"""Who is next, and who has waited too long: pure functions over plain data.

The machinery in `line` carries the decisions out; it decides nothing itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from gpumanager.scheduling.policy import Running, Waiting


class Policy(Protocol):
    """Chooses the next job to be granted."""

    @property
    def exclusive(self) -> bool:
        """True if it never lets two jobs run together."""

    def next_up(
        self, waiting: Iterable[Waiting], running: Collection[Running], now: float
    ) -> Waiting | None:
        """The waiting job to start now, or None. Asked again after each grant.

        `waiting` comes in the order of arrival; a policy that looks no further than the head
        costs the same for any length of the queue.
        """


@dataclass(frozen=True, slots=True)
class FirstComeFirstServed:
    """Strict arrival order, up to `limit` jobs at once."""

    limit: int = 1

    @property
    def exclusive(self) -> bool:
        return self.limit == 1

    def next_up(
        self,
        waiting: Iterable[Waiting],
        running: Collection[Running],
        now: float,  # part of the interface; arrival order needs no time
    ) -> Waiting | None:
        if len(running) >= self.limit:
            return None
        return next(iter(waiting), None)
