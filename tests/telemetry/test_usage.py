"""How much of the GPU each requester had."""

from __future__ import annotations

from datetime import datetime, timedelta

from gpumanager.telemetry.eventlog import Recorded
from gpumanager.telemetry.events import JobEnded, Started
from gpumanager.telemetry.usage import MINUTES, MOST, Share, Usage
from tests.support.clock import EPOCH


def ended(requester: str | None, run_ms: float, after_min: float = 0.0) -> Recorded:
    job = JobEnded(
        consumer="it",
        kind="tts",
        ticket=1,
        requester=requester,
        client="-",
        address="-",
        request_id="-",
        wait_ms=7000,
        prepare_ms=500,
        run_ms=run_ms,
    )
    return Recorded(1, at(after_min), job, job.fields)


def at(minutes: float) -> datetime:
    return EPOCH + timedelta(minutes=minutes)


def test_what_each_had_with_making_room_but_without_waiting() -> None:
    usage = Usage()
    started = Started(version="1")
    usage.take_note(Recorded(1, EPOCH, started, started.fields))
    for requester, run_ms in (("alice", 1500), ("bob", 9500), ("alice", 2500)):
        usage.take_note(ended(requester, run_ms))
    assert usage.shares(at(1), 10) == [Share("bob", 10, 1), Share("alice", 5, 2)]


def test_all_others_are_one_share() -> None:
    usage = Usage()
    for requester, run_ms in (("a", 500), ("b", 1500), ("c", 2500), (None, 3500)):
        usage.take_note(ended(requester, run_ms))
    assert usage.shares(at(1), 2) == [Share("c", 3, 1), Share("b", 2, 1), Share("-", 5, 2)]
    assert usage.shares(at(1), 2, "a") == [Share("a", 1, 1), Share("-", 9, 3)]
    assert usage.shares(at(1), 2, "nobody") == [Share("-", 10, 4)]


def test_an_hour_later_it_is_over() -> None:
    usage = Usage()
    usage.take_note(ended("alice", 500))
    usage.take_note(ended("bob", 500, after_min=MINUTES - 1))
    assert len(usage.shares(at(MINUTES - 1), 9)) == 2
    assert usage.shares(at(MINUTES), 9) == [Share("bob", 1, 1)]
    for minute in range(3 * MINUTES):
        usage.take_note(ended("carol", 500, after_min=MINUTES + minute))
    assert usage.shares(at(4 * MINUTES - 1), 9) == [Share("carol", MINUTES, MINUTES)]
    assert len(usage._minutes) == MINUTES


def test_a_clock_that_is_set_back_loses_nothing() -> None:
    usage = Usage()
    usage.take_note(ended("alice", 500))
    usage.take_note(ended("alice", 500, after_min=-30))
    assert usage.shares(at(0), 9) == [Share("alice", 2, 2)]


def test_any_number_of_addresses_takes_a_bounded_memory() -> None:
    usage = Usage()
    for number in range(2 * MOST):
        usage.take_note(ended(f"10.0.{number // 256}.{number % 256}", 500))
    shares = usage.shares(at(1), 10_000)
    assert len(shares) == MOST + 1
    assert sum(share.jobs for share in shares) == 2 * MOST
