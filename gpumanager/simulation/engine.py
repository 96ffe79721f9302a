"""Plays a trace in virtual time: what the broker would do, without a broker.

It asks `decision.decide` as the broker's queue does, at the same occasions and by the same
pictures, and carries out what that says on a card of made-up data. No threads, no clock, no real
card. What was decided is noted in order, so that it can be compared with what a broker did:

    ("grant", number)            the job of that number has the GPU
    ("evict", name, number)      that one is unloaded for it
    ("load", name, number)       what it needs is loaded
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from math import inf

from gpumanager.model import Job, parts_of
from gpumanager.scheduling.backlog import Backlog
from gpumanager.scheduling.decision import (
    Decision,
    MakeRoom,
    Prepare,
    Refuse,
    SoFar,
    Start,
    Wait,
    decide,
)
from gpumanager.scheduling.policy import Affinity, Policy, Waiting
from gpumanager.scheduling.sharing import Sharing
from gpumanager.simulation.results import overtakes
from gpumanager.simulation.stage import Stage
from gpumanager.simulation.trace import Course, Move, Operation, Played, Task, Trace


class Impossible(Exception):
    """A job that cannot be made to fit, as the broker would refuse it; the message says which."""


@dataclass(slots=True)
class _Open:
    """A job that has come, and is not over."""

    task: Task
    job: Job
    came: float
    granted: float | None = None
    began: float | None = None
    tried: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Player:
    """A policy as it is played. `ended` is told of each job that is over, and of the seconds that
    it had the GPU. `alone`: whoever is loaded makes place for a job that needs another one,
    whether or not both would fit."""

    policy: Policy
    ended: Callable[[Job, float], object] = lambda job, seconds: None  # noqa: ARG005
    alone: bool = False


def play(trace: Trace, name: str, make: Callable[[Stage], Player]) -> Course:
    """How the trace goes by the policy that `make` makes for a card. Raises Impossible."""
    return _Play(trace, name, make).run()


class _Play:
    def __init__(self, trace: Trace, name: str, make: Callable[[Stage], Player]) -> None:
        self._trace = trace
        self._name = name
        self._stage = Stage(trace)
        self._player = make(self._stage)
        self._now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._numbers = count(1)
        self._backlog = Backlog(self._player.policy, self._stage)
        self._open: dict[int, _Open] = {}
        self._over: dict[int, tuple[_Open, float]] = {}
        self._preparing: int | None = None
        self._moving = False
        self._behind: dict[int, list[Task]] = {}
        self._moves: list[Move] = []
        self._decisions: list[tuple[str, ...]] = []

    def run(self) -> Course:
        for task in sorted(self._trace.tasks, key=lambda each: (each.at, each.number)):
            if task.after is None:
                self._at(task.at, self._comes, task)
            else:
                self._behind.setdefault(task.after, []).append(task)
        while self._due:
            self._now, _, happen = heapq.heappop(self._due)
            happen()
        backlog, turns = self._backlog, isinstance(self._player.policy, Affinity)
        out_of_turn = (backlog.longest_overtake, backlog.longest_overtake_s) if turns else None
        moves, decisions = tuple(self._moves), tuple(self._decisions)
        return Course(self._name, self._jobs(), moves, out_of_turn, decisions)

    def _jobs(self) -> tuple[Played, ...]:
        over = self._over
        past = overtakes(
            {number: job.granted for number, (job, _) in over.items() if job.granted is not None},
            {number: ended for number, (job, ended) in over.items() if job.granted is None},
        )
        jobs = [
            Played(job.task, job.came, job.granted, job.began, ended, *past[number])
            for number, (job, ended) in over.items()
        ]
        return tuple(sorted(jobs, key=lambda job: job.task.number))

    # -- what happens ----------------------------------------------------------------------

    def _at(self, when: float, what: Callable[..., None], *about: object) -> None:
        heapq.heappush(self._due, (when, next(self._order), lambda: what(*about)))

    def _comes(self, task: Task) -> None:
        number = next(self._numbers)
        consumer, model = parts_of(task.needs)
        job = Job(
            consumer,
            task.kind,
            client=task.requester,
            request_id=str(task.number),
            makes_room=task.operation != "unload",
            runs=task.operation is None,
            model=model,
            urgency=task.urgency,
            requester=task.requester,
            session=task.session,
        )
        self._open[number] = _Open(task, job, self._now)
        size = self._trace.footprints[task.needs]
        sharing = Sharing(size.parallel, size.beside)
        self._backlog.add(Waiting(number, job, self._now, inf, sharing))
        if task.leaves_s is not None:
            self._at(self._now + task.leaves_s, self._leaves, number)
        self._grant()

    def _leaves(self, number: int) -> None:
        if self._backlog.remove(number) is not None:
            self._close(number)
            self._grant()

    def _runs(self, number: int) -> None:
        job = self._open[number]
        job.began = self._now
        operation = job.task.operation
        if operation == "unload" and self._stage.is_loaded(job.task.needs):
            self._moving = True
            seconds = self._trace.footprints[job.task.needs].unload_s
            self._note_move("unload", job.task.needs, number, seconds)
            self._at(self._now + seconds, self._unloaded_at_will, number)
            return
        if operation is None:
            self._stage.use(job.task.needs, self._now)
        self._at(self._now + (job.task.run_s if operation is None else 0.0), self._ends, number)

    def _ends(self, number: int) -> None:
        running, job = self._backlog.end(number, self._now), self._open[number]
        if job.task.operation is None:
            self._stage.use(job.task.needs, self._now)
        self._player.ended(running.job, self._now - running.since)
        self._close(number)
        if self._preparing is not None and not self._moving:
            self._make_room(self._preparing)
        self._grant()
        if job.task.operation is None:  # learned once the next job has the GPU, as in the broker
            self._stage.ran(job.task.needs, job.task.run_s)

    def _close(self, number: int) -> None:
        job = self._open.pop(number)
        self._over[number] = job, self._now
        for task in self._behind.pop(job.task.number, ()):
            self._at(max(task.at, self._now + task.think_s), self._comes, task)

    # -- what is decided -------------------------------------------------------------------

    def _grant(self) -> None:
        """Have those start, or be prepared, whose turn it is."""
        backlog = self._backlog
        while backlog.may_grant and self._preparing is None:
            decision = decide(backlog.picture(self._now), self._player.policy)
            if isinstance(decision, Start):
                for number in decision.tickets:
                    self._give(number)
                    self._runs(number)
            elif isinstance(decision, Prepare):
                self._give(decision.ticket, prepared=False)
                self._make_room(decision.ticket)
            else:
                if isinstance(decision, Wait) and decision.why == "hold":
                    self._at(decision.until, self._grant)
                return

    def _give(self, number: int, *, prepared: bool = True) -> None:
        self._backlog.grant(number, self._now, prepared=prepared)
        self._open[number].granted = self._now
        self._decisions.append(("grant", str(self._open[number].task.number)))

    def _make_room(self, number: int) -> None:
        """What comes next for the job that has the GPU, and whose resident has no room yet."""
        self._preparing, job = number, self._open[number]
        step = self._next_step(number, job)
        if isinstance(step, Start):
            self._load(number)
        elif isinstance(step, MakeRoom):
            victim = step.victims[0].name
            job.tried |= {victim}
            self._moving = True
            seconds = self._trace.footprints[victim].unload_s
            self._decisions.append(("evict", victim, str(job.task.number)))
            self._note_move("unload", victim, number, seconds)
            self._at(self._now + seconds, self._unloaded, number, victim)
        elif isinstance(step, Refuse):
            raise Impossible(f"job {job.task.number}: there is no room for {job.task.needs}")
        # Else those have to end first that run.

    def _next_step(self, number: int, job: _Open) -> Decision:
        picture = self._backlog.preparing(
            number, self._now, self._stage.card(self._now), SoFar(tried=job.tried)
        )
        if not self._player.alone:
            return decide(picture, self._player.policy)
        others = tuple(self._stage.movable(job.task.needs))
        if not others or self._stage.is_loaded(job.task.needs):
            return decide(picture, self._player.policy)
        return MakeRoom(number, others)

    def _unloaded(self, number: int, victim: str) -> None:
        self._moving = False
        self._stage.unload(victim)
        self._make_room(number)
        self._grant()

    def _unloaded_at_will(self, number: int) -> None:
        self._moving = False
        self._stage.unload(self._open[number].task.needs)
        self._ends(number)

    def _load(self, number: int) -> None:
        name = self._open[number].task.needs
        if self._stage.is_loaded(name):
            self._prepared(number)
            return
        self._moving = True
        seconds = self._trace.footprints[name].load_s
        self._decisions.append(("load", name, str(self._open[number].task.number)))
        self._note_move("load", name, number, seconds)
        self._at(self._now + seconds, self._loaded, number)

    def _loaded(self, number: int) -> None:
        self._moving = False
        self._stage.load(self._open[number].task.needs)
        self._prepared(number)

    def _prepared(self, number: int) -> None:
        self._preparing = None
        self._backlog.prepared(number)
        self._runs(number)
        self._grant()

    def _note_move(self, what: Operation, name: str, number: int, seconds: float) -> None:
        task = self._open[number].task.number
        self._moves.append(Move(what, name, task, self._now, seconds))
