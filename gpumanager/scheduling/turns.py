"""Whose turn it is: by urgency, and within an urgency by what each requester had of the GPU.

Plain data, like the backlog that keeps it. The jobs of one urgency are a level; in it, the jobs of
one requester are a lane, in their order. Lanes take turns by start-time fair queueing: each has a
tag, in GPU-seconds; the lane with the smallest is next, and what its job took (unloading others,
loading and running) is added to it. Whoever comes new, or comes back, starts at the tag of the job
that had its turn last, so that nobody saves anything up.

What is more urgent goes first, but nobody is left behind: the oldest job of a level is given the
turn, whatever else waits, `AGEING_S` after it became the oldest, for its own level and for each one
between it and the most urgent that waits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from operator import attrgetter
from typing import NamedTuple

from gpumanager.model import NORMAL, Job
from gpumanager.scheduling.policy import Waiting

AGEING_S = 60.0
REMEMBERED = 1000
"""So many requesters that wait for nothing are remembered, with what they had."""

LEVELS = 8
"""Urgency is 0 (now) to 7 (background)."""


class Key(NamedTuple):
    """The order of turns within a level."""

    tag: float
    ticket: int


class Passes:
    """Jobs of a lane that were granted before earlier ones of it, as long as one of those waits: as
    few as the policy allows at a time."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: list[tuple[int, float]] = []

    def beyond(self, ticket: int) -> list[float]:
        """When each was granted that has passed the one of this ticket."""
        return [at for each, at in self._entries if each > ticket]

    def note(self, ticket: int, first: int, now: float) -> None:
        """One more; of those that wait, `first` came first."""
        self._entries = [each for each in self._entries if each[0] > first]
        self._entries.append((ticket, now))


class Lane:
    """The jobs of one requester that wait, of one urgency. `usual_s` is what its jobs take."""

    __slots__ = ("passes", "places", "requester", "running", "tag", "usual_s")

    def __init__(self, requester: str, tag: float) -> None:
        self.requester = requester
        self.tag = tag
        self.usual_s = 0.0
        self.running = 0
        self.places: OrderedDict[int, Waiting] = OrderedDict()
        self.passes = Passes()

    @property
    def is_idle(self) -> bool:
        return not self.places and not self.running

    @property
    def head(self) -> int:
        return next(iter(self.places))

    @property
    def first(self) -> Waiting:
        return next(iter(self.places.values()))

    @property
    def key(self) -> Key:
        return Key(self.tag, self.head)


