"""What a broker's events say has happened, as a trace that can be played again, and as the course
that it really took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from gpumanager.config import Config
from gpumanager.model import parts_of
from gpumanager.simulation.eventlines import BadEvents, Line, Lines
from gpumanager.simulation.happened import (
    ROUNDED_S,
    SeenJob,
    SeenMove,
    SeenSize,
    gave_up,
    job_of,
    moves_of,
    operations,
    sizes,
)
from gpumanager.simulation.results import overtakes
from gpumanager.simulation.trace import Course, Footprint, Move, Played, Task, Trace

GUESSED_LOAD_S = 5.0
GUESSED_UNLOAD_S = 1.0
"""Of what was never seen to load or unload."""

THINK_S = 10.0
"""A client whose job comes within so long after the end of its last one has waited for that."""

COLD = 2.0
"""A first job that takes so many times what is usual has loaded its consumer itself."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """What was recorded: to be played again, and as it was. `guesses` says in words what the events
    do not tell, and what was taken instead."""

    trace: Trace
    real: Course
    guesses: tuple[str, ...] = ()


def reconstruct(
    lines: Lines,
    name: str,
    config: Config | None = None,
    card_mib: int | None = None,
    *,
    clients_wait: bool = False,
) -> Recorded:
    """The trace and the course of these events. Sizes are those of the `config`, if one is given
    and declares them, else what the broker made room for; so is the card's, if not `card_mib`.
    With `clients_wait`, a client that seems to have waited for its answer is played so.

    Raises BadEvents, if a field has a value that it never has, or if something that is needed is
    told nowhere."""
    jobs = [job_of(line) for line in lines.events if line.event == "job"]
    if not jobs:
        raise BadEvents(f"{name} has no job that had the GPU: there is nothing to play")
    jobs += gave_up(lines.events, jobs)
    known = sizes(lines.events)
    moves = moves_of(lines.events)
    jobs += operations(moves, jobs)
    jobs.sort(key=lambda job: (job.came, job.ticket))
    for number, job in enumerate(jobs, start=1):
        job.number = number
    loaded = _walk(jobs, moves, known)
    _add_other_waits(jobs, moves)
    began = jobs[0].came
    guesses: list[str] = []
    seen = [median(each.loads) for each in known.values() if each.loads]
    usual_s = median(seen) if seen else GUESSED_LOAD_S
    footprints = {
        each: _footprint(each, known.get(each, SeenSize()), config, usual_s, guesses)
        for each in sorted({job.needs for job in jobs} | loaded)
    }
    total_mib = _total_mib(lines.events, config, card_mib, name)
    reserved_mib = (config or Config()).gpu.reserved_mib
    tasks = _tasks(jobs, began, clients_wait=clients_wait)
    try:
        trace = Trace(
            name,
            total_mib,
            footprints,
            tasks,
            reserved_mib=reserved_mib,
            order=(config or Config()).eviction,
            loaded=_that_fit(loaded, footprints, total_mib - reserved_mib, jobs),
        )
    except ValueError as error:
        raise BadEvents(f"{error}; a config with other sizes can be given with --config") from None
    if lines.missed:
        guesses.append(f"{lines.missed} events are missing, which the broker did not keep")
    if lines.cut:
        guesses.append(f"{lines.cut} is not whole, and was passed over")
    return Recorded(trace, _course(jobs, moves, tasks, began), tuple(guesses))


# -- what follows from it --------------------------------------------------------------------------


def _walk(
    jobs: Sequence[SeenJob], moves: Sequence[SeenMove], known: dict[str, SeenSize]
) -> set[str]:
    """Who was loaded at the beginning. On the way: jobs that loaded their consumer themselves run
    for what is usual, and the rest is a load."""
    usual = _usual_runs(jobs)
    steps: list[tuple[float, int, SeenMove | SeenJob]] = [(_done(move), 0, move) for move in moves]
    steps += [
        (job.began, 1, job) for job in jobs if job.began is not None and job.operation is None
    ]
    steps.sort(key=lambda step: step[:2])
    models: dict[str, set[str]] = {}
    for job in jobs:
        consumer, model = parts_of(job.needs)
        if model is not None:
            models.setdefault(consumer, set()).add(job.needs)
    made_room = {id(move.job) for move in moves if move.what == "unload"}
    at_first: set[str] = set()
    state: dict[str, bool] = {}
    for _, _, step in steps:
        if isinstance(step, SeenMove):
            parts = models.get(step.name, (step.name,))  # of a whole consumer, all its models
            for name in parts:
                if name not in state and step.what == "unload" and len(parts) == 1:
                    at_first.add(name)
                state[name] = step.what == "load"
            continue
        name = step.needs
        if name not in state and id(step) in made_room:
            state[name] = False  # there would have been no need to
        normal = usual.get(name, step.run_s)
        slow = step.run_s > COLD * normal
        if state.get(name) is False or (name not in state and slow):
            known.setdefault(name, SeenSize()).loads.append(max(0.0, step.run_s - normal))
            step.run_s = min(step.run_s, normal)
        elif name not in state:
            at_first.add(name)
        state[name] = True
    return at_first


def _add_other_waits(jobs: Iterable[SeenJob], moves: Iterable[SeenMove]) -> None:
    """What a job waited for once it had the GPU, where nothing was unloaded or loaded for it (the
    first probes after the broker's start, or somebody else's work), is part of its run."""
    moved = {id(move.job) for move in moves}
    for job in jobs:
        if job.granted is not None and job.began is not None and id(job) not in moved:
            job.run_s += max(0.0, job.began - job.granted)


def _done(move: SeenMove) -> float:
    """When a move was over: before the jobs began that waited for it, whatever was rounded."""
    end, job = move.at + move.seconds, move.job
    return (end if job is None or job.began is None else min(end, job.began)) - ROUNDED_S


def _usual_runs(jobs: Iterable[SeenJob]) -> dict[str, float]:
    runs: dict[str, list[float]] = {}
    for job in jobs:
        if job.began is not None and job.operation is None:
            runs.setdefault(job.needs, []).append(job.run_s)
    return {name: median(each) for name, each in runs.items() if len(each) > 2}


def _footprint(
    name: str, known: SeenSize, config: Config | None, usual_s: float, guesses: list[str]
) -> Footprint:
    consumer, model = parts_of(name)
    settings = None if config is None else config.consumers.get(consumer)
    mib = known.needed_mib
    declared = None if settings is None else settings.declared_for(model)
    if declared is not None and declared.mib:
        mib = declared.mib
    if not mib:
        guesses.append(f"what {name} needs is told nowhere: it is taken to need no memory")
    if not known.loads:
        guesses.append(f"{name} was never seen to load: it is taken to take {usual_s:.3g} s")
    load_s = median(known.loads) if known.loads else usual_s
    unload_s = median(known.unloads) if known.unloads else GUESSED_UNLOAD_S
    if settings is None:
        return Footprint(round(mib), load_s, unload_s)
    return Footprint(
        round(mib),
        load_s,
        unload_s,
        movable=bool(settings.eviction_methods)
        and not settings.pinned
        and not (model is not None and settings.pins(model, None))
        and not settings.vram_managed,
        priority=settings.priority,
        coexists_with=frozenset(settings.can_coexist_with),
        parallel=settings.parallel(None),
        beside=frozenset(settings.can_run_with),
    )


def _total_mib(
    events: Iterable[Line], config: Config | None, card_mib: int | None, name: str
) -> int:
    if card_mib is not None:
        return card_mib
    if config is not None and config.gpu.total_mib:
        return config.gpu.total_mib
    told = [line.maybe_number("total_mib") for line in events if line.event == "job"]
    for mib in reversed(told):
        if mib:
            return int(mib)
    raise BadEvents(
        f"neither {name} nor a config (--config) says how much memory the card has: "
        "give it with --card-mib"
    )


def _that_fit(
    loaded: Iterable[str], footprints: Mapping[str, Footprint], room: int, jobs: Sequence[SeenJob]
) -> frozenset[str]:
    """Of those that seem to have been loaded, the ones that were used first, as far as they fit."""
    first: dict[str, float] = {}
    for job in jobs:
        first.setdefault(job.needs, job.came)
    found: set[str] = set()
    for name in sorted(loaded, key=lambda each: (first.get(each, 0.0), each)):
        if sum(footprints[each].mib for each in (*found, name)) <= room:
            found.add(name)
    return frozenset(found)


def _tasks(jobs: Sequence[SeenJob], began: float, *, clients_wait: bool) -> tuple[Task, ...]:
    tasks: list[Task] = []
    last: dict[str, SeenJob] = {}
    for job in jobs:
        task = Task(
            job.number,
            round(job.came - began, 3),
            job.needs,
            round(job.run_s, 4),
            job.kind,
            job.requester,
            job.urgency,
            job.session,
            leaves_s=round(job.ended - job.came, 3) if job.granted is None else None,
            operation=job.operation,
        )
        before = last.get(job.requester)
        if clients_wait and before is not None and job.operation is None:
            think_s = job.came - before.ended
            if 0 <= think_s <= THINK_S and before.operation is None:
                task = replace(task, at=0.0, after=before.number, think_s=round(think_s, 3))
        if before is None or job.ended > before.ended:
            last[job.requester] = job
        tasks.append(task)
    return tuple(tasks)


def _course(
    jobs: Sequence[SeenJob], moves: Sequence[SeenMove], tasks: Sequence[Task], began: float
) -> Course:
    granted = {job.number: job.granted - began for job in jobs if job.granted is not None}
    past = overtakes(
        granted, {job.number: job.ended - began for job in jobs if job.granted is None}
    )
    played = tuple(
        Played(
            task,
            job.came - began,
            granted.get(job.number),
            None if job.began is None else job.began - began,
            job.ended - began,
            *past[job.number],
        )
        for job, task in zip(jobs, tasks, strict=True)
    )
    steps: list[tuple[float, int, tuple[str, ...]]] = [
        (at, 0, ("grant", str(number))) for number, at in granted.items()
    ]
    made: list[Move] = []
    for move in moves:
        assert move.job is not None  # noqa: S101  # `operations` has seen to it
        number = move.job.number
        made.append(Move(move.what, move.name, number, move.at - began, move.seconds))
        if move.job.operation != "unload":
            what = "evict" if move.what == "unload" else "load"
            at = max(move.at - began, granted.get(number, 0.0))  # whatever was rounded
            steps.append((at, 1, (what, move.name, str(number))))
    steps.sort(key=lambda step: step[:2])
    decisions = tuple(what for *_, what in steps)
    return Course("really", played, tuple(made), decisions=decisions)
