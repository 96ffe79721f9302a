"""What is expected of the queue: pure functions over plain data.

The queue is played through, job by job, on a picture of the card: who is loaded, who would have to
go for whom, and how long unloading, loading and running usually take each consumer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from gpumanager.consumers.learning import Times
from gpumanager.model import Job, Turn, parts_of
from gpumanager.scheduling.policy import Running, Waiting
from gpumanager.scheduling.sharing import may_join
from gpumanager.scheduling.victims import Demand, Order, Resident, candidates, plan_eviction

PLAYED = 50
"""So many jobs are played through. Those behind them are taken to need for unloading and loading
what these needed on average."""

LOOK_AHEAD = 1
"""Jobs of the queue that the choice of victims looks at here; the choice itself looks farther."""

UPCOMING = 16
"""Jobs of the queue that the choice of victims is told of here."""

LEAST_S = 0.001
"""Of a wait: who waits is never told that it takes no time."""

Granting = Literal["in order", "in turns", "together"]
"""How jobs are granted: one at a time, in the order of the queue; or so that some may overtake
others, but none an earlier one of the same requester, urgency and resident; or several at once."""

OVERDUE = 1.25
"""A job is overdue when it has run so many times longer than any that is remembered."""


def guess(seconds: float) -> Times:
    """In place of times that were never seen."""
    return Times(p50=seconds, p95=seconds, count=0, mean=seconds)


RUN, LOAD, UNLOAD = guess(1.0), guess(5.0), guess(1.0)
COLD = guess(RUN.mean + LOAD.mean)
NOTHING = Times(p50=0.0, p95=0.0, count=1, mean=0.0)
"""Of a job that ends as soon as its consumer is loaded."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A consumer, or a model of one, as the estimates see it: as the choice of victims does, what
    its jobs need of the card, and what things take it. `cold` is a job that loads it by itself,
    loading included. `running_since` is when the job that runs began (monotonic), `runs_cold` says
    that it is such a one."""

    resident: Resident
    demand: Demand
    run: Times = RUN
    cold: Times = COLD
    load: Times = LOAD
    unload: Times = UNLOAD
    running_since: float | None = None
    runs_cold: bool = False


@dataclass(frozen=True, slots=True)
class Doing:
    """What goes on for the holder of the GPU before its job begins, and since when (monotonic)."""

    what: Literal["unload", "load"]
    name: str
    since: float


@dataclass(frozen=True, slots=True)
class Outlook:
    """The picture of the card. `available_mib` is what is free less the reserve, None where nothing
    is decided by memory."""

    profiles: Mapping[str, Profile] = field(default_factory=dict)
    available_mib: int | None = None
    order: Order = "lru"
    doing: Doing | None = None

    def profile(self, name: str) -> Profile:
        """Of one consumer or model. A model that is not in the picture is taken to be like its
        consumer; of a consumer that is not, all is guessed."""
        found = self.profiles.get(name) or self.profiles.get(parts_of(name)[0])
        if found is None:
            found = Profile(Resident(name, loaded=True, held_mib=0), Demand(name, 0, 0))
        return found


@dataclass(frozen=True, slots=True)
class Forecast:
    """`turns` are those of the jobs that wait, in their order; `running` those that run, by ticket:
    `run_s` is what is left of them. `done_s`: until the queue as it stands is done."""

    running: Mapping[int, Turn]
    turns: Sequence[Turn]
    done_s: float


def forecast(
    waiting: Iterable[Waiting],
    running: Iterable[Running],
    outlook: Outlook,
    now: float,
    *,
    granted: Granting = "in order",
) -> Forecast:
    """Play the queue through, in this order: one job at a time, or as many as share the GPU. Where
    jobs are not `granted` so, what it says of waits is an upper bound, but for what comes before a
    job in any case."""
    places, running = list(waiting), list(running)
    queue = [place.job for place in places]
    card = _Card(outlook, now)
    names = [job.resident for job in queue if job.makes_room]
    begun = {each.ticket: _begun(each, card, names) for each in running}
    pool = _Pool([(begun[each.ticket].left_s, each) for each in running])
    overdue = any(turn.overdue for turn in begun.values())
    sure = _Sure(granted, sum(turn.surely_s for turn in begun.values()))
    played: list[Turn] = []
    position = 0
    for place in places[:PLAYED]:
        job, starts = place.job, pool.starts(place)
        position += job.makes_room
        turn = card.take(job, names[position : position + UPCOMING], starts)
        wait_s, surely_s = max(LEAST_S, starts), sure.before(job)
        played.append(replace(turn, wait_s=wait_s, overdue=overdue, surely_s=surely_s))
        pool.add(place, starts, turn.left_s)
        sure.add(job, turn.surely_s, _run_times(job, outlook.profile(job.resident)))
    switching, ahead = _switching(queue, played), pool.done_s
    for place in places[PLAYED:]:
        job = place.job
        times = _run_times(job, outlook.profile(job.resident))
        run_s = times.mean
        evict_s, load_s = switching.get(job.resident, switching[""]) if job.makes_room else (0, 0)
        surely_s = sure.before(job)
        played.append(Turn(max(LEAST_S, ahead), evict_s, load_s, run_s, overdue, surely_s))
        ahead += (evict_s + load_s + run_s) / place.sharing.most
        sure.add(job, run_s if times.count else 0.0, times)
    return Forecast(begun, played, ahead)


def left(times: Times, elapsed: float) -> float:
    """Seconds until something is over that has taken `elapsed` so far: what those took that took
    longer. Never 0: what has taken longer than any is taken to need as long again as it is over."""
    longer = [value for value in times.values if value > elapsed]
    if longer:
        return sum(longer) / len(longer) - elapsed
    if times.values:
        return max(elapsed - times.values[-1], times.mean / 10, LEAST_S)
    return max(times.mean - elapsed, elapsed, LEAST_S)


def is_overdue(times: Times, elapsed: float) -> bool:
    """Whether something has taken far longer than it ever did."""
    return bool(times.values) and elapsed > OVERDUE * times.values[-1]


class _Pool:
    """Those that have the GPU as the queue is played through, and when each is done: in seconds
    from now."""

    def __init__(self, running: Iterable[tuple[float, Running]]) -> None:
        self._members: list[tuple[float, Running]] = list(running)
        self._latest = 0.0  # nobody starts before one that was before it in the queue

    def starts(self, place: Waiting) -> float:
        """When the next one in the queue can start."""
        at = self._latest
        while members := [each for end, each in self._members if end > at]:
            if may_join(place, members):
                return at
            at = min(end for end, _ in self._members if end > at)
        return at

    def add(self, place: Waiting, starts: float, seconds: float) -> None:
        """It starts then, and has the GPU for so long."""
        self._latest = starts
        self._members = [each for each in self._members if each[0] > starts]
        own = Running(place.ticket, place.job, starts, place.sharing)
        self._members.append((starts + seconds, own))

    @property
    def done_s(self) -> float:
        """When all of them are done."""
        return max((end for end, _ in self._members), default=self._latest)


class _Sure:
    """What comes before a job in any case: all before it in the queue, or, where they take turns,
    those of its own requester, urgency and resident; beside what runs."""

    def __init__(self, granted: Granting, running_s: float) -> None:
        self._granted = granted
        self._running_s = running_s if granted != "together" else 0.0
        self._before_s: dict[object, float] = {}

    def before(self, job: Job) -> float:
        """Of one that has its place here: seconds."""
        return self._running_s + self._before_s.get(self._with(job), 0.0)

    def add(self, job: Job, turn_s: float, run: Times) -> None:
        """It has its place behind the others; as far as it was seen, `turn_s` is what its turn
        takes as the queue stands. What others do before it is not sure where they take turns."""
        if self._granted != "together":
            seconds = turn_s if self._granted == "in order" else _seen(run)
            self._before_s[self._with(job)] = self._before_s.get(self._with(job), 0.0) + seconds

    def _with(self, job: Job) -> object:
        if self._granted == "in order":
            return None
        return job.requester, job.urgency, job.resident, job.makes_room


class _Card:
    """The picture, as it changes while the queue is played through."""

    def __init__(self, outlook: Outlook, now: float) -> None:
        self._outlook = outlook
        self._now = now
        self._free = outlook.available_mib
        self._residents = {name: each.resident for name, each in outlook.profiles.items()}
        self._demands = {name: each.demand for name, each in outlook.profiles.items()}

    @property
    def outlook(self) -> Outlook:
        return self._outlook

    @property
    def now(self) -> float:
        return self._now

    def take(self, job: Job, behind: Sequence[str], after_s: float) -> Turn:
        """What the turn of a job needs that comes `after_s` from now, and what is so after it."""
        profile = self._outlook.profile(job.resident)
        run_s = _run_s(job, profile)
        resident = self._residents.get(profile.resident.name, profile.resident)
        if not job.makes_room:
            self._unload(resident)
            if not resident.loaded:
                return Turn()
            return Turn(run_s=run_s, surely_s=_seen(profile.unload))
        victims = self._victims(resident.name, behind, after_s)
        for victim in victims:
            self._unload(victim)
        load_s = 0.0 if resident.loaded else profile.load.mean
        unloads = [self._outlook.profile(victim.name).unload for victim in victims]
        evict_s = sum(times.mean for times in unloads)
        used = [*unloads, _run_times(job, profile)]
        used += [] if resident.loaded else [profile.load]
        self._load(resident, self._now + after_s + evict_s + load_s + run_s)
        surely_s = sum(map(_seen, used))
        return Turn(evict_s=evict_s, load_s=load_s, run_s=run_s, surely_s=surely_s)

    def _victims(self, name: str, behind: Sequence[str], after_s: float) -> Sequence[Resident]:
        demand = self._demands.get(name)
        if self._free is None or demand is None or demand.missing_mib <= max(0, self._free):
            return ()
        plan = plan_eviction(
            demand,
            self._residents.values(),
            self._free,
            order=self._outlook.order,
            now=self._now + after_s,
            upcoming=[self._demands[each] for each in behind if each in self._demands],
            look_ahead=LOOK_AHEAD,
        )
        if not plan.in_vain:
            return plan.victims
        return [each for each in candidates(self._residents.values()) if not demand.spares(each)]

    def _unload(self, resident: Resident) -> None:
        name = resident.name
        if self._free is None or name not in self._residents or not resident.yield_mib:
            return
        self._free += resident.yield_mib
        floor = resident.floor_mib
        self._residents[name] = replace(resident, loaded=False, held_mib=floor)
        self._demands[name] = replace(self._demands[name], held_mib=floor)

    def _load(self, resident: Resident, used: float) -> None:
        name = resident.name
        if name not in self._residents:
            return
        demand = self._demands[name]
        if self._free is not None:
            self._free -= demand.missing_mib
        held = resident.held_mib + demand.missing_mib
        self._residents[name] = replace(resident, loaded=True, held_mib=held, last_used=used)
        self._demands[name] = replace(demand, held_mib=max(demand.held_mib, demand.needed_mib))


def _begun(running: Running, card: _Card, behind: Sequence[str]) -> Turn:
    """What is left of the turn of a job that has the GPU."""
    job, outlook, now = running.job, card.outlook, card.now
    profile, doing = outlook.profile(job.resident), outlook.doing
    turn = card.take(job, behind[:UPCOMING], 0.0)
    since: float | None = running.since
    times = profile.unload
    if job.makes_room:
        since = profile.running_since if outlook.profiles else running.since
        times = profile.cold if profile.runs_cold else profile.run
    if since is not None:
        elapsed = now - since
        rest, overdue = left(times, elapsed), is_overdue(times, elapsed)
        surely_s = rest if times.count and not overdue else 0.0
        return Turn(run_s=rest, overdue=overdue, surely_s=surely_s)
    if doing is None:
        return turn
    elapsed = now - doing.since
    if doing.what == "load":
        rest, overdue = left(profile.load, elapsed), is_overdue(profile.load, elapsed)
        sure_rest = rest if profile.load.count and not overdue else 0.0
        surely_s = sure_rest + _seen(_run_times(job, profile))
        return replace(turn, evict_s=0.0, load_s=rest, overdue=overdue, surely_s=surely_s)
    unload = outlook.profile(doing.name).unload
    return replace(
        turn,
        evict_s=max(turn.evict_s - min(elapsed, unload.mean), left(unload, elapsed)),
        overdue=is_overdue(unload, elapsed),
        surely_s=max(0.0, turn.surely_s - min(elapsed, _seen(unload))),
    )


def _seen(times: Times) -> float:
    """What something takes, 0 where that is a guess."""
    return times.mean if times.count else 0.0


def _run_times(job: Job, profile: Profile) -> Times:
    if not job.makes_room:
        return profile.unload
    return profile.run if job.runs else NOTHING


def _run_s(job: Job, profile: Profile) -> float:
    return _run_times(job, profile).mean


def _switching(queue: Collection[Job], played: Sequence[Turn]) -> dict[str, tuple[float, float]]:
    """Mean seconds of unloading and loading of the jobs played through: by what they need, and over
    all under an empty name."""
    turns: dict[str, list[Turn]] = {}
    for job, turn in zip(queue, played, strict=False):
        if job.makes_room:
            turns.setdefault(job.resident, []).append(turn)
            turns.setdefault("", []).append(turn)
    means = {
        name: (
            sum(turn.evict_s for turn in each) / len(each),
            sum(turn.load_s for turn in each) / len(each),
        )
        for name, each in turns.items()
    }
    return {"": (0.0, 0.0), **means}
