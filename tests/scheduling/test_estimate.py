"""What is expected of the queue: pure arithmetic."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import pytest

from gpumanager.consumers.learning import Learned, Times
from gpumanager.model import Job, Turn
from gpumanager.scheduling.estimate import (
    PLAYED,
    Doing,
    Forecast,
    Granting,
    Outlook,
    Profile,
    forecast,
    guess,
    is_overdue,
    left,
)
from gpumanager.scheduling.policy import Running, Waiting
from gpumanager.scheduling.victims import Demand, Resident

NOW = 1000.0
FREE_MIB = 8000


def waiting(*names: str, **more: Any) -> list[Waiting]:
    return [
        Waiting(2 + place, Job(name, "tts", **more), since=NOW, deadline=NOW + 600)
        for place, name in enumerate(names)
    ]


def running(name: str, since: float = NOW, **more: Any) -> list[Running]:
    return [Running(1, Job(name, "tts", **more), since=since)]


def profile(
    name: str, mib: int, *, loaded: bool = False, run: float = 2, load: float = 10, **more: Any
) -> Profile:
    return Profile(
        Resident(
            name,
            loaded=loaded,
            held_mib=mib if loaded else 0,
            last_used=NOW if loaded else None,
            reload_s=load,
        ),
        Demand(name, mib, mib if loaded else 0),
        run=guess(run),
        cold=guess(run + load),
        load=guess(load),
        unload=guess(1),
        **more,
    )


def outlook(*profiles: Profile, doing: Doing | None = None, **more: Any) -> Outlook:
    held = sum(each.resident.held_mib for each in profiles)
    found = {each.resident.name: each for each in profiles}
    return Outlook(found, available_mib=FREE_MIB - held, doing=doing, **more)


def played(queue: list[Waiting], view: Outlook, now: list[Running] | None = None) -> Forecast:
    return forecast(queue, now or [], view, NOW)


def seen(*seconds: float) -> Times:
    learned = Learned(["it"])
    for each in seconds:
        learned.ran("it", each)
    times = learned.figures("it").run_s
    assert times is not None
    return times


# -- how long something still takes ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("elapsed", "expected"),
    [(0, 5), (3, 3), (5.5, 1.5), (8, 0.5), (8.2, 0.5), (9.5, 1.5), (40, 32)],
)
def test_what_is_left_is_what_those_took_that_took_longer(elapsed: float, expected: float) -> None:
    """Of 2, 4, 6 and 8 s. Longer than any, it is taken to need as long again as it is over."""
    assert left(seen(2, 4, 6, 8), elapsed) == expected


def test_what_was_never_seen_is_taken_to_need_as_long_again() -> None:
    assert [left(guess(4), elapsed) for elapsed in (0, 1, 3, 100)] == [4, 3, 3, 100]


def test_nothing_that_goes_on_has_nothing_left() -> None:
    for times in (seen(0.0), seen(3, 3), guess(0), guess(2)):
        assert all(left(times, elapsed) > 0 for elapsed in (0, 0.5, 2, 3, 1e6))


def test_overdue_is_what_took_far_longer_than_ever() -> None:
    assert [is_overdue(seen(2, 8), elapsed) for elapsed in (1, 8, 9.9, 10.1)] == [
        False,
        False,
        False,
        True,
    ]
    assert not is_overdue(guess(1), 1e6)  # nobody knows what is usual


# -- a queue, played through -----------------------------------------------------------------------


def test_an_empty_queue_is_done() -> None:
    assert played([], outlook()) == Forecast({}, [], 0)


def test_of_strangers_there_are_guesses() -> None:
    turns = played(waiting("a", "b"), Outlook(), running("c")).turns
    assert turns == [
        Turn(wait_s=1, run_s=1),
        Turn(wait_s=2, run_s=1),
    ]


def test_each_consumer_takes_what_it_usually_takes() -> None:
    view = outlook(
        profile("voice", 1000, loaded=True, run=2), profile("llm", 1000, loaded=True, run=30)
    )
    found = played(waiting("llm", "voice", "llm"), view)
    assert [turn.wait_s for turn in found.turns] == [0.001, 30, 32]
    assert found.done_s == 62


def test_loading_and_unloading_count_by_who_was_there_before() -> None:
    """Two that do not fit together: each turn unloads the other one and loads its own."""
    view = outlook(profile("voice", 3000, loaded=True), profile("llm", 6000, load=20))
    found = played(waiting("voice", "llm", "llm", "voice"), view)
    assert [(turn.evict_s, turn.load_s, turn.run_s) for turn in found.turns] == [
        (0, 0, 2),
        (1, 20, 2),
        (0, 0, 2),
        (1, 10, 2),
    ]
    assert [turn.wait_s for turn in found.turns] == [0.001, 2, 25, 27]


def test_what_fits_beside_the_others_is_loaded_without_unloading_anybody() -> None:
    view = outlook(profile("voice", 3000, loaded=True), profile("small", 2000))
    (turn, again) = played(waiting("small", "small"), view).turns
    assert (turn.evict_s, turn.load_s, again.load_s) == (0, 10, 0)


def test_who_goes_is_chosen_as_it_will_be() -> None:
    """`voice` is wanted again, so `image` goes, and voice needs no loading."""
    view = outlook(
        profile("voice", 3000, loaded=True),
        profile("image", 3000, loaded=True),
        profile("llm", 4000),
    )
    turns = played(waiting("llm", "voice"), view).turns
    assert [(turn.evict_s, turn.load_s) for turn in turns] == [(1, 10), (0, 0)]


def test_without_a_card_to_reckon_with_only_loading_counts() -> None:
    profiles = {
        "voice": profile("voice", 3000, loaded=True),
        "llm": profile("llm", 6000),
    }
    turns = played(waiting("llm", "voice"), Outlook(profiles)).turns
    assert [(turn.evict_s, turn.load_s) for turn in turns] == [(0, 10), (0, 0)]


def test_one_that_can_never_fit_is_tried_with_all_others_gone() -> None:
    view = outlook(profile("voice", 3000, loaded=True), profile("huge", 9000))
    (turn,) = played(waiting("huge"), view).turns
    assert (turn.evict_s, turn.load_s) == (1, 10)


def test_an_unload_takes_what_unloading_takes_and_the_next_job_a_load() -> None:
    view = outlook(profile("voice", 3000, loaded=True))
    queue = [*waiting("voice", makes_room=False), *waiting("voice")]
    turns = played(queue, view).turns
    assert [(turn.load_s, turn.run_s) for turn in turns] == [(0, 1), (10, 2)]


def test_a_load_runs_nothing() -> None:
    view = outlook(profile("voice", 3000))
    (turn, after) = played([*waiting("voice", runs=False), *waiting("voice")], view).turns
    assert turn == Turn(wait_s=0.001, load_s=10)
    assert (after.wait_s, after.load_s, after.run_s) == (10, 0, 2)


# -- what goes on already --------------------------------------------------------------------------


def test_a_job_that_runs_needs_what_is_left_of_it() -> None:
    view = outlook(profile("voice", 3000, loaded=True, run=30, running_since=NOW - 10))
    found = played(waiting("voice"), view, running("voice", NOW - 25))
    assert found.running[1] == Turn(run_s=20)
    assert found.turns[0].wait_s == 20


def test_one_that_loads_with_its_job_needs_the_load_too() -> None:
    cold = profile("voice", 3000, loaded=True, running_since=NOW - 4, runs_cold=True)
    assert played([], outlook(cold), running("voice", NOW - 4)).running[1] == Turn(run_s=8)


def test_an_overdue_job_says_so_and_so_do_those_behind_it() -> None:
    known = Profile(
        Resident("voice", loaded=True, held_mib=0),
        Demand("voice", 0, 0),
        run=seen(2, 3, 4),
        running_since=NOW - 7,
    )
    found = played(waiting("voice", "voice"), outlook(known), running("voice", NOW - 7))
    assert found.running[1] == Turn(run_s=3, overdue=True)
    assert [(turn.wait_s, turn.overdue) for turn in found.turns] == [(3, True), (6, True)]


@pytest.mark.parametrize(
    ("doing", "expected"),
    [
        (None, (1, 10)),
        (Doing("unload", "voice", NOW - 0.25), (0.75, 10)),
        (Doing("load", "llm", NOW - 4), (0, 6)),
    ],
)
def test_of_what_is_done_for_it_before_it_runs_the_rest_counts(
    doing: Doing | None, expected: tuple[float, float]
) -> None:
    view = outlook(profile("voice", 3000, loaded=True), profile("llm", 6000), doing=doing)
    found = played(waiting("voice"), view, running("llm", NOW - 4))
    turn = found.running[1]
    assert (turn.evict_s, turn.load_s, turn.run_s) == (*expected, 2)
    assert found.turns[0].wait_s == turn.left_s
    assert found.turns[0].load_s == 10  # it had to go


def test_an_unload_that_goes_on_has_its_rest_left() -> None:
    view = outlook(profile("voice", 3000, loaded=True))
    found = played(waiting("voice"), view, running("voice", NOW - 0.75, makes_room=False))
    assert found.turns[0].wait_s == 0.75  # as long again: it was never seen
    assert found.turns[0].load_s == 10


# -- what of it was never seen ---------------------------------------------------------------------


def known(name: str, mib: int = 3000, *, loaded: bool = True, **more: Any) -> Profile:
    """A consumer whose every time was seen at least once; `more` replaces some."""
    times = {"run": seen(2), "cold": seen(12), "load": seen(10), "unload": seen(1)}
    return replace(profile(name, mib, loaded=loaded), **{**times, **more})


def surely(queue: list[Waiting], view: Outlook, **more: Any) -> list[float]:
    return [turn.surely_s for turn in forecast(queue, (), view, NOW, **more).turns]


def test_only_what_was_seen_is_sure() -> None:
    """The turn of the stranger itself is a guess; what it waits for is not."""
    view = outlook(known("voice"), known("stranger", run=guess(5)))
    assert surely(waiting("voice", "stranger", "voice", "voice"), view) == [0, 2, 2, 4]


@pytest.mark.parametrize(("unseen", "missing"), [("run", 2), ("load", 10), ("unload", 1)])
def test_each_part_of_a_turn_counts_for_itself(unseen: str, missing: float) -> None:
    """`llm` has to be loaded, and `voice` unloaded for it."""
    change: dict[str, Any] = {unseen: guess(7)}
    of_voice = change if unseen == "unload" else {"load": guess(7)}
    view = outlook(
        known("voice", 6000, **of_voice),
        known("llm", 6000, loaded=False, **({} if unseen == "unload" else change)),
    )
    assert surely(waiting("llm", "llm"), view) == [0, 13 - missing]


def test_of_what_runs_the_rest_is_sure_if_such_were_seen() -> None:
    for times, rest in ((seen(9), 8), (guess(9), 0)):
        view = outlook(known("voice", run=times, running_since=NOW - 1))
        found = played(waiting("voice"), view, running("voice", NOW - 1))
        assert (found.running[1].surely_s, found.turns[0].surely_s) == (rest, rest)


def test_of_moves_those_are_sure_that_were_seen() -> None:
    view = outlook(known("voice", run=guess(2)))
    moves = [*waiting("voice", makes_room=False), *waiting("voice", runs=False)]
    assert surely([*moves, *waiting("voice", "voice")], view) == [0, 1, 11, 11]


def test_those_far_behind_are_sure_by_how_long_those_before_them_run() -> None:
    view = outlook(known("voice"), known("stranger", run=guess(2)))
    queue = waiting(*["voice"] * (PLAYED + 2), "stranger", "voice")
    assert surely(queue, view)[-3:] == [2 * PLAYED + 2, 2 * PLAYED + 4, 2 * PLAYED + 4]


def test_where_jobs_overtake_each_other_only_those_of_the_same_are_sure() -> None:
    view = outlook(known("voice"), known("llm", run=seen(5)))
    queue = [
        *waiting("voice", "llm", requester="a"),
        *waiting("voice", requester="b"),
        *waiting("voice", requester="a", urgency=6),
        *waiting("voice", "llm", requester="a"),
    ]
    assert surely(queue, view) == [0, 2, 7, 9, 11, 13]
    assert surely(queue, view, granted="in turns") == [0, 0, 0, 0, 2, 5]
    assert surely(queue, view, granted="together") == [0] * 6


def test_what_runs_comes_first_but_where_jobs_run_together() -> None:
    view = outlook(known("voice", run=seen(9), running_since=NOW - 1))
    rest = {}
    for granted in get_args(Granting):
        found = forecast(waiting("voice"), running("voice", NOW - 1), view, NOW, granted=granted)
        rest[granted] = found.turns[0].surely_s
    assert rest == {"in order": 8, "in turns": 8, "together": 0}


@pytest.mark.parametrize(
    ("doing", "seen_before", "sure"),
    [
        (Doing("load", "llm", NOW - 4), True, 6 + 2),
        (Doing("load", "llm", NOW - 4), False, 2),
        (Doing("load", "llm", NOW - 40), True, 2),  # overdue
        (Doing("unload", "voice", NOW - 0.25), True, 0.75 + 10 + 2),
    ],
)
def test_of_what_is_done_for_it_before_it_runs_the_rest_is_sure(
    doing: Doing, seen_before: bool, sure: float
) -> None:
    load = seen(10) if seen_before else guess(10)
    view = outlook(known("voice"), known("llm", 6000, loaded=False, load=load), doing=doing)
    found = played(waiting("voice"), view, running("llm", NOW - 4))
    assert found.running[1].surely_s == found.turns[0].surely_s == sure


# -- a long one ------------------------------------------------------------------------------------


def crowd(jobs: int, consumers: int = 12) -> tuple[list[Waiting], Outlook]:
    """Each turn has to unload somebody."""
    names = [f"c{place}" for place in range(consumers)]
    profiles = [profile(name, 1500, loaded=name in names[:5]) for name in names]
    queue = waiting(*(names[place * 7 % consumers] for place in range(jobs)))
    return queue, outlook(*profiles)


def test_those_far_behind_are_taken_to_need_what_those_before_them_do() -> None:
    queue, view = crowd(1000)
    found = played(queue, view)
    behind = found.turns[PLAYED:]
    assert len(behind) == 1000 - PLAYED
    near, far = found.turns[PLAYED - 1].wait_s, found.turns[-1].wait_s
    assert far / near == pytest.approx(1000 / PLAYED, rel=0.1)
    assert all(a.wait_s < b.wait_s for a, b in pairwise(behind))


def test_what_a_long_queue_costs_grows_with_its_length_at_most() -> None:
    def seconds(jobs: int) -> float:
        queue, view = crowd(jobs)
        best = float("inf")
        for _ in range(3):
            began = time.process_time()
            played(queue, view)
            best = min(best, time.process_time() - began)
        return best

    short, long = seconds(PLAYED), seconds(20 * PLAYED)
    assert long < 4 * short + 0.01  # all the work is in the first ones
