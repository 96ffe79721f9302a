"""Who must go: a pure function, so every case is a line."""

from __future__ import annotations

import pytest

from gpumanager.scheduling.victims import Demand, Resident, plan_eviction


def resident(name: str, mib: int = 1000, used: float | None = None, **more: object) -> Resident:
    return Resident(name, loaded=True, held_mib=mib, last_used=used, **more)  # type: ignore[arg-type]


def names(
    residents: list[Resident], available: int, needed: int = 5000, held: int = 0, **more: object
) -> list[str]:
    demand = Demand("target", needed, held, **more)  # type: ignore[arg-type]
    return [victim.name for victim in plan_eviction(demand, residents, available).victims]


def test_what_fits_evicts_nobody() -> None:
    plan = plan_eviction(Demand("target", 5000, 0), [resident("a")], 5000)
    assert plan.fits
    assert plan.victims == ()


def test_what_the_target_holds_already_counts() -> None:
    assert names([resident("a")], available=2000, held=3000) == []
    assert names([resident("a")], available=1999, held=3000) == ["a"]


def test_a_target_that_holds_all_it_needs_fits_even_on_a_full_card() -> None:
    assert plan_eviction(Demand("target", 5000, 5000), [resident("a")], -256).fits


def test_a_target_that_needs_nothing_fits() -> None:
    assert plan_eviction(Demand("target", 0, 0), [], -256).fits


def test_least_recently_used_goes_first() -> None:
    residents = [resident("new", used=30), resident("old", used=10), resident("mid", used=20)]
    assert names(residents, available=4500) == ["old"]
    assert names(residents, available=3500) == ["old", "mid"]


def test_never_used_goes_before_all() -> None:
    assert names([resident("old", used=1), resident("never")], available=4500) == ["never"]


def test_lower_priority_breaks_ties() -> None:
    residents = [
        resident("dear", used=1, priority=20),
        resident("cheap", used=1, priority=5),
    ]
    assert names(residents, available=4500) == ["cheap"]
    never = [resident("dear", priority=20), resident("cheap", priority=5)]
    assert names(never, available=4500) == ["cheap"]


def test_priority_does_not_outweigh_use() -> None:
    residents = [resident("idle", used=1, priority=99), resident("busy", used=2, priority=0)]
    assert names(residents, available=4500) == ["idle"]


@pytest.mark.parametrize(
    "spared",
    [
        Resident("spared", loaded=False, held_mib=0),
        resident("spared", evictable=False),
        resident("target"),
        resident("friend"),
        resident("spared", mib=0),
    ],
    ids=["not loaded", "not evictable", "the target itself", "coexists", "holds nothing"],
)
def test_who_is_spared(spared: Resident) -> None:
    residents = [spared, resident("victim", used=99)]
    friends = frozenset({"friend"})
    assert names(residents, available=4500, coexists_with=friends) == ["victim"]


def test_coexistence_is_the_targets_word_only() -> None:
    assert names([resident("a", mib=9000)], available=0, coexists_with=frozenset({"b"})) == ["a"]


def test_in_vain_nobody_goes_and_the_shortfall_is_named() -> None:
    plan = plan_eviction(Demand("target", 5000, 500), [resident("a"), resident("b")], 300)
    assert not plan.fits
    assert plan.victims == ()
    assert plan.short_mib == 5000 - 500 - 300 - 2000


def test_the_order_of_the_input_does_not_matter() -> None:
    residents = [resident("b"), resident("a"), resident("c")]
    assert names(residents, available=3500) == names(residents[::-1], available=3500) == ["a", "b"]
