"""What the queue told of each wait, beside what came of it, in a replayed trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpumanager.consumers.learning import Learned
from gpumanager.consumers.statefile import StateFile
from tests.support.replay import SERVERS, Replay, median_error

pytestmark = pytest.mark.untraced

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


def test_few_are_refused_who_would_have_had_their_turn_in_time() -> None:
    """Of those that are sure to come too late by what they are told, with limits around all waits
    there are; and most of those that do are told so."""
    told = [each for seed in range(3) for each in Replay(seed).run(200)]
    limits = (10, 30, 60, 120)
    refused = [(each, n) for n in limits for each in told if each.surely_s > n]
    wrong = sum(each.waited_s <= n for each, n in refused)
    late = sum(each.waited_s > n for n in limits for each in told)
    assert wrong < 0.1 * len(refused)
    assert len(refused) - wrong > 0.75 * late
