"""What happens next on the card: one pure function over plain data.

`decide` is asked whenever something has changed: a job came, left or ended, somebody was unloaded,
the card was looked at again. The queue asks it under its lock, a simulation by made-up data; both
carry out what it says, and ask again.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Literal

from gpumanager.scheduling.memory import Card, Look, can_trim, look, may_go
from gpumanager.scheduling.policy import Affinity, Claim, Policy, Running, Waiting
from gpumanager.scheduling.sharing import may_join
from gpumanager.scheduling.victims import Resident

# -- what is known ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SoFar:
    """What has been done for the job that is being prepared. `tried` were unloaded for it, or could
    not be, and are not asked again; `left_alone` of them worked on a job of somebody else, while
    another one could go instead. `trimmed` were asked to give back what they can while loaded.
    `patient`: there is time left to wait for memory that is on its
    way back; `more_to_come`: one that was unloaded for it may give back more yet."""

    tried: frozenset[str] = frozenset()
    left_alone: frozenset[str] = frozenset()
    trimmed: frozenset[str] = frozenset()
    patient: bool = True
    more_to_come: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """All that is decided by, as of one instant.

    `waiting` are the first places of the queue, in the order of arrival, as many as the policy
    looks at, or as matter for who must go; `running` are those that hold the GPU. `limits` is how
    many jobs of a consumer may run at once; one that is missing there may have as many as the
    policy lets run. `ready` are the tickets of those whose consumers surely hold all they need
    already, so that the card need not be looked at for them. `card` is None where nobody has
    looked at it. `preparing` is the ticket among the running ones whose consumer has yet to get
    its room, None if there is none, and `so_far` what has been done for it. If the first of
    those that wait would cost a swap, and others could overtake it, `waiting` are it and those
    others; for their `claims` and `depth` see `Affinity.overtaker`. `held` says, by ticket, until
    when jobs had better be held back for the next step of a conversation.
    """

    waiting: Sequence[Waiting] = ()
    running: Sequence[Running] = ()
    limits: Mapping[str, int] = field(default_factory=dict)
    ready: Container[int] = ()
    card: Card | None = None
    preparing: int | None = None
    so_far: SoFar = SoFar()
    now: float = 0.0
    claims: Mapping[int, Claim] = field(default_factory=dict)
    depth: int = 0
    held: Mapping[int, float] = field(default_factory=dict)


# -- what is decided -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """These jobs run now. `attempt`: how much is missing for it is only guessed, so it is tried."""

    tickets: tuple[int, ...]
    attempt: Look | None = None


@dataclass(frozen=True, slots=True)
class Prepare:
    """It is this job's turn; whether there is room for it is decided as soon as the card has been
    looked at."""

    ticket: int


@dataclass(frozen=True, slots=True)
class MakeRoom:
    """The first of the victims is unloaded for this job, or, by the method `trim`, gives back what
    it can while it stays loaded; then it is decided anew. None of them works on a job of the
    broker. It is the job's own consumer only if that has leaked what is missing."""

    ticket: int
    victims: tuple[Resident, ...]
    method: Literal["unload", "trim"] = "unload"


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing is done now, since nobody waits for the GPU (`nobody`), or those that run have to end
    first (`running`), or memory is on its way back (`memory`), or may come back late (`late`), or
    those of `consumers` that were left alone have to be waited for after all (`work`), or the job
    of `ticket` is held back until `until` (monotonic seconds), if nothing changes before (`hold`).
    """

    why: Literal["nobody", "running", "memory", "late", "work", "hold"]
    consumers: frozenset[str] = frozenset()
    ticket: int = 0
    until: float = inf


@dataclass(frozen=True, slots=True)
class Refuse:
    """There is no room for this job, whoever goes; `look` says what is missing."""

    ticket: int
    look: Look


Decision = Start | Prepare | MakeRoom | Wait | Refuse


def decide(picture: Picture, policy: Policy) -> Decision:
    """What to do now: start jobs, make room for one, wait, or refuse one. Pure; the caller carries
    it out and asks again."""
    if picture.preparing is not None:
        return _make_room(picture, picture.preparing)
    waiting, running = picture.waiting, picture.running
    if not waiting:
        return Wait("nobody")
    started: tuple[int, ...] = ()
    pool = bool(running) and policy.limit == 1
    while waiting:
        chosen = policy.next_up(waiting, () if pool else running, picture.now)
        if chosen is not None and picture.claims and isinstance(policy, Affinity):
            others = [place for place in waiting if place is not chosen]
            chosen = (
                policy.overtaker(chosen, others, picture.claims, picture.depth, picture.now)
                or chosen
            )
        if chosen is None or (picture.limits and _at_limit(picture.limits, running, chosen)):
            break
        if pool and not (chosen.ticket in picture.ready and may_join(chosen, running)):
            break  # so it closes, until they have ended
        until = picture.held.get(chosen.ticket, picture.now)
        if until > picture.now:
            return Start(started) if started else Wait("hold", ticket=chosen.ticket, until=until)
        if chosen.job.makes_room and chosen.ticket not in picture.ready:
            if started:
                break  # those first: they change what there is room for
            if picture.card is None:
                return Prepare(chosen.ticket)
            return _make_room(_granted(picture, chosen), chosen.ticket)
        started = (*started, chosen.ticket)
        if len(waiting) == 1 or picture.claims:
            break
        running = (*running, Running(chosen.ticket, chosen.job, picture.now))
        waiting = [place for place in waiting if place is not chosen]
    return Start(started) if started else Wait("running")


def idle_others(picture: Picture) -> list[Resident]:
    """All that may go for a job that runs, and has run out of memory: `preparing` is its ticket."""
    if picture.card is None or picture.preparing is None:
        return []
    own, others = _own(picture, picture.preparing)
    own_name = picture.card.standing(own.job.resident).resident.name
    return may_go(picture.card, {own_name, *others})


def idle_trims(picture: Picture) -> list[Resident]:
    """All others that give back something while they stay loaded, for such a job."""
    if picture.card is None or picture.preparing is None:
        return []
    own, others = _own(picture, picture.preparing)
    return can_trim(picture.card, own.job.resident, others)


def _at_limit(limits: Mapping[str, int], running: Sequence[Running], chosen: Waiting) -> bool:
    name = chosen.job.consumer
    limit = limits.get(name)
    return limit is not None and sum(each.job.consumer == name for each in running) >= limit


def _granted(picture: Picture, chosen: Waiting) -> Picture:
    return replace(
        picture,
        waiting=[place for place in picture.waiting if place is not chosen],
        running=(*picture.running, Running(chosen.ticket, chosen.job, picture.now)),
    )


def _own(picture: Picture, ticket: int) -> tuple[Running, frozenset[str]]:
    """The job of that ticket, and the consumers of all others that run."""
    (own,) = (each for each in picture.running if each.ticket == ticket)
    return own, frozenset(each.job.consumer for each in picture.running if each is not own)


def _make_room(picture: Picture, ticket: int) -> Decision:
    card, so_far = picture.card, picture.so_far
    if card is None:
        return Prepare(ticket)
    own, busy = _own(picture, ticket)
    target = own.job.resident
    upcoming = [place.job.resident for place in picture.waiting if place.job.makes_room]
    now = look(card, target, upcoming, so_far.tried | busy, so_far.trimmed)
    if now.plan.fits:
        return Start((ticket,))
    if now.worth_waiting and so_far.patient:
        return Wait("memory")
    if now.trims:
        return MakeRoom(ticket, now.trims, "trim")
    if now.leaking is not None:
        return MakeRoom(ticket, (now.leaking,))
    if now.plan.victims:
        return MakeRoom(ticket, now.plan.victims)
    if now.may_come_late or so_far.more_to_come:
        return Wait("late")
    if so_far.left_alone:  # the others were not enough after all
        return Wait("work", so_far.left_alone)
    if now.plan.attempt:
        return Start((ticket,), attempt=now)
    if busy and not look(card, target, upcoming, so_far.tried).plan.in_vain:
        return Wait("running")
    return Refuse(ticket, now)
