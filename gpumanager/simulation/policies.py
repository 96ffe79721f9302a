"""The policies that can be played, by their names, and what they come to beside each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gpumanager.config import SchedulerConfig
from gpumanager.scheduling.policy import Affinity, FirstComeFirstServed
from gpumanager.simulation.baselines import FairShare, UnboundedBatching
from gpumanager.simulation.engine import Player, play
from gpumanager.simulation.optimum import Best, can_solve, solve
from gpumanager.simulation.results import Figures, figures
from gpumanager.simulation.stage import Stage
from gpumanager.simulation.trace import Course, Trace

_USUAL = SchedulerConfig()


@dataclass(frozen=True, slots=True)
class Promise:
    """Bounds of the broker's policies: no job is overtaken for longer than `max_overtake` seconds,
    nor by more than `max_overtaken_by` jobs; and the longest that background work is held back for
    the next step of a conversation (`hold`, in seconds)."""

    max_overtake: float = _USUAL.max_overtake
    max_overtaken_by: int = _USUAL.max_overtaken_by
    hold: float = _USUAL.hold


def _fifo(stage: Stage, promise: Promise) -> Player:  # noqa: ARG001  # the same for all
    return Player(FirstComeFirstServed())


def _affinity(stage: Stage, promise: Promise) -> Player:  # noqa: ARG001  # the same for all
    return Player(
        Affinity(
            max_overtake=promise.max_overtake,
            max_overtaken_by=promise.max_overtaken_by,
            hold=promise.hold,
        )
    )


def _unbounded(stage: Stage, promise: Promise) -> Player:  # noqa: ARG001  # it promises nothing
    return Player(UnboundedBatching(stage))


def _one_model(stage: Stage, promise: Promise) -> Player:  # noqa: ARG001  # it promises nothing
    policy = FairShare()
    return Player(policy, ended=policy.ended, alone=True)


_POLICIES: Mapping[str, Callable[[Stage, Promise], Player]] = {
    "fifo": _fifo,
    "affinity": _affinity,
    "unbounded": _unbounded,
    "one-model": _one_model,
}

POLICIES: Mapping[str, str] = {
    "fifo": "strict order of arrival",
    "affinity": "turns by urgency and fair share; what is loaded goes past, but not for long",
    "unbounded": "a job for what is loaded goes past all others, as in llama-swap",
    "one-model": "one model at a time, and the GPU's time shared fairly, as in gpu-broker",
}
"""What each of them is. The first ones are the broker's own."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One trace by several policies. `real` is what really happened, where that is known; `best`
    the optimum, where the trace is small enough."""

    trace: Trace
    courses: tuple[Course, ...]
    real: Course | None = None
    best: Best | None = None

    @property
    def all_courses(self) -> tuple[Course, ...]:
        """What really happened first."""
        return self.courses if self.real is None else (self.real, *self.courses)

    @property
    def figures(self) -> tuple[Figures, ...]:
        """Of all courses, in their order."""
        return tuple(figures(course) for course in self.all_courses)

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        answer: dict[str, Any] = {
            "trace": self.trace.name,
            "jobs": len(self.trace.tasks),
            "policies": [each.as_json() for each in self.figures],
        }
        if self.best is not None:
            order = list(self.best.order)
            answer["optimum"] = {"makespan_s": round(self.best.makespan_s, 3), "order": order}
        return answer


def played(trace: Trace, name: str, promise: Promise) -> Course:
    """How a trace goes by the policy of that name. Raises engine.Impossible."""
    make = _POLICIES[name]
    return play(trace, name, lambda stage: make(stage, promise))


def compared(
    trace: Trace, names: Iterable[str], promise: Promise, real: Course | None = None
) -> Comparison:
    """How it goes by each of these policies, and at best. Raises engine.Impossible."""
    courses = tuple(played(trace, name, promise) for name in names)
    best = None
    if courses and can_solve(trace):
        best = solve(trace, min(figures(course).makespan_s for course in courses))
    return Comparison(trace, courses, real, best)
