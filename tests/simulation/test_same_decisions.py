"""The broker and the simulator decide the same on a recorded trace, event for event."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gpumanager.config import EventsConfig
from gpumanager.scheduling.policy import Affinity, FirstComeFirstServed, Policy
from gpumanager.simulation.eventlines import read
from gpumanager.simulation.policies import Promise, played
from gpumanager.simulation.recorded import Recorded, reconstruct
from gpumanager.simulation.trace import Course, Trace
from gpumanager.simulation.workloads import WORKLOADS, workload
from gpumanager.telemetry.eventfile import EventFile
from tests.support.virtual import VirtualBroker

pytestmark = pytest.mark.untraced

JOBS = 60

SHARED = "busy-office"
"""Several jobs may be granted at once: then the event file does not tell in which order."""

POLICIES: dict[str, Policy] = {"fifo": FirstComeFirstServed(), "affinity": Affinity()}


def unhurried(trace: Trace) -> Trace:
    """The same trace, where a client needs some ms to send its next request: the event file tells
    times to the ms."""
    tasks = tuple(replace(task, think_s=max(0.005, task.think_s)) for task in trace.tasks)
    return replace(trace, tasks=tasks)


def recorded(trace: Trace, policy: Policy, tmp_path: Path) -> Recorded:
    """What a broker's event file says of how it served the trace."""
    broker = VirtualBroker(trace, policy)
    broker.run()
    path = tmp_path / f"{trace.name}.jsonl"
    path.unlink(missing_ok=True)
    EventFile(broker.events, EventsConfig(file=str(path))).close()
    return reconstruct(read([str(path)]), "events.jsonl", broker.config)


def moves(course: Course) -> list[tuple[str, str, int]]:
    return [(move.what, move.name, move.task) for move in course.moves]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", WORKLOADS)
def test_the_broker_and_the_simulator_decide_the_same(
    name: str, policy: str, tmp_path: Path
) -> None:
    for seed in (1, 2):
        trace = unhurried(workload(name, seed, JOBS))
        found = recorded(trace, POLICIES[policy], tmp_path)
        assert len(found.trace.tasks) == JOBS
        known = replace(found.trace, footprints=trace.footprints)  # as the broker did from before
        course = played(known, policy, Promise())
        if name != SHARED:
            assert course.decisions == found.real.decisions
        assert moves(course) == moves(found.real)
        for mine, real in zip(course.jobs, found.real.jobs, strict=True):
            assert mine.came == pytest.approx(real.came, abs=0.002)
            assert mine.granted == pytest.approx(real.granted, abs=0.005)
            assert mine.ended == pytest.approx(real.ended, abs=0.005)