class Level:
    """All that wait and are of one urgency."""

    def __init__(self, urgency: int) -> None:
        self.urgency = urgency
        self.places: OrderedDict[int, Waiting] = OrderedDict()
        self.residents: dict[str, OrderedDict[int, Waiting]] = {}
        self.lanes: dict[str, Lane] = {}
        self.running = 0
        self.reached = 0.0  # the tag of whoever had its turn last
        self.oldest_granted = float("-inf")
        self._highest = 0.0
        self._next: list[tuple[Key, str]] = []
        self._idle: list[tuple[float, str]] = []

    @property
    def oldest(self) -> Waiting:
        return next(iter(self.places.values()))

    def add(self, place: Waiting) -> None:
        job, ticket = place.job, place.ticket
        lane = self.lanes.get(job.requester)
        if lane is None:
            lane = self.lanes[job.requester] = Lane(job.requester, self.reached)
        if not lane.places:
            lane.tag = max(lane.tag, self.reached)
        self.places[ticket] = lane.places[ticket] = place
        if job.makes_room:
            self.residents.setdefault(job.resident, OrderedDict())[ticket] = place
        if len(lane.places) == 1:
            self._line_up(lane)

    def remove(self, place: Waiting) -> Lane:
        job, ticket = place.job, place.ticket
        lane = self.lanes[job.requester]
        was_first = lane.head == ticket
        del self.places[ticket], lane.places[ticket]
        if job.makes_room:
            same = self.residents[job.resident]
            del same[ticket]
            if not same:
                del self.residents[job.resident]
        if was_first or not lane.places:
            self._line_up(lane)
        return lane

    def first(self) -> Waiting:
        """Whose turn it is in this level, by what each requester has had."""
        while True:
            key, requester = self._next[0]
            lane = self.lanes.get(requester)
            if lane is not None and lane.places and lane.key == key:
                return lane.places[key.ticket]
            heappop(self._next)

    def charge(self, lane: Lane, seconds: float) -> None:
        """Its requester has had so much more of the GPU, or less than was charged."""
        lane.tag += seconds
        self._line_up(lane)

    def ended(self, lane: Lane, seconds: float, charged: float) -> None:
        """A job of that lane has had the GPU for so long, of which so much is charged already."""
        lane.running -= 1
        self.running -= 1
        lane.usual_s = seconds
        self.charge(lane, seconds - charged)
        self._highest = max(self._highest, lane.tag)

    def forget(self) -> None:
        """Nobody waits or runs any more: what was is over."""
        self.reached = max(self.reached, self._highest)
        self.lanes.clear()
        self._next.clear()
        self._idle.clear()

    def reach(self, tag: float) -> None:
        """It was the turn of somebody with this tag. Who waits for nothing, and has had no more,
        is as good as new."""
        self.reached = max(self.reached, tag)
        while self._idle and self._idle[0][0] <= self.reached:
            self._forget_first()

    def _line_up(self, lane: Lane) -> None:
        if lane.places:
            heappush(self._next, (lane.key, lane.requester))
        elif lane.is_idle:
            heappush(self._idle, (lane.tag, lane.requester))
            if len(self._idle) > REMEMBERED:
                self._forget_first()

    def _forget_first(self) -> None:
        """Of those that wait for nothing, whoever has had the least."""
        tag, requester = heappop(self._idle)
        lane = self.lanes.get(requester)
        if lane is not None and lane.is_idle and lane.tag == tag:
            del self.lanes[requester]


@dataclass(frozen=True, slots=True)
class Charged:
    """What a job that runs was charged in advance."""

    job: Job
    since: float
    seconds: float


