"""What happens next, decided from plain data; and what a grant costs."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest

from gpumanager.model import Job, MemoryReading
from gpumanager.residency.census import Census
from gpumanager.scheduling.decision import (
    Decision,
    MakeRoom,
    Picture,
    Prepare,
    Refuse,
    SoFar,
    Start,
    Wait,
    decide,
    idle_others,
    idle_trims,
)
from gpumanager.scheduling.factory import locked
from gpumanager.scheduling.memory import Card, Standing
from gpumanager.scheduling.policy import (
    Affinity,
    FirstComeFirstServed,
    Policy,
    Prospect,
    Running,
    Waiting,
)
from gpumanager.scheduling.queue import Granted, Room
from gpumanager.scheduling.sharing import ALONE, Sharing
from gpumanager.scheduling.victims import Demand, Resident
from tests.support.cards import NOW, situation
from tests.support.clock import FakeClock

ONE = FirstComeFirstServed()
SEVERAL = FirstComeFirstServed(limit=4, looks_at=4)


def waiting(*names: str, **more: Any) -> tuple[Waiting, ...]:
    """Their jobs, with the tickets 1, 2, and so on."""
    return tuple(
        Waiting(number, Job(name, "tts", **more), since=0.0, deadline=60.0)
        for number, name in enumerate(names, start=1)
    )


def running(*names: str) -> tuple[Running, ...]:
    """Theirs, with the tickets 11, 12, and so on."""
    return tuple(
        Running(number, Job(name, "tts"), since=0.0) for number, name in enumerate(names, start=11)
    )


def card(total: int = 10_000, foreign: int = 0, **consumers: tuple[int, int]) -> Card:
    """Consumers by what each needs and holds."""
    used = foreign + sum(held for _, held in consumers.values())
    return Card(
        {
            name: Standing(
                resident := Resident(name, held > 0, held),
                Demand(name, needed, held),
                declared_mib=needed,
                hoped_floor_mib=0,
                lucky=resident,
                lucky_surely_mib=held,
            )
            for name, (needed, held) in consumers.items()
        },
        MemoryReading(total, used, total - used),
    )


def but(known: Card, name: str, **changes: Any) -> Card:
    """The card, with something else about one consumer."""
    return replace(
        known, standings={**known.standings, name: replace(known.standings[name], **changes)}
    )


FULL = card(llm=(6000, 0), tts=(5000, 5000), stt=(3000, 3000))


def test_nobody_starts_where_nobody_waits() -> None:
    assert decide(Picture(), ONE) == Wait("nobody")


def test_the_first_starts_if_its_consumer_holds_all_it_needs() -> None:
    assert decide(Picture(waiting("tts", "llm"), ready={1}), ONE) == Start((1,))


def test_the_first_is_prepared_if_that_is_not_known() -> None:
    assert decide(Picture(waiting("llm", "tts"), ready={2}), ONE) == Prepare(1)


def test_what_takes_no_memory_starts_as_it_is() -> None:
    assert decide(Picture(waiting("llm", makes_room=False)), ONE) == Start((1,))


def test_nobody_starts_beside_another_one() -> None:
    picture = Picture(waiting("tts"), running("tts"), ready={1})
    assert decide(picture, ONE) == Wait("running")


def test_with_a_policy_for_several_all_start_that_can() -> None:
    picture = Picture(waiting("tts", "stt", "llm", "tts"), running("tts"), ready={1, 2, 4})
    assert decide(picture, SEVERAL) == Start((1, 2))  # and then it is decided for llm
    everyone = replace(picture, ready={1, 2, 3, 4})
    assert decide(everyone, SEVERAL) == Start((1, 2, 3))


def test_a_consumer_has_no_more_jobs_at_once_than_it_may() -> None:
    picture = Picture(waiting("tts", "tts", "tts"), ready={1, 2, 3}, limits={"tts": 2})
    assert decide(picture, SEVERAL) == Start((1, 2))
    assert decide(replace(picture, running=running("tts", "tts")), SEVERAL) == Wait("running")


def test_on_a_card_that_was_looked_at_the_first_starts_or_makes_room() -> None:
    assert decide(Picture(waiting("tts"), card=FULL), ONE) == Start((1,))
    decision = decide(Picture(waiting("llm"), card=FULL), ONE)
    assert isinstance(decision, MakeRoom)
    assert (decision.ticket, [each.name for each in decision.victims]) == (1, ["tts"])


def test_who_waits_is_not_unloaded_before_others() -> None:
    both_do = card(llm=(6000, 0), tts=(5000, 4000), stt=(3000, 4000))
    for waits, goes in (("tts", "stt"), ("stt", "tts")):
        decision = decide(Picture(waiting("llm", waits), card=both_do), ONE)
        assert isinstance(decision, MakeRoom)
        assert [each.name for each in decision.victims] == [goes]


def test_who_was_tried_is_not_asked_again() -> None:
    tried = SoFar(tried=frozenset({"tts"}))
    picture = Picture(running=running("llm"), card=FULL, preparing=11, so_far=tried)
    decision = decide(picture, ONE)
    assert isinstance(decision, Refuse)
    assert (decision.ticket, decision.look.plan.short_mib) == (11, 1000)


# -- victims are idle --------------------------------------------------------------------------


def test_a_consumer_whose_job_runs_is_never_a_victim() -> None:
    both_do = card(llm=(6000, 0), tts=(5000, 4000), stt=(3000, 4000))
    for busy, goes in (("tts", "stt"), ("stt", "tts")):
        picture = Picture(running=running("llm", busy), card=both_do, preparing=11)
        decision = decide(picture, SEVERAL)
        assert isinstance(decision, MakeRoom)
        assert [each.name for each in decision.victims] == [goes]


def test_if_only_its_memory_would_do_the_end_of_its_job_is_waited_for() -> None:
    picture = Picture(running=running("llm", "tts"), card=FULL, preparing=11)
    assert decide(picture, SEVERAL) == Wait("running")
    hopeless = card(foreign=2000, llm=(9000, 0), tts=(5000, 5000), stt=(3000, 3000))
    assert isinstance(decide(replace(picture, card=hopeless), SEVERAL), Refuse)


def test_nor_is_it_unloaded_for_one_that_ran_out_of_memory() -> None:
    picture = Picture(running=running("llm", "tts"), card=FULL, preparing=11)
    assert [each.name for each in idle_others(picture)] == ["stt"]
    assert idle_others(replace(picture, card=None)) == []


# -- what is waited for ------------------------------------------------------------------------


def test_memory_on_its_way_back_is_waited_for_while_there_is_patience() -> None:
    coming = but(FULL, "stt", coming_mib=4000)
    picture = Picture(running=running("llm"), card=coming, preparing=11)
    assert decide(picture, ONE) == Wait("memory")
    impatient = replace(picture, so_far=SoFar(patient=False))
    assert isinstance(decide(impatient, ONE), MakeRoom)


@pytest.mark.parametrize("how", ["overdue", "more to come"])
def test_memory_that_may_come_late_is_waited_for_before_a_refusal(how: str) -> None:
    late = but(FULL, "stt", late_mib=4000) if how == "overdue" else FULL
    done = SoFar(tried=frozenset({"tts", "stt"}), more_to_come=how == "more to come")
    picture = Picture(running=running("llm"), card=late, preparing=11, so_far=done)
    assert decide(picture, ONE) == Wait("late")


def test_those_that_were_left_alone_at_work_are_waited_for_before_a_refusal() -> None:
    done = SoFar(tried=frozenset({"tts", "stt"}), left_alone=frozenset({"tts"}))
    picture = Picture(running=running("llm"), card=FULL, preparing=11, so_far=done)
    assert decide(picture, ONE) == Wait("work", frozenset({"tts"}))


def test_a_job_that_may_fit_after_all_is_tried() -> None:
    """What is declared is less than what it was seen to need."""
    modest = but(card(llm=(11_000, 0)), "llm", declared_mib=9000)
    decision = decide(Picture(waiting("llm"), card=modest), ONE)
    assert isinstance(decision, Start)
    assert decision.attempt is not None
    assert decision.attempt.needed_mib == 11_000


def test_it_is_the_same_decision_whether_or_not_the_card_was_looked_at_before() -> None:
    """The broker grants, looks at the card, and asks again; a simulation asks once."""
    seen = set()
    for seed in range(100):
        snapshot, cases = situation(seed)
        known = Census(snapshot, NOW).card()
        for case in cases:
            places = waiting(case.target, *case.queue)
            at_once = decide(Picture(places, card=known, now=NOW), ONE)
            assert decide(Picture(places, now=NOW), ONE) == Prepare(1)
            granted = Running(1, places[0].job, since=NOW)
            later = Picture(places[1:], (granted,), card=known, preparing=1, now=NOW)
            assert decide(later, ONE) == at_once, (seed, case)
            seen.add(type(at_once))
    assert seen == {Start, MakeRoom, Wait, Refuse}


# -- what it costs -----------------------------------------------------------------------------


class Enough:
    """A room in which all hold what they need."""

    evictions = 0

    def ready(self, job: Job) -> bool:
        return True

    def prospect(self, job: Job) -> Prospect:
        raise AssertionError

    def sharing(self, job: Job) -> Sharing:
        return ALONE

    def make_room(self, ticket: Granted) -> None:
        raise AssertionError

    def relieve(self, ticket: Granted) -> bool:
        raise AssertionError


class Swapping(Enough):
    """A room in which only `a` is loaded."""

    def ready(self, job: Job) -> bool:
        return job.resident == "a"

    def prospect(self, job: Job) -> Prospect:
        return Prospect(self.ready(job), fits=False, load_s=10.0, unload_s=1.0, run_s=1.0)


def calls_of_a_grant(depth: int, policy: Policy, room: Room, names: str) -> tuple[int, int]:
    """Python's and builtin ones, for handing the GPU on with so many in the queue."""
    queue = locked(max_queue=depth + 1, max_wait=60, clock=FakeClock(), room=room, policy=policy)
    holder, *_ = [
        queue.enqueue(Job(names[n % len(names)], "tts", requester=f"r{n % 3}"))
        for n in range(depth + 1)
    ]
    counts = Counter[str]()

    def count(frame: FrameType, event: str, arg: object) -> None:
        counts[event] += 1

    gc.disable()  # what is left of other tests is not to be counted
    sys.setprofile(count)
    try:
        holder.close()
    finally:
        sys.setprofile(None)
        gc.enable()
    assert queue.stats().total_jobs == 2
    assert queue.stats().longest_overtake == ("b" in names)
    return counts["call"], counts["c_call"]


