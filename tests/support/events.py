"""Events with what does not matter to a test filled in."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from gpumanager.telemetry.eventlog import Recorded
from gpumanager.telemetry.events import Event, Evicted, JobEnded, Refused

AT = datetime(2026, 11, 23, 12, tzinfo=UTC)
WHO: dict[str, Any] = {"client": "127.0.0.1", "address": "127.0.0.1", "request_id": "r"}


def ignore(event: Event) -> None:
    """To emit to, where nobody wants to know."""


def recorded(event: Event, number: int = 1) -> Recorded:
    return Recorded(number, AT, event, event.fields)


def job(**more: Any) -> JobEnded:
    what: dict[str, Any] = {"consumer": "voice", "kind": "tts", "ticket": 3, "status": 200}
    times: dict[str, Any] = {"wait_ms": 1500.0, "prepare_ms": 250.0, "run_ms": 2000.0}
    return JobEnded(**{**what, **WHO, **times, **more})


def refused(consumer: str | None, code: str = "queue_full") -> Refused:
    return Refused(code=code, status=503, consumer=consumer, path="/", **WHO)


def evicted(consumer: str = "voice", **more: Any) -> Evicted:
    what: dict[str, Any] = {"target": "llm", "method": "http", "outcome": "released"}
    figures: dict[str, Any] = {"mib": 1000, "expected_mib": 1000, "ms": 100}
    return Evicted(**{"consumer": consumer, **what, **figures, **more})
