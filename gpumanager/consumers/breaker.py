"""A circuit breaker per consumer: after repeated failures of real calls it refuses fast, with a
growing pause, then lets a single trial through."""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from gpumanager.clock import Clock
from gpumanager.telemetry.events import BreakerClosed, BreakerOpen, Emit

FAILURES_TO_OPEN = 3
"""Failures in a row. A consumer's own answer, whatever its status, is no failure."""

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0

State = Literal["closed", "open", "trial"]


@dataclass(frozen=True, slots=True)
class _Circuit:
    """Of a consumer that failed. It is open once `opened_at` is not None."""

    failures: int = 0
    pause_s: float = 0.0
    retry_at: float = 0.0
    trial: bool = False
    opened_at: float | None = None
    reason: str = ""


_CLOSED = _Circuit()


class Breakers:
    """The breakers of all consumers, by name. Those of `failing` consumers, whose latest call
    failed, may refuse calls. Safe from any thread."""

    def __init__(self, clock: Clock, emit: Emit) -> None:
        self._clock = clock
        self._emit = emit
        self._lock = threading.Lock()
        self._circuits: dict[str, _Circuit] = {}
        self.failing: Collection[str] = self._circuits.keys()

    def state(self, name: str) -> State:
        """`closed`: calls go through; `open`: they are refused; `trial`: one is on its way."""
        circuit = self._circuits.get(name, _CLOSED)
        if circuit.trial:
            return "trial"
        return "closed" if circuit.opened_at is None else "open"

    def opened_at(self, name: str) -> float | None:
        """When it last opened (monotonic seconds); None while it is closed."""
        return self._circuits.get(name, _CLOSED).opened_at

    def reason(self, name: str) -> str:
        """What the latest failure was, while it is open; else empty."""
        circuit = self._circuits.get(name, _CLOSED)
        return "" if circuit.opened_at is None else circuit.reason

    def forget(self, name: str) -> None:
        """The consumer is another one now."""
        with self._lock:
            self._circuits.pop(name, None)

    def refusal(self, name: str) -> float | None:
        """Seconds after which to try again, if a call would be refused now; None if not."""
        circuit = self._circuits.get(name, _CLOSED)
        return None if circuit.opened_at is None else self._refusal(circuit)

    def begin(self, name: str) -> float | None:
        """As `refusal`, but a call that is let through counts: the first after a pause is the
        trial, and until it has ended all others are refused."""
        with self._lock:
            circuit = self._circuits.get(name, _CLOSED)
            if circuit.opened_at is None:
                return None
            refused = self._refusal(circuit)
            if refused is None:
                self._circuits[name] = replace(circuit, trial=True)
            return refused

    def succeeded(self, name: str) -> None:
        """The consumer answered a job: its failures are forgotten, and an open breaker closes."""
        with self._lock:
            was = self._circuits.pop(name, _CLOSED)
        if was.opened_at is not None:
            self._emit(BreakerClosed(consumer=name))

    def failed(self, name: str, reason: str = "") -> None:
        """It could not be reached, took too long, broke off, or did not load."""
        with self._lock:
            was = self._circuits.get(name, _CLOSED)
            failures = was.failures + 1
            pause = 0.0
            if failures >= FAILURES_TO_OPEN:
                pause = min(LONGEST_PAUSE_S, was.pause_s * 2 or FIRST_PAUSE_S)
            now = self._clock.monotonic()
            opened = was.opened_at
            if pause and opened is None:
                opened = now
            self._circuits[name] = _Circuit(
                failures, pause, now + pause, opened_at=opened, reason=reason
            )
        if pause:
            self._emit(
                BreakerOpen(
                    consumer=name,
                    failures=failures,
                    pause_ms=round(pause * 1000),
                    reason=reason or None,
                )
            )

    def abandoned(self, name: str) -> None:
        """The call ended without saying anything of the consumer, as when the client left."""
        with self._lock:
            circuit = self._circuits.get(name)
            if circuit is not None:
                self._circuits[name] = replace(circuit, trial=False)

    def _refusal(self, circuit: _Circuit) -> float | None:
        remaining = circuit.retry_at - self._clock.monotonic()
        if remaining > 0:
            return remaining
        return FIRST_PAUSE_S if circuit.trial else None
