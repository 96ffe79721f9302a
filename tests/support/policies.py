"""Random traces played by the queue's own plain data, and what the policies promise checked on what
came of them by counting, job by job.

The card holds a few residents at a time; who was used longest ago goes. Times are made up and known
exactly. Nothing here is how the broker does it, but `Backlog` and `decide`.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from gpumanager.model import Job
from gpumanager.scheduling.backlog import Backlog
from gpumanager.scheduling.decision import Prepare, Start, Wait, decide
from gpumanager.scheduling.policy import (
    Affinity,
    FirstComeFirstServed,
    Policy,
    Prospect,
    Waiting,
)
from gpumanager.scheduling.sharing import ALONE, Sharing
from gpumanager.scheduling.turns import AGEING_S


@dataclass(frozen=True, slots=True)
class Arrival:
    """A job that comes, with the seconds that it runs, and for which its client waits."""

    at: float
    job: Job
    run_s: float
    leaves_s: float | None = None


@dataclass(slots=True)
class Card:
    """Holds the last `size` residents that were used."""

    size: int
    load_s: dict[str, float]
    unload_s: float
    run_s: dict[str, float]
    holds: list[str] = field(default_factory=list)
    shares: dict[str, Sharing] = field(default_factory=dict)

    def ready(self, job: Job) -> bool:
        return job.resident in self.holds

    def prospect(self, job: Job) -> Prospect:
        name = job.resident
        fits = len(self.holds) < self.size
        return Prospect(
            name in self.holds, fits, self.load_s[name], self.unload_s, self.run_s[name]
        )

    def use(self, name: str) -> float:
        """Have it on the card; returns the seconds that takes."""
        seconds = 0.0
        if name in self.holds:
            self.holds.remove(name)
        elif len(self.holds) == self.size:
            del self.holds[0]
            seconds = self.unload_s + self.load_s[name]
        else:
            seconds = self.load_s[name]
        self.holds.append(name)
        return seconds


@dataclass(frozen=True, slots=True)
class Grant:
    """A job got the GPU. `turn` is the ticket whose turn it was, by the policy's own word."""

    at: float
    ticket: int
    turn: int
    depth: int


@dataclass(slots=True)
class Run:
    """What happened, by ticket. `took_s` is how long each had the GPU."""

    policy: Policy
    jobs: dict[int, Waiting] = field(default_factory=dict)
    gone: dict[int, float] = field(default_factory=dict)
    grants: list[Grant] = field(default_factory=list)
    took_s: dict[int, float] = field(default_factory=dict)
    ends: list[tuple[float, Job]] = field(default_factory=list)
    holds: int = 0
    swaps: int = 0
    longest_overtake: int = 0
    longest_overtake_s: float = 0.0

    def waited(self, ticket: int, at: float, order: int) -> bool:
        """Whether it waited when the grant of that place was made."""
        return self.jobs[ticket].since <= at and self._left(ticket) > (at, order)

    def _left(self, ticket: int) -> tuple[float, int]:
        for order, grant in enumerate(self.grants):
            if grant.ticket == ticket:
                return grant.at, order
        return self.gone.get(ticket, float("inf")), -1


def trace(seed: int, jobs: int = 25, *, plain: bool = False) -> tuple[list[Arrival], Card]:
    """`plain`: one requester, one urgency."""
    chance = random.Random(seed)
    names = [f"c{n}" for n in range(chance.randint(1, 5))]
    requesters = ["-"] if plain else [f"r{n}" for n in range(chance.randint(1, 4))]
    urgencies = [3] if plain else chance.choice(([3], [3], [2, 6], [0, 3, 7]))
    sessions = [None] if plain else chance.choice(([None], [None, "s", "t"]))
    usual = {name: chance.choice((0.1, 1.0, 5.0, 20.0)) for name in names}
    shares = {}
    if seed % 3 == 0:
        shares = {
            name: Sharing(
                chance.choice((1, 2, 5)),
                frozenset(each for each in names if each != name and chance.random() < 0.5),
            )
            for name in names
        }
    card = Card(
        chance.randint(1, max(1, len(names) - 1)),
        {name: chance.choice((0.5, 5.0, 20.0)) for name in names},
        chance.choice((0.0, 1.0)),
        usual,
        shares=shares,
    )
    at, arrivals, gap = 0.0, [], chance.choice((0.0, 0.3, 3.0))
    for _ in range(chance.randint(2, jobs)):
        at += chance.expovariate(1 / gap) if gap else 0.0
        name = chance.choice(names)
        job = Job(
            name,
            "llm",
            makes_room=chance.random() > 0.05,
            urgency=chance.choice(urgencies),
            requester=chance.choice(requesters),
            session=chance.choice(sessions),
        )
        leaves = chance.uniform(0, 100) if chance.random() < 0.1 else None
        arrivals.append(Arrival(at, job, usual[name] * chance.uniform(0.5, 1.5), leaves))
    return arrivals, card


