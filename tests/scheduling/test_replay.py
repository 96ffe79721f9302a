"""The one decision, held against how it was decided before (`tests/support/reference`): on random
cards, and in random runs of the whole queue."""

from __future__ import annotations

from collections import Counter

import pytest

from gpumanager.residency.census import Census
from gpumanager.residency.refusal import refusal
from gpumanager.scheduling.memory import Card, Look, can_be_made, is_room, look
from gpumanager.telemetry.events import Evicted, TriedAnyway
from tests.support import cards
from tests.support.reference import census as old_census
from tests.support.reference import refusal as old_refusal
from tests.support.rehearsal import Rehearsal

pytestmark = pytest.mark.untraced

CARDS = 300
RUNS = 100
PART = 4


def test_on_random_cards_the_same_is_decided() -> None:
    seen = Counter[str]()
    for seed in range(CARDS):
        snapshot, cases = cards.situation(seed)
        old = old_census.Census(snapshot, cards.NOW)
        card = Census(snapshot, cards.NOW).card()
        for case in cases:
            was = old.plan(case.target, case.tried, case.queue)
            now = look(card, case.target, case.queue, case.tried)
            compare(now, was, (seed, case))
            assert is_room(card, case.target) == was.plan.fits, (seed, case)
            surely = was.plan.fits or (bool(was.plan.victims) and not was.plan.attempt)
            assert can_be_made(card, case.target, case.tried) == surely, (seed, case)
            said = old_refusal.refusal(was, ["c0"])
            assert str(refusal(now, card, ["c0"], 5.0)) == str(said), (seed, case)
            seen[what(now, card)] += 1
            seen["worth waiting"] += now.worth_waiting
            seen["may come late"] += now.may_come_late
    # Often enough, all that can be decided was.
    assert len(seen) == 7, seen
    assert min(seen.values()) >= 10, seen


def compare(now: Look, was: old_census.Look, where: object) -> None:
    assert now.plan == was.plan, where
    assert (now.needed_mib, now.held_mib) == (was.needed_mib, was.held_mib), where
    assert now.balance == was.balance, where
    assert (now.coming_mib, now.late_mib) == (was.coming_mib, was.late_mib), where
    assert now.worth_waiting == was.worth_waiting, where
    assert now.may_come_late == was.may_come_late, where


def what(now: Look, card: Card) -> str:
    if now.plan.fits:
        return "fits"
    if now.plan.attempt:
        return "tried anyway"
    if not now.plan.victims:
        return "refused"
    known = {name: each.resident.floor_mib for name, each in card.standings.items()}
    hopeful = any(each.floor_mib < known[each.name] for each in now.plan.victims)
    return "makes room in hope" if hopeful else "makes room"


@pytest.mark.parametrize("part", range(PART))
def test_random_runs_go_as_they_went(part: int) -> None:
    """The same jobs start at the same times in the same order, the same calls are made for them,
    the same are unloaded, with the same outcome, and the same are refused, for the same reason."""
    seen = Counter[object]()
    for seed in range(part, RUNS, PART):
        was, now = Rehearsal(seed, old=True).run(), Rehearsal(seed, old=False).run()
        for index, (before, after) in enumerate(zip(was, now, strict=False)):
            assert after == before, (seed, index)
        assert len(now) == len(was), seed
        for each in now:
            if isinstance(each, tuple):
                seen[each[2] if each[0] == "failed" else each[0]] += 1
            elif isinstance(each, Evicted | TriedAnyway):
                seen[type(each).__name__] += 1
    assert {"runs", "begun", "left", "late", "unload", "load", "Evicted"} <= {*seen}, seen
    assert "InsufficientVram" in seen
