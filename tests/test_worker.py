"""Workers: a name, an owner, an end."""

from __future__ import annotations

import logging
import threading

import pytest

from gpumanager.worker import PeriodicWorker
from tests.support.threads import PATIENCE_S


def test_the_body_is_called_again_and_again_until_stopped() -> None:
    thrice = threading.Event()
    calls: list[str] = []

    def body() -> float:
        calls.append(threading.current_thread().name)
        if len(calls) == 3:
            thrice.set()
        return 0.0

    worker = PeriodicWorker("sampler", body, retry_s=0.0)
    worker.start()
    worker.start()
    assert thrice.wait(PATIENCE_S)
    worker.stop()
    assert worker.join()
    assert set(calls) == {"sampler"}


def test_stopping_does_not_wait_for_the_next_turn() -> None:
    called = threading.Event()

    def body() -> float:
        called.set()
        return 3600.0

    worker = PeriodicWorker("sampler", body, retry_s=0.0)
    worker.start()
    assert called.wait(PATIENCE_S)
    worker.stop()
    assert worker.join()


def test_a_body_that_raises_is_told_of_and_called_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recovered = threading.Event()
    calls: list[int] = []

    def body() -> float:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("the card fell off the bus")
        recovered.set()
        return 3600.0

    worker = PeriodicWorker("sampler", body, retry_s=0.0)
    with caplog.at_level(logging.ERROR):
        worker.start()
        assert recovered.wait(PATIENCE_S)
    worker.stop()
    assert worker.join()
    assert "the card fell off the bus" in caplog.text


def test_one_that_was_never_started_is_stopped_already() -> None:
    worker = PeriodicWorker("sampler", lambda: 0.0, retry_s=0.0)
    worker.stop()
    assert worker.join()
    worker.start()
    assert worker.join()


def test_a_worker_can_be_woken_before_its_turn() -> None:
    turns = threading.Semaphore(0)

    def body() -> float:
        turns.release()
        return 3600.0

    worker = PeriodicWorker("prober", body, retry_s=0.0)
    worker.start()
    for _ in range(3):
        assert turns.acquire(timeout=PATIENCE_S)
        worker.wake()
    worker.stop()
    assert worker.join()
