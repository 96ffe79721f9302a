"""Who is next: a pure function over plain data."""

from __future__ import annotations

from gpumanager.model import Job
from gpumanager.scheduling.policy import FirstComeFirstServed, Running, Waiting, overstayed

JOB = Job("mvoice", "tts")


def waiting(ticket: int, deadline: float = 100.0) -> Waiting:
    return Waiting(ticket, JOB, since=0.0, deadline=deadline)


def test_the_first_in_line_is_next() -> None:
    assert FirstComeFirstServed().next_up([waiting(3), waiting(4)], [], now=0.0) == waiting(3)


def test_nobody_is_next_while_the_gpu_is_held() -> None:
    running = [Running(1, JOB, since=0.0)]
    assert FirstComeFirstServed().next_up([waiting(3)], running, now=0.0) is None
    assert FirstComeFirstServed(2).next_up([waiting(3)], running, now=0.0) == waiting(3)


def test_nobody_is_next_in_an_empty_line() -> None:
    assert FirstComeFirstServed().next_up([], [], now=0.0) is None


def test_it_looks_no_further_than_the_head() -> None:
    def line() -> object:
        yield waiting(1)
        raise AssertionError("looked beyond the head")

    assert FirstComeFirstServed().next_up(line(), [], now=0.0) == waiting(1)  # type: ignore[arg-type]


def test_who_has_waited_too_long() -> None:
    assert not overstayed(waiting(1, deadline=10.0), now=9.99)
    assert overstayed(waiting(1, deadline=10.0), now=10.0)