@pytest.mark.parametrize(
    ("policy", "room", "names"),
    [
        pytest.param(ONE, Enough(), "a", id="fifo"),
        pytest.param(Affinity(), Enough(), "a", id="affinity"),
        pytest.param(Affinity(), Swapping(), "abcb", id="overtaking"),
    ],
)
def test_a_grant_costs_as_much_with_ten_thousand_waiting_as_with_ten(
    policy: Policy, room: Room, names: str
) -> None:
    few = calls_of_a_grant(10, policy, room, names)
    assert calls_of_a_grant(10_000, policy, room, names) == few


# -- trims ---------------------------------------------------------------------------------------


def giving(known: Card, **mib: int) -> Card:
    """The card, where these give back so much while they stay loaded."""
    for name, gives in mib.items():
        resident = replace(known.standings[name].resident, trim_mib=gives)
        known = but(known, name, resident=resident, lucky=resident)
    return known


def step(known: Card, so_far: SoFar | None = None) -> Decision:
    picture = Picture(running=running("llm"), card=known, preparing=11)
    return decide(picture if so_far is None else replace(picture, so_far=so_far), ONE)


def chosen(decision: Decision) -> tuple[str, list[str]]:
    assert isinstance(decision, MakeRoom)
    return decision.method, [each.name for each in decision.victims]


