"""The schedulers by the names they have in the config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gpumanager.clock import Clock
from gpumanager.config import SchedulerConfig
from gpumanager.scheduling.estimate import Outlook
from gpumanager.scheduling.eviction import Evicting, MakesRoom
from gpumanager.scheduling.interface import Scheduler
from gpumanager.scheduling.policy import FirstComeFirstServed
from gpumanager.scheduling.queue import Queue


def locked(
    *,
    max_queue: int,
    max_wait: float,
    clock: Clock,
    outlook: Callable[[], Outlook] = Outlook,
) -> Queue:
    """A FIFO ticket lock: one job at a time, in strict order of arrival."""
    return Queue(
        FirstComeFirstServed(1),
        max_queue=max_queue,
        max_wait=max_wait,
        clock=clock,
        outlook=outlook,
    )


def passthrough(
    *,
    max_queue: int,
    max_wait: float,
    clock: Clock,
    outlook: Callable[[], Outlook] = Outlook,
) -> Queue:
    """No lock: every job runs at once. With `max_queue` of them running the next is refused,
    since each of them holds a thread. Nothing is decided by memory."""
    return Queue(
        FirstComeFirstServed(max_queue),
        max_queue=0,
        max_wait=max_wait,
        clock=clock,
        outlook=lambda: replace(outlook(), available_mib=None),
    )


def build_scheduler(settings: SchedulerConfig, room: MakesRoom, clock: Clock) -> Scheduler:
    """The scheduler `settings.kind` names, with eviction where it is a lock."""
    make = {"locked": locked, "passthrough": passthrough}[settings.kind]
    line = make(
        max_queue=settings.max_queue,
        max_wait=settings.max_wait,
        clock=clock,
        outlook=room.outlook,
    )
    # By its kind, not by `exclusive`: a passthrough with `max_queue: 1` is that by accident.
    return line if settings.kind == "passthrough" else Evicting(line, room, clock)
