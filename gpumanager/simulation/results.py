"""What a course amounts to, in figures."""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from gpumanager.simulation.trace import Course, Played


@dataclass(frozen=True, slots=True)
class Waits:
    """How long jobs waited in the queue, in seconds: so many, the median, the 95th and the 99th
    percentile, the mean and the longest."""

    jobs: int
    p50: float
    p95: float
    p99: float
    mean: float
    longest: float


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one course. `makespan_s` is from the first arrival to the last end; `utilisation` the
    share of it during which a job ran; `swaps` counts unloads, `swapping_s` is what unloading and
    loading took together. `overtaken_by` is the most jobs that came after one and were granted
    before it, `overtaken_s` the longest that one waited after the first of them; `out_of_turn_by`
    and `out_of_turn_s` are the same of jobs whose turn it was not, where the policy has turns.
    `left` counts those that got no turn, because their clients left."""

    policy: str
    jobs: int
    left: int
    makespan_s: float
    utilisation: float
    swaps: int
    loads: int
    swapping_s: float
    longest_queue: int
    overtaken_by: int
    overtaken_s: float
    out_of_turn_by: int | None
    out_of_turn_s: float | None
    waits: Waits
    by_kind: Mapping[str, Waits] = field(default_factory=dict)
    by_requester: Mapping[str, Waits] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The same, as plain data, to the millisecond."""
        rounded: dict[str, Any] = _rounded(asdict(self))
        return rounded


def figures(course: Course) -> Figures:
    """What a course amounts to."""
    jobs = course.jobs
    granted = [job for job in jobs if job.granted is not None]
    began = min((job.came for job in jobs), default=0.0)
    makespan_s = max((job.ended for job in granted), default=began) - began
    busy = [(job.began, job.ended) for job in granted if job.began is not None]
    return Figures(
        policy=course.policy,
        jobs=len(granted),
        left=len(jobs) - len(granted),
        makespan_s=makespan_s,
        utilisation=_covered_s(busy) / makespan_s if makespan_s else 0.0,
        swaps=sum(move.what == "unload" for move in course.moves),
        loads=sum(move.what == "load" for move in course.moves),
        swapping_s=sum(move.seconds for move in course.moves),
        longest_queue=_longest_queue(jobs),
        overtaken_by=max((job.overtaken_by for job in jobs), default=0),
        overtaken_s=max((job.overtaken_s for job in jobs), default=0.0),
        out_of_turn_by=None if course.out_of_turn is None else course.out_of_turn[0],
        out_of_turn_s=None if course.out_of_turn is None else course.out_of_turn[1],
        waits=waits(jobs),
        by_kind=_by(jobs, lambda job: job.task.kind),
        by_requester=_by(jobs, lambda job: job.task.requester),
    )


def waits(jobs: Iterable[Played]) -> Waits:
    """Percentiles by the nearest rank; all 0 without jobs."""
    ordered = sorted(job.waited_s for job in jobs)
    if not ordered:
        return Waits(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    p50, p95, p99 = (percentile(ordered, share) for share in (0.5, 0.95, 0.99))
    return Waits(len(ordered), p50, p95, p99, sum(ordered) / len(ordered), ordered[-1])


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of values in their order, the one that this share of them does not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def overtakes(
    granted: Mapping[int, float], left: Mapping[int, float] = MappingProxyType({})
) -> dict[int, tuple[int, float]]:
    """For each job, by its number (those that came later have higher ones): how many that came
    later got the GPU before it got it, or `left`, and how long it waited from the first of them
    on."""
    found: dict[int, tuple[int, float]] = {}
    numbers: list[int] = []  # of those that got the GPU already, in their order
    highest: list[int] = []  # after each of those grants
    times: list[float] = []
    ends = [(at, number, True) for number, at in granted.items()]
    ends += [(at, number, False) for number, at in left.items()]
    for at, number, gets_it in sorted(ends):
        past = len(numbers) - bisect_right(numbers, number)
        first = times[bisect_right(highest, number)] if past else at
        found[number] = (past, at - first)
        if gets_it:
            insort(numbers, number)
            highest.append(max(number, highest[-1] if highest else number))
            times.append(at)
    return found


def _by(jobs: Iterable[Played], name: Callable[[Played], str]) -> dict[str, Waits]:
    groups: dict[str, list[Played]] = {}
    for job in jobs:
        groups.setdefault(name(job), []).append(job)
    return {each: waits(groups[each]) for each in sorted(groups)}


def _covered_s(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds during which at least one of them goes on."""
    covered, until = 0.0, -math.inf
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    return covered


def _longest_queue(jobs: Iterable[Played]) -> int:
    steps: list[tuple[float, int]] = []
    for job in jobs:
        leaves = job.ended if job.granted is None else job.granted
        if leaves > job.came:
            steps += [(job.came, 1), (leaves, -1)]
    longest = waiting = 0
    for _, step in sorted(steps):
        waiting += step
        longest = max(longest, waiting)
    return longest


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return value