def test_trims_that_are_enough_come_before_an_unload() -> None:
    lacking = 6000 - (FULL.reading.free_mib if FULL.reading is not None else 0)
    enough = giving(FULL, tts=lacking - 500, stt=500)
    assert chosen(step(enough)) == ("trim", ["tts", "stt"])
    assert chosen(step(giving(FULL, tts=lacking - 500, stt=499)))[0] == "unload"


def test_who_was_trimmed_for_this_job_is_not_trimmed_again() -> None:
    known = giving(FULL, stt=9000)
    assert chosen(step(known)) == ("trim", ["stt"])
    assert chosen(step(known, SoFar(trimmed=frozenset({"stt"}))))[0] == "unload"


def test_who_works_is_not_trimmed() -> None:
    picture = Picture(running=running("llm", "stt"), card=giving(FULL, stt=9000), preparing=11)
    assert chosen(decide(picture, SEVERAL))[0] == "unload"
    assert idle_trims(picture) == []


def test_memory_that_is_on_its_way_back_is_waited_for_before_anybody_is_trimmed() -> None:
    known = but(giving(FULL, stt=9000), "tts", coming_mib=9000)
    assert step(known) == Wait("memory")


def test_before_a_refusal_those_are_trimmed_that_may_be_enough() -> None:
    tried = SoFar(tried=frozenset({"tts"}))
    refused = step(FULL, tried)
    assert isinstance(refused, Refuse)
    short = refused.look.plan.short_mib
    known = giving(FULL, stt=short)
    assert chosen(step(known, tried)) == ("trim", ["stt"])
    assert isinstance(step(giving(FULL, stt=short - 1), tried), Refuse)


