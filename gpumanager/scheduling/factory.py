"""The schedulers by the names they have in the config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gpumanager.clock import Clock
from gpumanager.config import SchedulerConfig
from gpumanager.scheduling.estimate import Outlook
from gpumanager.scheduling.interface import Scheduler
from gpumanager.scheduling.policy import Affinity, FirstComeFirstServed, Policy
from gpumanager.scheduling.queue import Queue, Room


def locked(
    *,
    max_queue: int,
    max_wait: float,
    clock: Clock,
    outlook: Callable[[], Outlook] = Outlook,
    room: Room | None = None,
    policy: Policy | None = None,
) -> Queue:
    """One job at a time, by the policy; without one, in strict order of arrival. With a `room`,
    each job starts as soon as there is memory for it."""
    return Queue(
        FirstComeFirstServed() if policy is None else policy,
        max_queue=max_queue,
        max_wait=max_wait,
        clock=clock,
        outlook=outlook,
        room=room,
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


def build_scheduler(
    settings: SchedulerConfig, room: Room, outlook: Callable[[], Outlook], clock: Clock
) -> Scheduler:
    """The scheduler that `settings.kind` names, with eviction where it is a lock."""
    max_queue, max_wait = settings.max_queue, settings.max_wait
    if settings.kind == "passthrough":
        # Without a room also for `max_queue: 1`, where it runs one job at a time by accident.
        return passthrough(max_queue=max_queue, max_wait=max_wait, clock=clock, outlook=outlook)
    return locked(
        max_queue=max_queue,
        max_wait=max_wait,
        clock=clock,
        outlook=outlook,
        room=room,
        policy=build_policy(settings),
    )


def build_policy(settings: SchedulerConfig) -> Policy:
    """The policy that `settings.policy` names."""
    if settings.policy == "fifo":
        return FirstComeFirstServed()
    return Affinity(
        max_overtake=settings.max_overtake,
        max_overtaken_by=settings.max_overtaken_by,
        hold=settings.hold,
    )
