"""What is played: the jobs, what they need on the card, and what happened to them. Plain data.

Times are seconds from the beginning of the trace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Operation = Literal["load", "unload"]


@dataclass(frozen=True, slots=True)
class Footprint:
    """A consumer, or one model of it: the MiB it needs on the card, and the seconds that loading
    and unloading it take. `parallel` is how many of its consumer's jobs run at once, each in the
    time that it takes alone, and those `beside` are the consumers that run at the same time, if
    they say so, too. `movable` is False where it is never unloaded."""

    mib: int
    load_s: float
    unload_s: float = 0.5
    parallel: int = 1
    movable: bool = True
    priority: int = 0
    coexists_with: frozenset[str] = frozenset()
    beside: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Task:
    """A job to be played. `number` counts from 1, in the order of arrival among those that come at
    the same time.

    It comes `at` a time; one that comes `after` another one (by its number) comes `think_s` after
    that one's end, and not before `at`. `needs` is the name of what it needs on the card.
    `leaves_s`: its client is gone if it has waited for so long. An `operation` is an operator's:
    nothing runs, it loads or unloads what it names.
    """

    number: int
    at: float
    needs: str
    run_s: float
    kind: str = "llm"
    requester: str = "-"
    urgency: int = 3
    session: str | None = None
    after: int | None = None
    think_s: float = 0.0
    leaves_s: float | None = None
    operation: Operation | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """Jobs, and the card they share: `total_mib`, of which `reserved_mib` stay free. `footprints`
    are by the names that the tasks need; `order` is the config's `eviction`. `loaded` are on the
    card at the beginning."""

    name: str
    total_mib: int
    footprints: Mapping[str, Footprint]
    tasks: tuple[Task, ...]
    reserved_mib: int = 0
    order: Literal["lru", "cost"] = "lru"
    loaded: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        room = self.total_mib - self.reserved_mib
        for task in self.tasks:
            known = self.footprints.get(task.needs)
            if known is None:
                raise ValueError(f"job {task.number} needs {task.needs}, whose size is not known")
            if known.mib > room and task.operation != "unload":
                raise ValueError(
                    f"{task.needs} needs {known.mib} MiB, more than the card has to give ({room})"
                )


# -- what came of it -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Played:
    """What happened to one job. `granted` is when it got the GPU, `began` when others had been
    unloaded and its own was loaded; both are None for one that left before. `overtaken_by` counts
    the jobs that were granted past it, `overtaken_s` is how long it waited from the first of them
    on."""

    task: Task
    came: float
    granted: float | None
    began: float | None
    ended: float
    overtaken_by: int = 0
    overtaken_s: float = 0.0

    @property
    def waited_s(self) -> float:
        """In the queue."""
        return (self.ended if self.granted is None else self.granted) - self.came


@dataclass(frozen=True, slots=True)
class Move:
    """A load or an unload: of whom, for the job of which number, when it began, and how long it
    took."""

    what: Operation
    name: str
    task: int
    at: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Course:
    """How a trace went, by one policy, or in reality. `jobs` are in the order of their numbers,
    `moves` in the order of time. `out_of_turn` is by how many jobs one was overtaken at most whose
    turn it was not, and for how many seconds, where the policy has turns: what is promised is
    about these. `decisions` are what was decided, in order: see `engine`."""

    policy: str
    jobs: tuple[Played, ...]
    moves: tuple[Move, ...] = ()
    out_of_turn: tuple[int, float] | None = None
    decisions: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
