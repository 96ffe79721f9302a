"""Making room: carries out what `victims` decides, one victim at a time, and checks the result.

Runs on the thread of the job that has just been granted. All calls to consumers and all waits
happen here, outside any lock, each with a bound.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from functools import partial
from typing import Literal

from gpumanager.clock import Clock
from gpumanager.config import Config, ConsumerConfig
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.registry import Registry
from gpumanager.errors import (
    BrokerError,
    ConsumerTimeout,
    ConsumerUnhealthy,
    ConsumerUnreachable,
    NoConsumer,
)
from gpumanager.gpu.inventory import holder
from gpumanager.model import MemoryReading
from gpumanager.residency.evictor import Controls, Evictor, Stops
from gpumanager.residency.rest import BUSY_LIMIT_S
from gpumanager.residency.settling import FIRST_POLL_S, LONGEST_POLL_S
from gpumanager.scheduling.estimate import Doing
from gpumanager.scheduling.interface import Release, Ticket
from gpumanager.scheduling.victims import Resident
from gpumanager.telemetry.events import Emit, Loaded, Resumed, TriedAnyway
from tests.support.reference.census import Census, Look
from tests.support.reference.refusal import refusal, short_mib
from tests.support.reference.victims import candidates

FIRST_PROBES_S = 4.0
"""After the start, the longest wait for the first probes: a little more than one may take."""

FRESH_S = 2.0
"""For so long a sample of the card is good enough to see that a consumer holds what it needs."""

READY_POLL_S = 0.25

MOST_RETURNS = 3
"""How often one is unloaded again for the same job, since somebody else had it load meanwhile."""


class RoomMaker:
    """Evicts until the next job's consumer fits, then has it loaded.

    `measure` returns a fresh reading of the card, or None where it cannot be measured; `admit`
    raises if the consumer is known to be broken; `upcoming` tells whose jobs wait, in their order.
    """

    def __init__(
        self,
        config: Config,
        registry: Registry,
        learned: Learned,
        controls: Controls,
        stops: Stops,
        measure: Callable[[], MemoryReading | None],
        admit: Callable[[str], None],
        clock: Clock,
        emit: Emit,
        upcoming: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._config = config
        self._registry = registry
        self._learned = learned
        self._controls = controls
        self._stops = stops
        self._measure = measure
        self._admit = admit
        self._clock = clock
        self._emit = emit
        self._upcoming = upcoming
        self._evictor = Evictor(registry, learned, controls, stops, measure, clock, emit)
        self._probes_due = clock.monotonic() + FIRST_PROBES_S
        self._lock = threading.Lock()
        self._evictions = 0
        self._changed_at = -math.inf
        self._doing: Doing | None = None

    @property
    def evictions(self) -> int:
        return self._evictions

    def _census(self) -> Census:
        """Of this moment, with the card as it was sampled last."""
        return Census(self._registry.now, self._clock.monotonic())

    def _measured_census(self) -> Census:
        """Of this moment, with the card as it is measured now."""
        snapshot = self._registry.now
        return Census(snapshot.seeing(self._measure()), self._clock.monotonic())

    # -- for the holder of the GPU ---------------------------------------------------------

    def make_room(self, ticket: Ticket) -> None:
        """Have the ticket's consumer fit and be loaded.

        Raises InsufficientVram (before anything is unloaded, if unloading all that may go would
        not suffice), ConsumerUnreachable, ConsumerTimeout, what `admit` raises, or the error the
        ticket was cancelled with.
        """
        target = ticket.job.consumer
        if self._clock.monotonic() < self._probes_due:
            self._await_first_probes(ticket)
        # It may have died while the job was in line: unloading somebody for it would be in vain.
        self._admit(target)
        self._drop_the_impossible(target)
        if not self._holds_enough(target):
            self._unload_others(target, ticket)
        self._bring_back(target, ticket)
        self._load(target)
        ticket.pause(0)  # who left meanwhile has nothing sent in his name

    def ready(self, consumer: str) -> bool:
        """Whether `make_room` would find nothing to do, by what is known already."""
        snapshot = self._registry.now
        state = snapshot.states[consumer]
        return (
            self._clock.monotonic() >= self._probes_due
            and state.stopped_by is None
            and (state.loaded or snapshot.consumers[consumer].load is None)
            and state.healthy is not False
            and self._holds_enough(consumer)
        )

    def relieve(self, ticket: Ticket) -> bool:
        """Unload all others that may go, for a job that ran out of memory; True if that gave
        anything back. Raises the error the ticket was cancelled with."""
        target = ticket.job.consumer
        released = 0
        for other in candidates(self._measured_census().residents()):
            if other.name != target:
                release = self._evict(other, ticket)
                if release is not None and release.outcome == "unverified":
                    released += release.expected_mib
                elif release is not None:
                    released += release.mib
        return released > 0

    def unload(self, name: str, ticket: Ticket, *, patient: bool = True) -> Release:
        """Unload one consumer, whoever it is; without patience, only if it does not work on a job
        of somebody else. Raises NoConsumer if there is no way to,
        ConsumerUnhealthy if it works on a job, and ConsumerUnreachable, with the reasons in the
        log, if none of its ways worked."""
        consumer = self._config.consumers[name]
        if not consumer.eviction_methods:
            raise NoConsumer(f"consumer {name} has no way to be unloaded", consumer=name)
        if self._registry.get(name).active:  # only where nobody holds the GPU alone
            raise ConsumerUnhealthy(f"{name} works on a job", consumer=name, retry_after=1)
        self._registry.release(name)
        resident = self._measured_census().resident(name)
        release = self._evict(resident, ticket, elsewhere=None if patient else lambda: True)
        if release is None:
            raise ConsumerUnreachable(f"{name} could not be unloaded", consumer=name)
        return release

    def load(self, name: str, ticket: Ticket) -> None:
        """Have a consumer loaded as its next job would, once `make_room` has been: with its
        `warm` call, where it has no `load`."""
        if self._config.consumers[name].warm is None or self._registry.get(name).loaded:
            return
        self._timed_load(name, self._controls.warm)
        ticket.pause(0)

    # -- inside ----------------------------------------------------------------------------

    def _await_first_probes(self, ticket: Ticket) -> None:
        """Just after the start nothing is known yet of what is loaded, and what is assumed may
        be far from it: give the first probes that matter for this job their time."""
        target = self._config.consumers[ticket.job.consumer]
        probed = {
            name: consumer
            for name, consumer in self._config.consumers.items()
            if consumer.health is not None or consumer.probe is not None
        }
        matter = [
            name
            for name, consumer in probed.items()
            if consumer is target or (target.vram_resident_mib and consumer.vram_resident_mib)
        ]

        def unknown(name: str) -> bool:
            state = self._registry.get(name)
            return state.healthy is None and state.last_probe is None

        while self._clock.monotonic() < self._probes_due and any(map(unknown, matter)):
            ticket.pause(FIRST_POLL_S)
        if not any(map(unknown, probed)):
            self._probes_due = -math.inf

    def _holds_enough(self, target: str) -> bool:
        """Whether the consumer surely has all it needs already, as one that has just run does,
        without a question to the card: by a sample that is fresh, and younger than the last
        eviction; or, where the card cannot be measured, by the ledger."""
        snapshot = self._registry.now
        state, gpu = snapshot.states[target], snapshot.gpu
        if gpu.reading is None:
            known = bool(gpu.err)
        else:
            since = max(self._changed_at, self._clock.monotonic() - FRESH_S)
            known = gpu.sampled_at is not None and gpu.sampled_at > since
        if not known or not state.loaded:
            return False
        return snapshot.needed(target).mib <= holder(snapshot, target).surely_mib

    def _drop_the_impossible(self, target: str) -> None:
        gpu = self._registry.now.gpu
        if gpu.reading is None and gpu.err:  # the accounting decides
            for name in self._census().impossible(target):
                self._registry.drop_assumption(name)

    def _unload_others(self, target: str, ticket: Ticket) -> None:
        tried: set[str] = set()
        leaking: list[str] = []
        left_alone: set[str] = set()  # at work for somebody else, since another one could go
        waited_for: set[str] = set()
        gone: Counter[str] = Counter()
        more_until = 0.0
        patient_until: float | None = None
        while True:
            now = self._look(target, tried)
            if now.plan.fits:
                break
            if now.worth_waiting:
                limit = self._config.gpu.release_timeout
                patient_until = patient_until or self._clock.monotonic() + limit
                if self._clock.monotonic() < patient_until:
                    ticket.pause(LONGEST_POLL_S)
                    continue
            if not now.plan.victims:
                if now.may_come_late or self._clock.monotonic() < more_until:
                    ticket.pause(LONGEST_POLL_S)
                    continue
                if left_alone:  # the others were not enough after all
                    tried -= left_alone
                    waited_for |= left_alone
                    left_alone.clear()
                    continue
                if now.plan.attempt:
                    self._note_attempt(now)
                    break
                raise refusal(now, leaking)
            victim = now.plan.victims[0]
            tried.add(victim.name)
            last = len(now.plan.victims) == 1
            fits = (lambda: self._look(target).plan.fits) if last else None
            others = None
            if victim.name not in waited_for:
                others = partial(self._others_may_go, target, set(tried))
            release = self._evict(victim, ticket, fits, others)
            if others and release and release.outcome == "busy" and release.seconds < BUSY_LIMIT_S:
                left_alone.add(victim.name)
            if release is not None and release.complete and gone[victim.name] < MOST_RETURNS:
                gone[victim.name] += 1  # somebody else may have it load again
                tried.discard(victim.name)
            more_until = max(more_until, 0.0 if release is None else release.more_until)
            if release is not None and release.outcome == "leaked" and release.certain:
                leaking.append(victim.name)
            ticket.pause(0)

    def _look(self, target: str, tried: Set[str] = frozenset()) -> Look:
        self._registry.end_quarantines()
        return self._measured_census().plan(target, tried, self._upcoming())

    def _others_may_go(self, target: str, tried: Set[str]) -> bool:
        """Whether there would surely be room without those that were tried, too."""
        plan = self._look(target, tried).plan
        return plan.fits or (bool(plan.victims) and not plan.attempt)

    def _evict(
        self,
        victim: Resident,
        ticket: Ticket,
        fits: Callable[[], bool] | None = None,
        elsewhere: Callable[[], bool] | None = None,
    ) -> Release | None:
        try:
            with self._does("unload", victim.name), self._registry.using(victim.name):
                release = self._evictor.evict(
                    victim.name,
                    self._config.consumers[victim.name],
                    victim.held_mib,
                    victim.floor_mib,
                    ticket,
                    fits,
                    elsewhere,
                )
        except NoConsumer:  # a reload has just removed it
            return None
        finally:
            self._changed_at = self._clock.monotonic()
        if release is not None and release.outcome not in ("leaked", "gone", "busy"):
            with self._lock:
                self._evictions += 1
        return release

    @contextmanager
    def _does(self, what: Literal["unload", "load"], name: str) -> Iterator[None]:
        """Have the estimates know what goes on."""
        self._doing = Doing(what, name, self._clock.monotonic())
        try:
            yield
        finally:
            self._doing = None

    def _bring_back(self, target: str, ticket: Ticket) -> None:
        """Start the target again, if the broker has stopped it, and wait until it is ready."""
        stopped_by = self._registry.get(target).stopped_by
        if stopped_by is None:
            return
        began = self._clock.monotonic()
        with self._does("load", target), self._registry.busy(target):
            resumed = self._stops.bring_back(target, stopped_by)
            if not resumed:
                self._await_ready(target, ticket)
        self._registry.mark_started(target, resumed=resumed)
        self._emit(Resumed(consumer=target, ms=self._note_load(target, began)))

    def _await_ready(self, target: str, ticket: Ticket) -> None:
        limit = self._config.consumers[target].ready_timeout
        deadline = self._clock.monotonic() + limit
        while True:
            try:
                self._controls.probe(target, self._config.consumers[target])
            except BrokerError as error:
                if self._clock.monotonic() >= deadline:
                    raise ConsumerTimeout(
                        f"{target} was started, but not ready within {limit:g} s: {error.message}",
                        consumer=target,
                    ) from error
                ticket.pause(READY_POLL_S)
            else:
                return

    def _load(self, target: str) -> None:
        if self._config.consumers[target].load is None or self._registry.get(target).loaded:
            return
        self._timed_load(target, self._controls.load)

    def _timed_load(self, target: str, call: Callable[[str, ConsumerConfig], None]) -> None:
        began = self._clock.monotonic()
        with self._does("load", target), self._registry.busy(target):
            call(target, self._config.consumers[target])
        self._registry.set_loaded(target, True)
        self._emit(Loaded(consumer=target, ms=self._note_load(target, began)))

    def _note_load(self, target: str, began: float) -> int:
        """Learn from it; returns how long it took, in ms."""
        seconds = self._clock.monotonic() - began
        self._learned.loaded(target, seconds)
        return round(seconds * 1000)

    def _note_attempt(self, now: Look) -> None:
        self._emit(
            TriedAnyway(
                consumer=now.target,
                needed_mib=now.needed_mib,
                short_mib=short_mib(now),
            )
        )
