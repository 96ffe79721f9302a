"""The drain, step by step; with real signals it is tested in tests/integration/test_serving.py."""

from __future__ import annotations

import signal
import threading

from gpumanager.clock import SystemClock
from gpumanager.lifecycle import Lifecycle
from gpumanager.model import Job
from gpumanager.scheduling.factory import locked
from gpumanager.scheduling.interface import Scheduler
from tests.support.events import ignore
from tests.support.threads import Outcome


def make(unfinished: list[int], timeout: float) -> tuple[Lifecycle, threading.Event, Scheduler]:
    scheduler = locked(max_queue=9, max_wait=60, clock=SystemClock())
    draining = threading.Event()
    lifecycle = Lifecycle(
        scheduler,
        SystemClock(),
        ignore,
        drain_timeout=lambda: timeout,
        draining=draining,
        unfinished=lambda: unfinished.pop(0) if unfinished else 0,
    )
    return lifecycle, draining, scheduler


def test_an_idle_broker_drains_at_once() -> None:
    lifecycle, draining, _ = make([], 60)
    assert lifecycle.drain()
    assert draining.is_set()


def test_the_last_answers_reach_their_clients_first() -> None:
    unfinished = [3, 2, 1]
    lifecycle, _, _ = make(unfinished, 60)
    assert lifecycle.drain()
    assert unfinished == []


def test_a_job_that_outlasts_the_drain_is_told_to_stop() -> None:
    lifecycle, _, scheduler = make([], 0.01)
    ticket = scheduler.enqueue(Job("mvoice", "tts"))
    ticket.wait()
    told: list[str] = []
    ticket.when_cancelled(lambda error: told.append(error.code))
    assert not lifecycle.drain()
    assert told == ["shutting_down"]


def test_handlers_are_the_main_threads_business() -> None:
    lifecycle, _, _ = make([], 60)
    before = signal.getsignal(signal.SIGTERM)
    Outcome(lambda: lifecycle.install_signal_handlers(list)).result()
    assert signal.getsignal(signal.SIGTERM) is before
