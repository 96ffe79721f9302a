"""Who must go: a pure function, so every case is a line."""

from __future__ import annotations

import pytest

from gpumanager.scheduling.lookahead import FEW, covers
from gpumanager.scheduling.victims import Demand, Order, Resident, plan_eviction, trims


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


# -- by what the queue is known to want ------------------------------------------------------------

ORDERS: list[Order] = ["lru", "cost"]


def queued(
    residents: list[Resident], available: int, *queue: Demand, order: Order = "lru"
) -> list[str]:
    """Who goes for a target of 5,000 MiB, while these wait behind it."""
    target = Demand("target", 5000, 0)
    plan = plan_eviction(target, residents, available, order=order, now=100, upcoming=queue)
    return [victim.name for victim in plan.victims]


def has(name: str, mib: int = 1000) -> Demand:
    """A job of one that is loaded."""
    return Demand(name, mib, mib)


@pytest.mark.parametrize("order", ORDERS)
def test_who_stands_next_in_the_queue_stays_however_long_it_was_idle(order: Order) -> None:
    """A small one evicted a large one whose job came next, because it was used least recently."""
    residents = [
        resident("llm", mib=9000, used=1, reload_s=20),
        resident("speech", mib=5000, used=99, reload_s=20),
    ]
    assert queued(residents, 3400, order=order) == ["llm"]
    assert queued(residents, 3400, has("llm", 9000), order=order) == ["speech"]


@pytest.mark.parametrize("order", ORDERS)
def test_who_is_wanted_latest_goes_first(order: Order) -> None:
    residents = [resident(name, used=50, reload_s=5) for name in "abc"]
    for queue in ("abc", "bca", "cab", "abab" + "cab"):
        (victim,) = queued(residents, 4500, *map(has, queue), order=order)
        assert victim == max("abc", key=queue.index), queue


def test_who_is_not_wanted_goes_before_who_is() -> None:
    residents = [resident("wanted", used=1, reload_s=5), resident("idle", used=99, reload_s=5)]
    assert queued(residents, 4500, has("wanted")) == ["idle"]


def test_one_that_is_wanted_but_quick_to_reload_goes_before_one_that_is_not() -> None:
    residents = [
        resident("quick", used=1, reload_s=1),
        resident("slow", used=99, reload_s=60),
        resident("next", used=99, reload_s=60),
    ]
    assert queued(residents, 4500, has("next"), has("slow"), has("quick")) == ["quick"]


@pytest.mark.parametrize("order", ORDERS)
def test_nobody_goes_who_turns_out_not_to_be_needed(order: Order) -> None:
    """The small one, and then the large one that alone was enough."""
    residents = [
        resident("small", mib=1000, used=1, reload_s=5),
        resident("large", mib=4000, used=50, reload_s=5),
    ]
    assert queued(residents, 1500, order=order) == ["large"]


def test_cost_takes_the_set_that_is_cheapest_to_reload() -> None:
    residents = [
        resident("a", mib=2000, used=90, reload_s=2),
        resident("b", mib=2000, used=90, reload_s=2),
        resident("big", mib=4000, used=90, reload_s=30),
    ]
    assert queued(residents, 1500, order="cost") == ["a", "b"]
    assert queued(residents, 1500, order="lru") == ["big"]  # as if both took equally long


def test_it_sees_that_room_for_the_next_job_is_made_at_once() -> None:
    """Unloading `large` serves the target and the two that wait; `small` only the target."""
    residents = [
        resident("small", mib=1000, used=1, reload_s=5),
        resident("large", mib=4000, used=50, reload_s=5),
    ]
    waiting = Demand("other", 2000, 0)
    residents.append(Resident("other", loaded=False, held_mib=0, reload_s=5))
    assert queued(residents, 4500) == ["small"]
    assert queued(residents, 4500, waiting, has("small")) == ["large"]


def test_nobody_goes_without_whom_a_job_of_the_queue_would_be_refused() -> None:
    """`guest` may not send `friend` away, nor the target, so it needs `other` to be there."""
    residents = [
        resident("friend", mib=3000, used=50, reload_s=5),
        resident("other", mib=3000, used=1, reload_s=5),
        resident("target", mib=0, evictable=False),
        Resident("guest", loaded=False, held_mib=0, reload_s=5),
    ]

    def choose(*spared: str) -> list[str]:
        plan = plan_eviction(
            Demand("target", 3000, 0),
            residents,
            0,
            now=100,
            upcoming=[Demand("guest", 3000, 0, frozenset(spared))],
        )
        return [victim.name for victim in plan.victims]

    assert choose() == ["other"]
    assert choose("friend") == ["friend"]


def test_of_a_crowd_a_set_is_found_from_which_nobody_can_be_spared() -> None:
    size = {f"c{place:02}": 100 + 37 * place % 300 for place in range(40)}
    for over in (50, 900, 4000, sum(size.values())):
        found = covers(list(size), size, over)
        assert found
        assert len(found) <= 2**FEW
        for each in found:
            given = sum(size[name] for name in each)
            assert given >= over
            assert given - min(size[name] for name in each) < over
    assert covers(list(size), size, sum(size.values()) + 1) == []


def test_a_crowd_with_a_long_queue_is_decided_as_well() -> None:
    residents = [resident(f"c{place:02}", used=place, reload_s=1 + place) for place in range(40)]
    queue = [has(f"c{place % 40:02}") for place in range(3, 103)]
    chosen = queued(residents, 1500, *queue)
    assert len(chosen) == 4
    assert not {"c03", "c04", "c05", "c06"} & set(chosen)


# -- trims ---------------------------------------------------------------------------------------


def trimmed(missing: int, target: str = "target", **gives: int) -> list[str]:
    residents = [
        resident(name.replace("__", "/"), trim_mib=mib, evictable=False)
        for name, mib in gives.items()
    ]
    return [each.name for each in trims(Demand(target, 5000, 0), residents, missing)]


def test_as_few_are_trimmed_as_give_enough() -> None:
    assert trimmed(900, a=300, b=1000, c=500) == ["b"]
    assert trimmed(1400, a=300, b=1000, c=500) == ["b", "c"]


def test_all_that_give_anything_are_trimmed_if_they_are_not_enough() -> None:
    assert trimmed(9000, a=300, b=0, c=500) == ["c", "a"]


def test_who_it_is_for_is_not_trimmed() -> None:
    """Its own jobs use what it could give back, also those of another model."""
    assert trimmed(900, target="a", a=1000, b=100) == ["b"]
    assert trimmed(900, target="a/large", a=1000, a__small=1000, b=100) == ["b"]
