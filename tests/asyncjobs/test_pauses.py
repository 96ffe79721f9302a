"""Which jobs are not tried for the moment."""

from __future__ import annotations

from gpumanager.asyncjobs.pauses import Pauses
from tests.support.clock import FakeClock


def test_a_consumer_is_paused_for_longer_each_time_and_no_longer_once_one_was_sent() -> None:
    clock = FakeClock()
    pauses = Pauses(clock)
    for seconds in (1, 2, 4, 8, 16, 32, 60, 60):
        pauses.note("voice", None, None)
        pauses.note("voice", None, None)  # another feeder was told the same
        clock.advance(seconds - 0.5)
        assert pauses.now() == (["voice"], set())
        clock.advance(0.5)
        assert pauses.now() == ([], set())
    pauses.over("voice", "j")
    pauses.note("voice", None, 5.0)
    clock.advance(4.5)
    assert pauses.now() == (["voice"], set())
    clock.advance(0.5)
    assert pauses.now() == ([], set())


def test_a_job_is_paused_alone() -> None:
    pauses = Pauses(FakeClock())
    pauses.note("voice", "j", None)
    assert pauses.now() == ([], {"j"})
    pauses.over("voice", "j")
    assert pauses.now() == ([], set())
