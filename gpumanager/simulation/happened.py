"""What a broker's events say of its jobs, loads and unloads, one by one."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from gpumanager.model import parts_of, resident_name
from gpumanager.simulation.eventlines import Line
from gpumanager.simulation.trace import Operation

_MOVES: Mapping[str, Operation] = {"evicted": "unload", "loaded": "load", "resumed": "load"}
_GAVE_UP = ("queue_timeout", "client_gone")

_SLACK_S = 0.05
"""Between what an event says of its time, and when it really was."""

ROUNDED_S = 0.002
"""By how much two times of the same moment may differ."""

_AT_ONCE = 64
"""So many jobs have the GPU at once, at most."""


@dataclass(slots=True)
class SeenJob:
    """A job as its events tell of it; times are seconds since the epoch."""

    needs: str
    kind: str
    requester: str
    urgency: int
    session: str | None
    came: float
    granted: float | None
    began: float | None
    ended: float
    ticket: float
    operation: Operation | None = None
    run_s: float = 0.0
    number: int = 0


@dataclass(slots=True)
class SeenSize:
    """What the events say of one resident."""

    needed_mib: float = 0.0
    loads: list[float] = field(default_factory=list)
    unloads: list[float] = field(default_factory=list)


def job_of(line: Line) -> SeenJob:
    """The job that an event tells the end of. Raises BadEvents."""
    wait_s, prepare_s, run_s = (
        line.number(each) / 1000 for each in ("wait_ms", "prepare_ms", "run_ms")
    )
    came = line.moment("arrived")
    if came is None:  # of a broker that did not tell yet
        came = line.at - wait_s - prepare_s - run_s
    client = line.text("client", "-")
    return SeenJob(
        resident_name(line.text("consumer"), line.maybe_text("model")),
        line.text("kind"),
        line.text("requester", client),
        int(line.number("urgency", 3)),
        line.maybe_text("session"),
        came,
        came + wait_s,
        came + wait_s + prepare_s,
        came + wait_s + prepare_s + run_s,
        line.number("ticket"),
        run_s=run_s,
    )


def gave_up(events: Iterable[Line], jobs: Sequence[SeenJob]) -> Iterable[SeenJob]:
    """Those that waited, and left before their turn. What they would have been is taken to be what
    is usual of their consumer."""
    usual: dict[str, Counter[str]] = {}
    like: dict[str, list[SeenJob]] = {}
    for job in jobs:
        usual.setdefault(parts_of(job.needs)[0], Counter())[job.needs] += 1
        like.setdefault(job.needs, []).append(job)
    for line in events:
        if line.event != "refused" or line.fields.get("code") not in _GAVE_UP:
            continue
        wait_s, consumer = (line.maybe_number("wait_ms") or 0.0) / 1000, line.maybe_text("consumer")
        if not wait_s or consumer not in usual:
            continue
        ((needs, _),) = usual[consumer].most_common(1)
        yield SeenJob(
            needs,
            like[needs][0].kind,
            line.text("client", "-"),
            like[needs][0].urgency,
            None,
            line.at - wait_s,
            None,
            None,
            line.at,
            0,
            run_s=median(job.run_s for job in like[needs]),
        )


def _name(line: Line) -> str:
    return resident_name(line.text("consumer"), line.maybe_text("model"))


def sizes(events: Iterable[Line]) -> dict[str, SeenSize]:
    """What the events say of each resident, by its name. Raises BadEvents."""
    known: dict[str, SeenSize] = {}
    for line in events:
        if line.event == "job":
            needed = line.maybe_number("needed_mib")
            if needed is not None:
                known.setdefault(_name(line), SeenSize()).needed_mib = needed
        elif line.event in _MOVES:
            each, seconds = known.setdefault(_name(line), SeenSize()), line.number("ms") / 1000
            if line.event == "evicted":
                each.unloads.append(seconds)
                each.needed_mib = each.needed_mib or line.number("expected_mib", 0)
            else:
                each.loads.append(seconds)
    return known


@dataclass(slots=True)
class SeenMove:
    """A load or an unload as an event tells of it; `target` is whom it was for."""

    what: Operation
    name: str
    target: str
    at: float
    seconds: float
    job: SeenJob | None = None


def moves_of(events: Iterable[Line]) -> list[SeenMove]:
    """The loads and unloads, in the order of time. Raises BadEvents."""
    found = []
    for line in events:
        what = _MOVES.get(line.event)
        if what is None or line.fields.get("outcome") in ("gone", "busy"):
            continue
        name, seconds = _name(line), line.number("ms") / 1000
        found.append(
            SeenMove(what, name, _target(line, name), line.at - seconds, seconds),
        )
    return found


def _target(line: Line, name: str) -> str:
    target = line.maybe_text("target")
    return name if target is None else resident_name(target, line.maybe_text("target_model"))


def operations(moves: Sequence[SeenMove], jobs: Sequence[SeenJob]) -> list[SeenJob]:
    """Give each move the job that it was made for. Returns those that no event tells of: what an
    operator, or the broker itself, had loaded or unloaded."""
    preparing = sorted((job for job in jobs if job.granted is not None), key=_granted)
    begins = [_granted(job) for job in preparing]
    own: list[SeenJob] = []
    before: dict[str, list[SeenMove]] = {}  # unloads that made room for the next load, by its name
    for move in moves:
        latest = bisect_right(begins, move.at + _SLACK_S)
        near = preparing[max(0, latest - _AT_ONCE) : latest]
        late_s, _, job = min(
            ((_late_s(move, each), -place, each) for place, each in enumerate(near)),
            default=(math.inf, 0, None),
            key=lambda found: found[:2],
        )
        if job is not None and late_s <= _SLACK_S:
            move.job = job
        else:
            if move.what == "unload" and move.target != move.name:
                before.setdefault(move.target, []).append(move)
                continue
            parts = [*before.pop(move.name, ()), move] if move.what == "load" else [move]
            own.append(_operation(move, parts[0].at))
            for each in parts:
                each.job = own[-1]
    for move in (each for rest in before.values() for each in rest):
        own.append(_operation(move, move.at))  # whoever it was for did not come to it
        move.job = own[-1]
    return own


def _late_s(move: SeenMove, job: SeenJob) -> float:
    """By how many seconds a move began before or after the job's turn to be prepared; infinite, if
    it was not for that job."""
    target = move.name if move.what == "load" else move.target
    if job.granted is None or job.began is None or job.needs not in (target, _within(target, job)):
        return math.inf
    return max(0.0, job.granted - move.at, move.at - job.began)


def _within(name: str, job: SeenJob) -> str | None:
    """What the job needs, if that is part of the consumer of that name."""
    return job.needs if parts_of(job.needs)[0] == name else None


def _granted(job: SeenJob) -> float:
    return job.ended if job.granted is None else job.granted


def _operation(move: SeenMove, since: float) -> SeenJob:
    end = move.at + move.seconds
    began = end if move.what == "load" else move.at
    return SeenJob(
        move.name, move.what, "-", 7, None, since, since, began, end, 0, operation=move.what
    )
