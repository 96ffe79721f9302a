"""The queue as plain data: whose turn it is, and what each has been through."""

from __future__ import annotations

import random

import pytest

from gpumanager.model import Job
from gpumanager.scheduling.backlog import Backlog
from gpumanager.scheduling.decision import Start, decide
from gpumanager.scheduling.policy import FirstComeFirstServed, Waiting

FIFO = FirstComeFirstServed()


def place(ticket: int, name: str = "tts", since: float = 0.0, **more: object) -> Waiting:
    return Waiting(ticket, Job(name, "tts", **more), since, since + 600)  # type: ignore[arg-type]


def test_it_is_driven_without_a_clock_or_a_thread() -> None:
    backlog = Backlog(FIFO)
    for ticket in (1, 2):
        backlog.add(place(ticket, since=float(ticket)))
    assert decide(backlog.picture(3.0), FIFO) == Start((1,))
    backlog.grant(1, 3.0)
    assert not backlog.may_grant
    assert backlog.end(1, 5.0).since == 3.0
    assert decide(backlog.picture(5.0), FIFO) == Start((2,))
    backlog.grant(2, 5.0)
    assert (backlog.total_jobs, backlog.last_wait_s, backlog.last_run_s) == (2, 3.0, 2.0)


def test_who_does_not_wait_is_not_granted_and_who_does_not_run_does_not_end() -> None:
    backlog = Backlog(FIFO)
    backlog.add(place(1))
    with pytest.raises(KeyError):
        backlog.end(1, 0.0)
    assert backlog.remove(2) is None
    assert backlog.remove(1) == place(1)
    backlog.add(place(2))
    with pytest.raises(KeyError):
        backlog.grant(1, 0.0)


@pytest.mark.parametrize("seed", range(20))
def test_the_longest_overtake_is_what_counting_one_by_one_gives(seed: int) -> None:
    chance = random.Random(seed)
    backlog = Backlog(FIFO)
    overtaken: dict[int, int] = {}
    longest = ticket = 0
    for _ in range(200):
        if not overtaken or chance.random() < 0.5:
            ticket += 1
            backlog.add(place(ticket))
            overtaken[ticket] = 0
            continue
        # The first ones more often, so that counts end.
        gone = sorted(overtaken)[min(int(chance.expovariate(0.7)), len(overtaken) - 1)]
        del overtaken[gone]
        if chance.random() < 0.2:
            backlog.remove(gone)
            continue
        backlog.grant(gone, 0.0)
        backlog.end(gone, 0.0)
        for each in overtaken:
            overtaken[each] += each < gone
        longest = max(longest, *overtaken.values(), 0)
        assert backlog.longest_overtake == longest
    assert longest > 1
