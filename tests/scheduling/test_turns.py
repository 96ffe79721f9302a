"""Whose turn it is: by urgency, by what each requester had of the GPU, and by age."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from itertools import count, pairwise

import pytest

from gpumanager.model import Job
from gpumanager.scheduling.policy import Waiting
from gpumanager.scheduling.turns import AGEING_S, REMEMBERED, Turns


def place(ticket: int, requester: str = "-", since: float = 0.0, **more: object) -> Waiting:
    job = Job("tts", "tts", requester=requester, **more)  # type: ignore[arg-type]
    return Waiting(ticket, job, since, since + 600)


def served(turns: Turns, seconds: dict[str, float], until: float, now: float = 0.0) -> list[int]:
    """Have those run whose turn it is, one by one, as long as somebody waits."""
    order = []
    while turns.by_resident and now < until:
        turn = turns.turn(now)
        order.append(turn.ticket)
        turns.grant(turn, now)
        now += seconds[turn.job.requester]
        turns.end(turn.ticket, now)
    return order


def test_one_requester_is_served_as_its_jobs_came() -> None:
    turns = Turns()
    for ticket in range(1, 6):
        turns.add(place(ticket))
    assert served(turns, {"-": 7.0}, 100) == [1, 2, 3, 4, 5]


def test_the_more_urgent_goes_first() -> None:
    turns = Turns()
    for ticket, urgency in enumerate((7, 3, 0, 3), start=1):
        turns.add(place(ticket, urgency=urgency))
    assert served(turns, {"-": 1.0}, 100) == [3, 2, 4, 1]


def test_requesters_have_the_same_time_not_the_same_number_of_jobs() -> None:
    turns = Turns()
    for ticket in range(1, 201):
        turns.add(place(ticket, requester="long" if ticket % 2 else "short"))
    order = served(turns, {"long": 8.0, "short": 2.0}, 200)
    jobs = Counter("long" if ticket % 2 else "short" for ticket in order)
    assert abs(jobs["long"] * 8 - jobs["short"] * 2) <= 8


def test_a_script_with_hundreds_of_jobs_does_not_keep_a_person_waiting() -> None:
    turns = Turns()
    for ticket in range(1, 301):
        turns.add(place(ticket, requester="script"))
    for _ in range(3):
        turn = turns.turn(0)
        turns.grant(turn, 0)
        turns.end(turn.ticket, 0.5)
    turns.add(place(301, requester="person", since=0.5))
    assert turns.turn(0.5).ticket == 301


def test_who_was_away_has_saved_nothing_up() -> None:
    turns = Turns()
    turns.add(place(1, requester="away"))
    assert served(turns, {"away": 1.0}, 10) == [1]
    for ticket in range(2, 102):
        turns.add(place(ticket, requester="busy"))
    now = 0.0
    for _ in range(50):
        turn = turns.turn(now)
        turns.grant(turn, now)
        now += 1
        turns.end(turn.ticket, now)
    for ticket in range(201, 211):
        turns.add(place(ticket, requester="away", since=now))
    order = served(turns, {"away": 1.0, "busy": 1.0}, now + 9, now)
    assert 4 <= sum(ticket < 200 for ticket in order) <= 5  # by turns, from now on


def test_who_waits_for_nothing_is_forgotten() -> None:
    turns = Turns()
    now, tickets = 0.0, count(1)
    turns.add(place(next(tickets), requester="other"))
    for number in range(2 * REMEMBERED):
        turns.add(place(next(tickets), requester=f"r{number}", since=now))
        turn = turns.turn(now)
        turns.grant(turn, now)
        now += 1
        turns.end(turn.ticket, now)
    assert len(turns._levels[3].lanes) <= REMEMBERED + 2
    while turns.by_resident:
        turn = turns.turn(now)
        turns.grant(turn, now)
        turns.end(turn.ticket, now)
    assert not turns._levels[3].lanes
    assert not turns._levels[3]._next


@pytest.mark.parametrize("urgency", [0, 3, 7])
def test_nobody_is_left_behind_for_what_is_more_urgent(urgency: int) -> None:
    """While others that are as urgent as can be never stop coming."""
    turns = Turns()
    turns.add(place(1, "slow", urgency=urgency))
    now = 0.0
    for ticket in count(2):
        turns.add(place(ticket, f"r{ticket}", since=now, urgency=0))
        turn = turns.turn(now)
        turns.grant(turn, now)
        now += 1
        turns.end(turn.ticket, now)
        if turn.ticket == 1:
            break
        assert now < 1000
    assert now <= AGEING_S * (1 + urgency) + 2
    assert now >= AGEING_S * urgency  # nor does it go first


def test_background_work_has_one_job_in_so_much_time_and_no_more() -> None:
    turns = Turns()
    for ticket in range(1, 100):
        turns.add(place(ticket, "night", urgency=7))
    now, done = 0.0, []
    for ticket in range(100, 2000):
        turns.add(place(ticket, f"r{ticket}", since=now, urgency=3))
        turn = turns.turn(now)
        turns.grant(turn, now)
        now += 1
        turns.end(turn.ticket, now)
        if turn.job.urgency == 7:
            done.append(now)
    gaps = [later - earlier for earlier, later in pairwise(done)]
    assert done[0] == pytest.approx(5 * AGEING_S, abs=2)
    assert len(done) == 6
    assert gaps == [pytest.approx(5 * AGEING_S, abs=2)] * 5


def test_behind_another_one_of_its_session_none_overtakes() -> None:
    turns = Turns()
    for ticket, (name, session) in enumerate([("a", "s"), ("b", "s"), ("c", None)], start=1):
        job = Job(name, "llm", session=session)
        turns.add(Waiting(ticket, job, 0.0, 600.0))
    assert [each.ticket for each in turns.firsts(turns.turn(0))] == [3]
    turns.remove(turns.turn(0))
    assert [each.ticket for each in turns.firsts(turns.turn(0))] == [3]  # b's is the turn


class Simple:
    """The same by going through all that wait, each time."""

    def __init__(self) -> None:
        self.places: list[Waiting] = []
        self.tags: dict[tuple[int, str], float] = {}
        self.reached: dict[int, float] = defaultdict(float)
        self.highest: dict[int, float] = defaultdict(float)
        self.oldest_granted: dict[int, float] = defaultdict(lambda: float("-inf"))
        self.running: tuple[Job, float] | None = None

    def of(self, urgency: int) -> list[Waiting]:
        return [each for each in self.places if each.job.urgency == urgency]

    def add(self, place: Waiting) -> None:
        who = place.job.urgency, place.job.requester
        if not any((each.job.urgency, each.job.requester) == who for each in self.places):
            self.tags[who] = max(self.tags.get(who, 0.0), self.reached[who[0]])
        self.places.append(place)

    def first(self, urgency: int) -> Waiting:
        def key(place: Waiting) -> tuple[float, int]:
            return self.tags[urgency, place.job.requester], place.ticket

        return min(self.of(urgency), key=key)

    def turn(self, now: float) -> Waiting:
        levels = sorted({each.job.urgency for each in self.places})
        late = {}
        for urgency in levels:
            oldest = self.of(urgency)[0]
            since = max(oldest.since, self.oldest_granted[urgency])
            late[urgency] = now - since - AGEING_S * (1 + urgency - levels[0])
        longest = max(late.values())
        if longest >= 0:
            return self.of(next(each for each in levels if late[each] == longest))[0]
        return self.first(levels[0])

    def grant(self, place: Waiting, now: float) -> None:
        urgency = place.job.urgency
        if place is self.turn(now) and place is self.first(urgency):
            tag = self.tags[urgency, place.job.requester]
            self.reached[urgency] = max(self.reached[urgency], tag)
        if place is self.of(urgency)[0]:
            self.oldest_granted[urgency] = now
        self.places.remove(place)
        self.running = place.job, now

    def end(self, now: float) -> None:
        assert self.running is not None
        job, since = self.running
        who = job.urgency, job.requester
        self.tags[who] += now - since
        self.highest[job.urgency] = max(self.highest[job.urgency], self.tags[who])
        self.running = None
        self.rest(job.urgency)

    def remove(self, place: Waiting) -> None:
        self.places.remove(place)
        self.rest(place.job.urgency)

    def rest(self, urgency: int) -> None:
        runs = self.running is not None and self.running[0].urgency == urgency
        if not runs and not self.of(urgency):
            self.reached[urgency] = max(self.reached[urgency], self.highest[urgency])


@pytest.mark.parametrize("seed", range(40))
def test_it_is_what_going_through_all_of_them_gives(seed: int) -> None:
    chance = random.Random(seed)
    turns, simple = Turns(), Simple()
    waiting: list[Waiting] = []
    running: int | None = None
    now, tickets = 0.0, count(1)
    urgencies = chance.choice(([3], [2, 3], [0, 4, 7]))
    for _ in range(300):
        now += chance.choice((0.0, 1.0, 5.0))
        what = chance.random()
        if what < 0.5:
            job = Job(
                chance.choice("abc"),
                "llm",
                requester=chance.choice("pqrs"),
                urgency=chance.choice(urgencies),
            )
            new = Waiting(next(tickets), job, now, now + 600)
            waiting.append(new)
            turns.add(new)
            simple.add(new)
        elif what < 0.6 and waiting:
            gone = waiting.pop(chance.randrange(len(waiting)))
            turns.remove(gone)
            simple.remove(gone)
        elif running is None and waiting:
            given = turns.turn(now)
            if chance.random() < 0.3:  # out of turn
                given = next(turns.firsts(given), given)
            waiting.remove(given)
            turns.grant(given, now)
            simple.grant(given, now)
            running = given.ticket
        elif running is not None:
            turns.end(running, now)
            simple.end(now)
            running = None
        if waiting and running is None:  # while one runs, what it is charged is a guess
            assert turns.turn(now) is simple.turn(now)
            assert list(turns.in_order()) == sorted(
                waiting, key=lambda each: (each.job.urgency, each.ticket)
            )
