"""What a job costs in calls of functions: counts, so that they do not depend on the machine.

A figure above its limit is a change of the request path that was not meant, or that has to be
paid for: then raise the limit in the commit that explains it. Where the time goes is in
docs/performance.md.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from benchmarks import running
from benchmarks.performance import client
from tests.support.broker import live_broker

ROOT = Path(__file__).parent.parent.parent
JOBS = 100
TOLERANCE = 1.15

PYTHON_CALLS = 430
"""Of a small job, in its own thread and in the server's loop, the libraries' included."""

BUILTIN_CALLS = 575
LOOP_TURNS = 3.0
"""Of the server's main loop, for a request and its answer."""


@pytest.fixture(scope="module")
def upstream() -> Iterator[int]:
    """A consumer in a process of its own, whose calls are not counted."""
    with running.upstream() as port:
        yield port


class Calls:
    """Counts the calls of every thread started while it is set up, from `begin` on."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self._counting = False

    def begin(self) -> None:
        self._counting = True

    def end(self) -> None:
        self._counting = False

    def per_job(self, event: str, name: str = "") -> float:
        found = (
            count for (kind, what), count in self.counts.items() if kind == event and name in what
        )
        return sum(found) / JOBS

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if self._counting and event in ("call", "c_call"):
            self.counts[event, frame.f_code.co_qualname if event == "call" else ""] += 1


@contextmanager
def profiling() -> Iterator[Calls]:
    calls = Calls()
    threading.setprofile(calls)
    try:
        yield calls
    finally:
        threading.setprofile(None)


def test_a_small_job_costs_no_more_calls_than_it_did(
    upstream: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "gpumanager.access")
    with profiling() as calls, live_broker(running.one_consumer(upstream)) as broker:
        data = client.request("/v1/llm")
        client.one_by_one(broker.port, data, 20)
        calls.begin()
        client.one_by_one(broker.port, data, JOBS)
        calls.end()
    python, builtin = calls.per_job("call"), calls.per_job("c_call")
    turns = calls.per_job("call", "BaseWSGIServer.writable")
    print(f"{python:.0f} Python calls, {builtin:.0f} builtin ones, {turns:.1f} turns of the loop")
    assert python <= PYTHON_CALLS * TOLERANCE
    assert builtin <= BUILTIN_CALLS * TOLERANCE
    assert turns <= LOOP_TURNS