class Turns:
    """The order of all that wait, and what it is made of."""

    def __init__(self) -> None:
        self._levels = [Level(urgency) for urgency in range(LEVELS)]
        self._charged: dict[int, Charged] = {}
        self.by_resident: dict[str, int] = {}
        self._passes: dict[int, list[float]] = {}  # of those whose turn it was, when it was not
        self._sessions: dict[tuple[str, str], OrderedDict[int, None]] = {}
        self.longest_overtake = 0
        self.longest_overtake_s = 0.0

    # -- what happens ----------------------------------------------------------------------

    def add(self, place: Waiting) -> None:
        """A job came."""
        job = place.job
        self._level(job).add(place)
        self.by_resident[job.resident] = self.by_resident.get(job.resident, 0) + 1
        if job.session is not None:
            session = job.requester, job.session  # nobody names those of others
            self._sessions.setdefault(session, OrderedDict())[place.ticket] = None

    def remove(self, place: Waiting) -> None:
        """A job that waited has left."""
        self._leave(place)
        self._rest(self._level(place.job))

    def grant(self, place: Waiting, now: float) -> None:
        """A job has the GPU."""
        job, level = place.job, self._level(place.job)
        turn = self.turn(now)
        lane = level.lanes[job.requester]
        if place is not turn:
            self._note(place, turn, now)
        elif place is level.first():
            level.reach(lane.tag)
        if place.ticket == level.oldest.ticket:
            level.oldest_granted = now
        level.running += 1
        lane.running += 1
        self._leave(place)
        self._charged[place.ticket] = Charged(job, now, lane.usual_s)
        if lane.usual_s:
            level.charge(lane, lane.usual_s)

    def end(self, ticket: int, now: float) -> None:
        """A job gives the GPU back: its requester has had what it took."""
        charged = self._charged.pop(ticket)
        level = self._level(charged.job)
        level.ended(level.lanes[charged.job.requester], now - charged.since, charged.seconds)
        self._rest(level)

    # -- what is so ------------------------------------------------------------------------

    def turn(self, now: float) -> Waiting:
        """Whose turn it is. Somebody has to wait."""
        first: Level | None = None
        aged: Level | None = None
        longest = 0.0
        for level in self._levels:
            if not level.places:
                continue
            first = level if first is None else first
            since = max(level.oldest.since, level.oldest_granted)
            late = now - since - AGEING_S * (1 + level.urgency - first.urgency)
            if late >= 0 and (aged is None or late > longest):
                aged, longest = level, late
        if first is None:
            raise LookupError("nobody waits")
        return first.first() if aged is None else aged.oldest

    @property
    def anything_urgent(self) -> bool:
        """Whether anybody waits who is no background work."""
        return any(level.places for level in self._levels[: NORMAL + 1])

    def firsts(self, turn: Waiting) -> Iterator[Waiting]:
        """For each resident that jobs wait for, but the one of whose turn it is: the first of them
        that is not less urgent, and not behind another one of its session."""
        seen = {turn.job.resident}
        for level in self._levels[: _urgency(turn.job) + 1]:
            found = [next(iter(places.values())) for places in level.residents.values()]
            for place in sorted(found, key=attrgetter("ticket")):
                job = place.job
                if job.resident not in seen:
                    seen.add(job.resident)
                    if (
                        job.session is None
                        or next(iter(self._sessions[job.requester, job.session])) == place.ticket
                    ):
                        yield place

    def passed(self, place: Waiting, turn: Waiting) -> tuple[int, float | None]:
        """How often those were overtaken already that `place` would overtake, if it were granted
        although it is the turn of `turn`; and since when."""
        level = self._level(place.job)
        heads = {
            each.ticket: each
            for each in (turn, level.first(), level.lanes[place.job.requester].first)
            if each is not place
        }
        suffered = [self._suffered(each) for each in heads.values()]
        times = [min(each) for each in suffered if each]
        return max(map(len, suffered)), min(times, default=None)

    def in_order(self) -> Iterator[Waiting]:
        """All that wait: the more urgent first, then as they came."""
        for level in self._levels:
            yield from level.places.values()

    # -- inside ----------------------------------------------------------------------------

    def _level(self, job: Job) -> Level:
        return self._levels[_urgency(job)]

    def _lane(self, job: Job) -> Lane:
        return self._level(job).lanes[job.requester]

    def _leave(self, place: Waiting) -> None:
        job = place.job
        self._level(job).remove(place)
        self._passes.pop(place.ticket, None)
        self.by_resident[job.resident] -= 1
        if not self.by_resident[job.resident]:
            del self.by_resident[job.resident]
        if job.session is not None:
            name = job.requester, job.session
            session = self._sessions[name]
            del session[place.ticket]
            if not session:
                del self._sessions[name]

    def _rest(self, level: Level) -> None:
        if not level.running and not level.places:
            level.forget()

    def _suffered(self, place: Waiting) -> list[float]:
        """When the first of a lane was overtaken: by later ones of its own requester since it came,
        and by any since its turn came."""
        lane = self._lane(place.job)
        return lane.passes.beyond(place.ticket) + self._passes.get(place.ticket, [])

    def _note(self, place: Waiting, turn: Waiting, now: float) -> None:
        """A grant out of turn."""
        passed, since = self.passed(place, turn)
        self.longest_overtake = max(self.longest_overtake, passed + 1)
        if since is not None:
            self.longest_overtake_s = max(self.longest_overtake_s, now - since)
        lane = self._lane(place.job)
        if lane.head != place.ticket:
            lane.passes.note(place.ticket, lane.head, now)
        for each in {turn.ticket, self._level(place.job).first().ticket} - {lane.head}:
            self._passes.setdefault(each, []).append(now)


def _urgency(job: Job) -> int:
    return min(max(job.urgency, 0), LEVELS - 1)
