"""Who waits and who runs, in which order, and what each has been through: plain data, changed by
whoever is in charge of it. No threads, no I/O and no clock: time comes in as a number.

`Queue` keeps one under its lock. A simulation keeps one in virtual time, and drives it like this
(`now` never goes back; `sight` says what the card looks like at that moment):

    backlog = Backlog(policy, sight)
    backlog.add(Waiting(ticket, job, since=now, deadline=now + 600))   # tickets rise with arrival
    while backlog.may_grant:
        decision = decide(backlog.picture(now), policy)
        if isinstance(decision, Start):
            for ticket in decision.tickets:
                backlog.grant(ticket, now)      # it runs at once; its end comes later
        elif isinstance(decision, Prepare):
            backlog.grant(decision.ticket, now, prepared=False)  # it has the GPU
            # the card is looked at for it: decide(backlog.preparing(ticket, now, card, so_far),
            # policy) says who has to go first; then backlog.prepared(ticket), and decide again
        else:
            break                               # until the next arrival or end
    ...
    # Wait("hold") gives a time: decide again then, if nothing happened before.
    backlog.end(ticket, now)                    # its job is over: decide again
    backlog.remove(ticket)                      # or it left while it waited: decide again

Ask after every arrival, leaving and end, and after every grant, as above. A job that could not be
placed (`Refuse`) is ended like one that ran.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from heapq import heappop, heappush
from itertools import islice
from typing import Protocol

from gpumanager.model import Job
from gpumanager.scheduling.decision import Picture, SoFar
from gpumanager.scheduling.holds import Conversations, hold_until
from gpumanager.scheduling.memory import Card
from gpumanager.scheduling.policy import Affinity, Claim, Policy, Prospect, Running, Waiting
from gpumanager.scheduling.sharing import may_join
from gpumanager.scheduling.turns import Turns

UPCOMING = 100
"""Jobs of the queue that are told of; what comes later hardly matters for who must go now."""


class Sight(Protocol):
    """What is known of the card without a look at it. Must be cheap, and must not raise."""

    def ready(self, job: Job) -> bool:
        """Whether what the job needs surely is on the card, so that it can start as it is."""

    def prospect(self, job: Job) -> Prospect:
        """What the job would find. Asked only where jobs may overtake each other."""


class Backlog:
    """The queue and those that run, for one `policy`. Without `sight`, all jobs are ready: nothing
    is decided by memory."""

    def __init__(self, policy: Policy, sight: Sight | None = None) -> None:
        self._policy = policy
        self._sight = sight
        self._turns = Turns() if isinstance(policy, Affinity) else None
        self._conversations = None
        if isinstance(policy, Affinity) and policy.hold:
            self._conversations = Conversations(policy.hold)
        # OrderedDict, not dict: finding the first of a dict whose head was deleted many times
        # walks over the holes.
        self.waiting: OrderedDict[int, Waiting] = OrderedDict()
        self.running: dict[int, Running] = {}
        self._unprepared: set[int] = set()
        self.total_jobs = 0
        self._longest_overtake = 0
        self.last_wait_s = 0.0
        self.last_run_s = 0.0
        self._ahead: list[int] = []  # a heap of granted tickets, some of which overtook the first

    # -- what happens ----------------------------------------------------------------------

    def add(self, place: Waiting) -> None:
        """A job came."""
        self.waiting[place.ticket] = place
        if self._turns is not None:
            self._turns.add(place)
        if self._conversations is not None:
            self._conversations.arrived(place.job, place.since)

    def remove(self, ticket: int) -> Waiting | None:
        """A job that waits has left. None if none with that ticket waits."""
        place = self.waiting.pop(ticket, None)
        if place is not None and self._turns is not None:
            self._turns.remove(place)
        if place is not None and self._conversations is not None:
            self._conversations.left(place.job)
        return place

    def grant(self, ticket: int, now: float, *, prepared: bool = True) -> Waiting:
        """A job that waits has the GPU from now on; if it is not prepared, what it needs has yet to
        be made ready. Raises KeyError if it does not wait."""
        place = self.waiting.pop(ticket)
        if self._turns is not None:
            self._turns.grant(place, now)
        elif (first := self.oldest) is not None and first.ticket < ticket:
            self._count_overtakes(first.ticket, ticket)
        self.running[ticket] = Running(ticket, place.job, now, place.sharing)
        if not prepared:
            self._unprepared.add(ticket)
        self.total_jobs += 1
        self.last_wait_s = now - place.since
        return place

    def close_pool(self, ticket: int) -> None:
        """A job that runs has to be alone: none may join it, until it is `prepared` anew, or
        ended."""
        if ticket in self.running:
            self._unprepared.add(ticket)

    def besides(self, ticket: int) -> list[int]:
        """Those that have to end before a job is alone that is not to be joined: all that run, but
        those that came later and are to be alone, too. They wait for this one."""
        return [
            each
            for each in self.running
            if each != ticket and not (each > ticket and each in self._unprepared)
        ]

    def prepared(self, ticket: int) -> None:
        """What a job needs that has the GPU is ready now: others may join it."""
        self._unprepared.discard(ticket)

    def end(self, ticket: int, now: float) -> Running:
        """A job that had the GPU gives it back. Raises KeyError if it does not have it."""
        ended = self.running.pop(ticket)
        self._unprepared.discard(ticket)
        self.last_run_s = now - ended.since
        if self._turns is not None:
            self._turns.end(ticket, now)
        if self._conversations is not None:
            self._conversations.ended(ended.job, now)
        return ended

    # -- what is to be decided -------------------------------------------------------------

    @property
    def may_grant(self) -> bool:
        """Whether there may be something to decide: somebody waits, and one more may run."""
        if not self.waiting or len(self.running) < self._policy.limit:
            return bool(self.waiting)
        return not self._unprepared and all(each.sharing.is_open for each in self.running.values())

    def picture(self, now: float) -> Picture:
        """For `decide`: whose turn it is, and who may overtake. Costs the same however many wait.
        Somebody has to wait."""
        if self._turns is not None:
            picture = self._overtaking(self._turns, now)
            if self._conversations is None:
                return picture
            held = self._held(self._turns, self._conversations, picture.waiting, now)
            return replace(picture, held=held)
        waiting = tuple(islice(self.waiting.values(), self._policy.looks_at))
        ready = {place.ticket for place in waiting if self._is_ready(place)}
        return Picture(waiting, tuple(self.running.values()), ready=ready, now=now)

    def preparing(self, ticket: int, now: float, card: Card, so_far: SoFar) -> Picture:
        """For `decide`: what is to be done for a job that has the GPU, and has yet to get its room.
        Raises KeyError if it does not have it."""
        _ = self.running[ticket]
        return Picture(
            self.upcoming(),
            tuple(self.running.values()),
            card=card,
            preparing=ticket,
            so_far=so_far,
            now=now,
        )

    def upcoming(self) -> tuple[Waiting, ...]:
        """The first of those that take memory, in the order in which they will be granted as things
        stand."""
        takes = (place for place in self.in_order() if place.job.makes_room)
        return tuple(islice(takes, UPCOMING))

    def in_order(self) -> Iterator[Waiting]:
        """All that wait, in the order in which they will be granted as things stand."""
        return iter(self.waiting.values()) if self._turns is None else self._turns.in_order()

    @property
    def oldest(self) -> Waiting | None:
        """Of those that wait, the one that came first."""
        return next(iter(self.waiting.values()), None)

    @property
    def longest_overtake(self) -> int:
        """The most jobs that one was overtaken by: out of turn, where they take turns, else by any
        that came after it."""
        return self._longest_overtake if self._turns is None else self._turns.longest_overtake

    @property
    def longest_overtake_s(self) -> float:
        """The longest between the first and the last time that one was overtaken out of turn."""
        return 0.0 if self._turns is None else self._turns.longest_overtake_s

    # -- inside ----------------------------------------------------------------------------

    def _is_ready(self, place: Waiting) -> bool:
        sight, job = self._sight, place.job
        if sight is None:
            return True
        if not (job.makes_room and job.runs):
            return False
        # What a job runs on is there: nothing is unloaded beside it. For another context length
        # its model may be loaded anew.
        like = (job.resident, job.context)
        return any(
            (each.job.resident, each.job.context) == like for each in self.running.values()
        ) or sight.ready(job)

    def _overtaking(self, turns: Turns, now: float) -> Picture:
        turn, running = turns.turn(now), tuple(self.running.values())
        sight = self._sight
        if sight is None or not turn.job.makes_room or self._is_ready(turn):
            return Picture((turn,), running, ready={turn.ticket}, now=now)
        prospect = sight.prospect(turn.job)
        if prospect.loaded or prospect.fits:
            return Picture((turn,), running, now=now)
        claims = {turn.ticket: Claim(prospect)}
        places = [turn]
        for place in turns.firsts(turn):
            prospect = sight.prospect(place.job)
            if prospect.loaded and (not running or may_join(place, running)):
                passed, since = turns.passed(place, turn)
                same = turns.by_resident[place.job.resident]
                claims[place.ticket] = Claim(prospect, same, passed, since)
                places.append(place)
        ready = {place.ticket for place in places if self._is_ready(place)}
        return Picture(
            places, running, ready=ready, now=now, claims=claims, depth=len(self.waiting)
        )

    def _held(
        self, turns: Turns, talks: Conversations, places: Sequence[Waiting], now: float
    ) -> dict[int, float]:
        """Until when each of these had better be held back for the next step of a conversation:
        not while anybody waits who is no background work, or whom the promise is due."""
        policy, sight, oldest = self._policy, self._sight, self.oldest
        expected = talks.expected(now)
        if not expected or sight is None or oldest is None or turns.anything_urgent:
            return {}
        assert isinstance(policy, Affinity)  # noqa: S101  # else there are no conversations
        latest, held = oldest.since + policy.max_overtake, {}
        for place in places:
            job = place.job
            if job.makes_room and job.runs:
                prospect = sight.prospect(job)
                load_s = 0.0 if prospect.loaded else prospect.load_s
                seconds = load_s + prospect.run_s
                held[place.ticket] = hold_until(expected, job, seconds, now, latest)
        return held

    def _count_overtakes(self, first: int, ticket: int) -> None:
        """Of all that wait, the first was overtaken most often: by all that came after it and were
        granted already."""
        heappush(self._ahead, ticket)
        while self._ahead[0] < first:
            heappop(self._ahead)
        self._longest_overtake = max(self._longest_overtake, len(self._ahead))