def talk(seed: int, jobs: int = 40) -> tuple[list[Arrival], Card]:
    """A person asks for a few things, one soon after the other, and then thinks; or soon gives up.
    Meanwhile long jobs come, mostly background work."""
    chance = random.Random(seed)
    names = ["stt", "llm", "tts", "image"]
    usual = dict(zip(names, (0.3, 1.0, 0.5, 15.0), strict=True))
    card = Card(chance.randint(1, 4), dict.fromkeys(names, 0.2), 0.1, usual)
    at, goes_on = 0.0, chance.choice((1.0, 0.9, 0.3))
    arrivals: list[Arrival] = []
    session = chance.choice((None, "s"))
    while len(arrivals) < jobs:
        at += chance.uniform(20, 40)
        began = at
        for name in names[:3]:
            job = Job(name, name, requester="anna", session=session, urgency=chance.choice((1, 3)))
            run_s = usual[name] * chance.uniform(0.5, 1.5)
            arrivals.append(Arrival(at, job, run_s))
            at += run_s + 1.0 + chance.uniform(0.0, 1.0)
            if chance.random() > goes_on:
                break
        if chance.random() < 0.7:
            urgency = chance.choice((3, 6, 6, 6, 7))
            job = Job("image", "image", requester="nightly", urgency=urgency)
            leaves = chance.uniform(0, 5) if chance.random() < 0.2 else None
            came = began + chance.uniform(0, 4)
            arrivals.append(Arrival(came, job, 15 * chance.uniform(0.5, 1.5), leaves))
    return arrivals, card


def policy_for(seed: int) -> Policy:
    """One of those that there are."""
    chance = random.Random(-seed)
    if chance.random() < 0.1:
        return FirstComeFirstServed()
    return Affinity(
        max_overtake=chance.choice((0.0, 3.0, 30.0, 300.0)),
        max_overtaken_by=chance.choice((0, 1, 3, 20)),
        hold=chance.choice((0.0, 0.0, 2.0, 10.0)),
    )


def play(arrivals: list[Arrival], card: Card, policy: Policy) -> Run:
    """In virtual time. Raises AssertionError if jobs run at once that may not, something is loaded
    or unloaded beside a job, or the card is idle while somebody waits."""
    run, backlog = Run(policy), Backlog(policy, card)
    due: list[tuple[float, int, str, int]] = []
    runs = {}
    for ticket, each in enumerate(sorted(arrivals, key=lambda each: each.at), start=1):
        sharing = card.shares.get(each.job.consumer, ALONE)
        run.jobs[ticket] = Waiting(ticket, each.job, each.at, each.at + 1e9, sharing)
        runs[ticket] = each.run_s
        heapq.heappush(due, (each.at, ticket, "comes", ticket))
        if each.leaves_s is not None:
            heapq.heappush(due, (each.at + each.leaves_s, ticket, "leaves", ticket))
    while due:
        now, _, what, ticket = heapq.heappop(due)
        if what == "comes":
            backlog.add(run.jobs[ticket])
        elif what == "ends":
            backlog.end(ticket, now)
            run.ends.append((now, run.jobs[ticket].job))
        elif what == "asks":
            pass
        elif what == "prepared":
            backlog.prepared(ticket)
        elif backlog.remove(ticket) is not None:
            run.gone[ticket] = now
        for granted in _grants(run, backlog, policy, now):
            job, seconds = run.jobs[granted].job, runs[granted]
            if job.makes_room:
                swap_s = card.use(job.resident)
                run.swaps += swap_s > 0
                seconds += swap_s
                assert len(backlog.running) == 1 or not swap_s, "a swap beside a job"
                heapq.heappush(due, (now + swap_s, granted, "prepared", granted))
            run.took_s[granted] = seconds
            heapq.heappush(due, (now + seconds, granted, "ends", granted))
        if backlog.waiting and not backlog.running:
            held = decide(backlog.picture(now), policy)
            assert isinstance(held, Wait), "idle, and somebody waits"
            _check_hold(run, backlog, held, now)
            heapq.heappush(due, (held.until, 0, "asks", 0))
            run.holds += 1
        _check_together(backlog, card)
    assert not backlog.waiting
    run.longest_overtake = backlog.longest_overtake
    run.longest_overtake_s = backlog.longest_overtake_s
    return run