def test_for_a_job_that_ran_out_of_memory_all_others_may_be_trimmed() -> None:
    picture = Picture(
        running=running("llm"), card=giving(FULL, llm=100, tts=200, stt=300), preparing=11
    )
    assert [each.name for each in idle_trims(picture)] == ["stt", "tts"]
    assert idle_trims(replace(picture, card=None)) == []


# -- leaks ---------------------------------------------------------------------------------------


def leaking(mib: int, **resident: Any) -> Card:
    """A card without room for the next job of llm, which has leaked so much."""
    known = card(llm=(6000, 5000), tts=(500, 500))
    known = replace(known, reading=MemoryReading(9000, 9000, 0))
    own = replace(known.standings["llm"].resident, **resident)
    return but(known, "llm", resident=own, lucky=own, leaked_mib=mib)


def test_one_that_has_leaked_what_its_own_job_lacks_is_unloaded_for_it() -> None:
    """500 of the 1000 that are missing are the other one's."""
    assert chosen(step(leaking(500))) == ("unload", ["llm"])
    assert isinstance(step(leaking(499)), Refuse)


def test_it_is_not_if_unloading_others_is_enough() -> None:
    known = leaking(3000)
    tts = replace(known.standings["tts"].resident, held_mib=1000)
    assert chosen(step(but(known, "tts", resident=tts, lucky=tts))) == ("unload", ["tts"])


def test_it_is_not_while_another_job_of_it_runs_or_it_may_not_go_or_was_tried() -> None:
    pair = Picture(running=running("llm", "llm"), card=leaking(3000), preparing=11)
    assert isinstance(decide(pair, SEVERAL), Refuse | Wait)
    assert isinstance(step(leaking(3000, evictable=False)), Refuse)
    assert isinstance(step(leaking(3000), SoFar(tried=frozenset({"llm"}))), Refuse)
