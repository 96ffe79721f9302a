"""The exact optimum, against every schedule there is."""

from __future__ import annotations

import random
from itertools import combinations, permutations
from math import inf

import pytest

from gpumanager.simulation.optimum import MOST_JOBS, can_solve, solve
from gpumanager.simulation.policies import POLICIES, Promise, played
from gpumanager.simulation.results import figures
from gpumanager.simulation.trace import Footprint, Task, Trace
from gpumanager.simulation.workloads import SMALL_JOBS, WORKLOADS, at_once, workload


def every_schedule(trace: Trace) -> float:
    """The least makespan: all orders, and for each job all sets that could go for it."""
    sizes, room = trace.footprints, trace.total_mib - trace.reserved_mib

    def least(
        order: tuple[Task, ...], loaded: frozenset[str], at: float, ends: dict[int, float]
    ) -> float:
        if not order:
            return at
        task, rest = order[0], order[1:]
        come = task.at
        if task.after is not None:
            if task.after not in ends:
                return inf
            come = max(come, ends[task.after] + task.think_s)
        begin, best = max(at, come), inf
        if task.needs in loaded:
            end = begin + task.run_s
            return least(rest, loaded, end, {**ends, task.number: end})
        for count in range(len(loaded) + 1):
            for gone in combinations(sorted(loaded), count):
                after = loaded.difference(gone) | {task.needs}
                if sum(sizes[name].mib for name in after) > room:
                    continue
                seconds = sizes[task.needs].load_s + sum(sizes[name].unload_s for name in gone)
                end = begin + seconds + task.run_s
                best = min(best, least(rest, after, end, {**ends, task.number: end}))
        return best

    first = min(task.at for task in trace.tasks if task.after is None)
    return min(least(order, frozenset(), 0.0, {}) for order in permutations(trace.tasks)) - first


def random_trace(seed: int) -> Trace:
    chance = random.Random(seed)
    sizes = {
        name: Footprint(chance.choice((3000, 5000, 7000)), chance.uniform(1, 9), chance.random())
        for name in "abc"
    }
    tasks: list[Task] = []
    for number in range(1, 6):
        after = chance.choice([None, None, *range(1, number)])
        at, run_s = chance.choice((0.0, chance.uniform(0, 12))), chance.uniform(0.5, 5)
        think_s = chance.choice((0.0, 1.0, 4.0))
        name = chance.choice("abc")
        tasks.append(Task(number, at, name, run_s, after=after, think_s=think_s))
    return Trace(f"random {seed}", 10_000, sizes, tuple(tasks))


@pytest.mark.parametrize("seed", range(12))
def test_no_schedule_is_shorter(seed: int) -> None:
    trace = random_trace(seed)
    best = solve(trace)
    assert best.makespan_s == pytest.approx(every_schedule(trace))
    assert sorted(best.order) == [1, 2, 3, 4, 5]
    assert solve(trace, best.makespan_s).makespan_s == pytest.approx(best.makespan_s)
    with pytest.raises(ValueError, match="no schedule within"):
        solve(trace, best.makespan_s * 0.99)


@pytest.mark.parametrize("name", [each for each in WORKLOADS if each != "busy-office"])
def test_no_policy_is_shorter(name: str) -> None:
    for trace in (workload(name, 1, SMALL_JOBS), at_once(workload(name, 1, SMALL_JOBS))):
        assert can_solve(trace)
        courses = [figures(played(trace, policy, Promise())).makespan_s for policy in POLICIES]
        assert solve(trace, min(courses)).makespan_s <= min(courses) + 1e-6


def test_what_is_too_large_is_said() -> None:
    large = workload("mixed", 1, MOST_JOBS + 1)
    assert not can_solve(large)
    assert not can_solve(workload("busy-office", 1, SMALL_JOBS))  # whose jobs share the card
    with pytest.raises(ValueError, match="13 jobs are too many"):
        solve(large)
    assert solve(Trace("none", 1000, {}, ())).makespan_s == 0.0
