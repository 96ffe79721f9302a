"""What the queue told of each wait, beside what came of it, in a replayed trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpumanager.consumers.learning import Learned
from gpumanager.consumers.statefile import StateFile
from tests.support.replay import SERVERS, Replay, median_error

LONGEST_MEDIAN = 0.25


@pytest.mark.parametrize("seed", range(3))
def test_half_of_the_estimates_are_within_a_quarter_of_the_wait(seed: int, tmp_path: Path) -> None:
    replay = Replay(seed)
    told = replay.run(200)
    assert len(told) > 150
    assert replay.room.evictions > 30
    assert min(each.told_s for each in told) > 0
    assert median_error(told) <= LONGEST_MEDIAN

    StateFile(tmp_path / "state.json", replay.learned, dict).save()
    known = Learned(SERVERS)
    StateFile(tmp_path / "state.json", known, dict).load()
    told = Replay(seed + 100, learned=known).run(60, burst=True)
    assert len(told) == 59
    assert min(each.told_s for each in told) > 0
    assert median_error(told) <= LONGEST_MEDIAN
    last = told[-1]
    assert last.told_s == pytest.approx(last.waited_s, rel=LONGEST_MEDIAN)