def _check_hold(run: Run, backlog: Backlog, held: Wait, now: float) -> None:
    """The card may be idle although somebody waits only for a short time after a step of a
    conversation, and only while nobody waits but background work for which that is not too late."""
    policy = run.policy
    assert isinstance(policy, Affinity)
    assert held.why == "hold"
    assert now < held.until
    steps = [at for at, job in run.ends if job.urgency <= 3 and job.runs]
    assert steps, "held for nobody"
    assert held.until <= max(steps) + policy.hold
    for place in backlog.waiting.values():
        assert place.job.urgency > 3, "held while a person waits"
        assert held.until <= place.since + policy.max_overtake


def _check_together(backlog: Backlog, card: Card) -> None:
    jobs = [each.job for each in backlog.running.values()]
    for job in jobs:
        own = card.shares.get(job.consumer, ALONE)
        assert sum(each.consumer == job.consumer for each in jobs) <= own.most
        assert len(jobs) == 1 or job.makes_room
        for other in jobs:
            assert other.consumer == job.consumer or other.consumer in own.beside


def _grants(run: Run, backlog: Backlog, policy: Policy, now: float) -> Iterator[int]:
    while backlog.may_grant:
        picture = backlog.picture(now)
        decision = decide(picture, policy)
        if isinstance(decision, Start):
            (ticket,) = decision.tickets
        elif isinstance(decision, Prepare):
            ticket = decision.ticket
        else:
            return
        run.grants.append(Grant(now, ticket, picture.waiting[0].ticket, len(backlog.waiting)))
        backlog.grant(ticket, now, prepared=isinstance(decision, Start))
        yield ticket


# -- what is promised ------------------------------------------------------------------------------


def check(run: Run) -> None:
    """All that `docs/scheduling.md` says of the policy. Raises AssertionError."""
    tickets = [grant.ticket for grant in run.grants]
    assert len(set(tickets)) == len(tickets)
    assert {*tickets, *run.gone} == {*run.jobs}, "somebody was forgotten"
    policy = run.policy
    if isinstance(policy, Affinity):
        _check_overtaking(run, policy)
        _check_waits(run, policy)
        _check_own_order(run)
    else:
        assert tickets == sorted(tickets)
        assert run.longest_overtake == 0


def _check_overtaking(run: Run, policy: Affinity) -> None:
    longest, longest_s = 0, 0.0
    for ticket, place in run.jobs.items():
        past = []
        for order, grant in enumerate(run.grants):
            if grant.ticket == ticket or not run.waited(ticket, grant.at, order):
                continue
            other = run.jobs[grant.ticket].job
            same = (other.requester, other.urgency) == (place.job.requester, place.job.urgency)
            if (same and grant.ticket > ticket) or grant.turn == ticket:
                past.append(grant.at)
                assert other.urgency <= place.job.urgency or not same
                if grant.turn == ticket:
                    assert other.urgency <= place.job.urgency
        assert len(past) <= policy.max_overtaken_by, (ticket, past)
        if past:
            longest, longest_s = max(longest, len(past)), max(longest_s, past[-1] - past[0])
            assert past[-1] - past[0] <= policy.max_overtake, (ticket, past)
    # What is told of it is no less than what was.
    assert run.longest_overtake >= longest
    assert run.longest_overtake_s >= longest_s
    assert run.longest_overtake <= policy.max_overtaken_by
    assert run.longest_overtake_s <= policy.max_overtake


def _check_own_order(run: Run) -> None:
    """Of one requester, one urgency and one resident, they start as they came."""
    latest: dict[tuple[str, int, str, bool], int] = {}
    for grant in run.grants:
        job = run.jobs[grant.ticket].job
        which = job.requester, job.urgency, job.resident, job.makes_room
        assert latest.get(which, 0) < grant.ticket
        latest[which] = grant.ticket


def _check_waits(run: Run, policy: Affinity) -> None:
    """Nobody starves: the bound of the third theorem."""
    # Those of a pool end one after another, while more may join it for as long as overtaking goes.
    most = max(run.took_s.values(), default=0.0)
    for grant in run.grants:
        place = run.jobs[grant.ticket]
        older = sum(
            ticket < grant.ticket
            and each.job.urgency == place.job.urgency
            and run.waited(ticket, place.since, -1)
            for ticket, each in run.jobs.items()
        )
        put_off = (9 if policy.hold else 8) * policy.max_overtake
        step = AGEING_S * (1 + place.job.urgency) + put_off + 17 * most
        assert grant.at - place.since <= (older + 1) * step
