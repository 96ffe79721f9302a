"""Making room: carries out what is decided, one victim at a time, and asks again.

Runs on the thread of the job that has just been granted. All calls to consumers and all waits
happen here, outside any lock, each with a bound.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from functools import partial
from typing import Literal

from gpumanager.clock import Clock
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.registry import Registry
from gpumanager.consumers.snapshot import Snapshot
from gpumanager.errors import (
    ConsumerUnhealthy,
    ConsumerUnreachable,
    NoConsumer,
)
from gpumanager.gpu.inventory import holder, model_shares
from gpumanager.model import Job, MemoryReading, model_key, parts_of
from gpumanager.residency.census import Census
from gpumanager.residency.evictor import Controls, Evictor, Stops
from gpumanager.residency.loading import Loader
from gpumanager.residency.progress import Progress
from gpumanager.residency.prospects import prospect
from gpumanager.residency.refusal import refusal, short_mib
from gpumanager.residency.rest import Rest
from gpumanager.residency.settling import FIRST_POLL_S, LONGEST_POLL_S
from gpumanager.residency.trimming import Trimmer
from gpumanager.scheduling.decision import MakeRoom, Refuse, Start, Wait
from gpumanager.scheduling.estimate import Doing, Outlook
from gpumanager.scheduling.interface import PlannedVictim, Preview, Release, Ticket
from gpumanager.scheduling.memory import Card, Look, can_be_made, is_room, look
from gpumanager.scheduling.policy import Prospect
from gpumanager.scheduling.queue import Granted
from gpumanager.scheduling.sharing import ALONE, Sharing
from gpumanager.scheduling.victims import Resident
from gpumanager.telemetry.events import Emit, TriedAnyway

FIRST_PROBES_S = 4.0
"""After the start, the longest wait for the first probes: a little more than one may take."""

FRESH_S = 2.0
"""For so long a sample of the card is good enough to see that a consumer holds what it needs."""


class RoomMaker:
    """Evicts until the next job's consumer fits, then has it loaded.

    `measure` returns a fresh reading of the card, or None where it cannot be measured; `admit`
    raises if the consumer is known to be broken; `upcoming` tells whose jobs wait, in their order.
    """

    def __init__(
        self,
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
        self._registry = registry
        self._learned = learned
        self._measure = measure
        self._admit = admit
        self._clock = clock
        self._emit = emit
        self._upcoming = upcoming
        self._evictor = Evictor(registry, learned, controls, stops, measure, clock, emit)
        rest = Rest(controls, measure, clock)
        self._trimmer = Trimmer(registry, learned, controls, rest, measure, clock, emit)
        self._loader = Loader(
            registry, learned, controls, stops, clock, emit, partial(self._does, "load"), upcoming
        )
        self._probes_due = clock.monotonic() + FIRST_PROBES_S
        self._lock = threading.Lock()
        self.evictions = 0
        self._changed_at = -math.inf
        self._doing: Doing | None = None

    def _measured_census(self, job: Job | None = None) -> Census:
        """Of this moment, as it is for the job, with the card as it is measured now."""
        reading = self._measure()  # which also tells what each model holds
        snapshot = self._registry.now.of(job).seeing(reading)
        return Census(snapshot, self._clock.monotonic(), job)

    # -- for the holder of the GPU ---------------------------------------------------------

    def make_room(self, ticket: Granted) -> None:
        """Have the ticket's consumer fit and be loaded.

        Raises InsufficientVram (before anything is unloaded, if unloading all that may go would
        not suffice), ConsumerUnreachable, ConsumerTimeout, what `admit` raises, or the error the
        ticket was cancelled with.
        """
        job, target = ticket.job, ticket.job.consumer
        if self._clock.monotonic() < self._probes_due:
            self._await_first_probes(ticket)
        # It may have died while the job waited: unloading somebody for it would be in vain.
        self._admit(target)
        now = self._registry.now.of(job)
        for name in self._impossible(now, target):
            self._registry.drop_assumption(name)
        if not self._holds_enough(now, job):
            self._unload_others(ticket)
            self._take_off_the_cpu(ticket)
        started, loaded = self._loader.bring_back(ticket), self._loader.load(ticket)
        if started or loaded:
            self._measure()  # who may join, or overtake, is decided by what is so now
        ticket.pause(0)  # who left meanwhile has nothing sent in his name

    def ready(self, job: Job) -> bool:
        """Whether `make_room` would find nothing to do for a job, by what is known already."""
        snapshot, consumer = self._registry.now.of(job), job.consumer
        state = snapshot.states[consumer]
        return (
            self._clock.monotonic() >= self._probes_due
            and state.stopped_by is None
            and (state.loaded or snapshot.consumers[consumer].load is None)
            and state.healthy is not False
            and self._holds_enough(snapshot, job)
            and (snapshot.gpu.reading is not None or not self._impossible(snapshot, consumer))
        )

    def sharing(self, job: Job) -> Sharing:
        """With whom a job shares the GPU, as its consumer's settings say, or its server."""
        now = self._registry.now
        settings = now.settings(job)
        most = settings.parallel(now.slots.get(job.consumer))
        if most == 1 and not settings.can_run_with:
            return ALONE
        return Sharing(most, frozenset(settings.can_run_with))

    def prospect(self, job: Job) -> Prospect:
        """What a job would find, by what is known already."""
        now = self._clock.monotonic()
        return prospect(self._registry.now.of(job), job, now)

    def relieve(self, ticket: Granted) -> bool:
        """Unload all others that may go, for a job that ran out of memory, and have those that stay
        give back what they can; True if that gave anything back. Raises the error the ticket was
        cancelled with."""
        released = 0
        for other in ticket.idle_others(self._measured_census(ticket.job).card()):
            release = self._evict(other, ticket)
            if release is not None and release.outcome == "unverified":
                released += release.expected_mib
            elif release is not None:
                released += release.mib
        for other in ticket.idle_trims(self._measured_census(ticket.job).card()):
            release = self._trim(other, ticket)
            released += 0 if release is None else release.mib
        return released > 0

    def unload(self, name: str, ticket: Ticket, *, patient: bool = True) -> Release:
        """Unload one consumer, or one model of it, by the name that residents have, whoever it is;
        without patience, only if it does not work on a job of somebody else. Raises NoConsumer if
        there is no way to, ConsumerUnhealthy if it works on a job, and ConsumerUnreachable, with
        the reasons in the log, if none of its ways worked."""
        owner, model = parts_of(name)
        consumer = self._registry.now.consumers[owner]
        if not consumer.eviction_methods:
            raise NoConsumer(f"consumer {owner} has no way to be unloaded", consumer=owner)
        if model is not None and not consumer.tells_models_apart:
            message = f"consumer {owner} has no way to unload one model alone"
            raise NoConsumer(message, consumer=owner)
        if self._registry.get(owner).active:  # only where nobody holds the GPU alone
            raise ConsumerUnhealthy(f"{owner} works on a job", consumer=owner, retry_after=1)
        self._registry.release(owner)
        census = self._measured_census()
        resident = census.resident(name) if model is not None else census.whole(name)
        release = self._evict(resident, ticket, elsewhere=None if patient else lambda: True)
        if release is None:
            raise ConsumerUnreachable(f"{name} could not be unloaded", consumer=name)
        return release

    def load(self, name: str, ticket: Ticket) -> None:  # noqa: ARG002  # it is the ticket's
        """Have a consumer loaded as its next job would, once `make_room` has been: with its
        `warm` call, where it has no `load`."""
        self._loader.warm(ticket)
        ticket.pause(0)

    # -- for anybody -----------------------------------------------------------------------

    def preview(self, job: Job) -> Preview:
        """What making room for a job would do now. Acts on nothing."""
        census, queue = self._seen(job), self._upcoming()
        snapshot, outlook = census.snapshot, census.outlook(self._doing)
        now = look(census.card(), job.resident, queue)
        state, consumer = snapshot.states[job.consumer], snapshot.consumers[job.consumer]
        loaded = state.has_loaded(consumer.apart(job.model))
        trims = tuple(
            PlannedVictim(each.name, each.trim_mib, each.last_used, 0.0, method="trim")
            for each in now.trims
        )
        victims = tuple(
            PlannedVictim(
                each.name,
                each.yield_mib,
                each.last_used,
                each.reload_s,
                _place_in(queue, each.name),
                outlook.profile(each.name).unload.mean,
            )
            for each in now.plan.victims
        )
        return Preview(
            consumer=job.consumer,
            model=job.model,
            fits=now.plan.fits or (now.plan.attempt and not now.plan.victims),
            victims=trims + (victims if not trims or now.plan.attempt else ()),
            short_mib=now.plan.short_mib if not trims or now.plan.attempt else 0,
            needed_mib=now.needed_mib,
            held_mib=now.held_mib,
            balance=now.balance,
            must_load=state.stopped_by is not None or not (consumer.load is None or loaded),
        )

    def outlook(self) -> Outlook:
        """What estimates are made of, by what is known already: makes no call."""
        now = self._clock.monotonic()
        return Census(self._registry.now, now).outlook(self._doing)

    # -- inside ----------------------------------------------------------------------------

    def _await_first_probes(self, ticket: Ticket) -> None:
        """Just after the start nothing is known yet of what is loaded, and what is assumed may
        be far from it: give the first probes that matter for this job their time."""
        consumers = self._registry.now.consumers
        target = consumers[ticket.job.consumer]
        probed = {
            name: consumer
            for name, consumer in consumers.items()
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

    def _holds_enough(self, snapshot: Snapshot, job: Job) -> bool:
        """Whether the job's consumer, or its model, surely has all it needs already, as one that
        has just run does, without a question to the card: by a sample that is fresh, and younger
        than the last eviction; or, where the card cannot be measured, by the ledger."""
        state, gpu = snapshot.states[job.consumer], snapshot.gpu
        if gpu.reading is None:
            known = bool(gpu.err)
        else:
            since = max(self._changed_at, self._clock.monotonic() - FRESH_S)
            known = gpu.sampled_at is not None and gpu.sampled_at > since
        if not known or not state.loaded:
            return False
        needed_mib = snapshot.needed(job.resident, job.context).mib
        if job.model is not None and snapshot.consumers[job.consumer].tells_models_apart:
            shares, model = model_shares(snapshot, job.consumer), state.model(job.model)
            return model.sure and needed_mib <= shares.get(job.model, 0)
        return needed_mib <= holder(snapshot, job.consumer).surely_mib

    def _impossible(self, snapshot: Snapshot, target: str) -> Sequence[str]:
        """Those that cannot be loaded, as is assumed of them, where the accounting decides."""
        gpu, total_mib = snapshot.gpu, snapshot.config.gpu.total_mib
        if gpu.reading is not None or not gpu.err or not (total_mib or gpu.last):
            return ()
        return Census(snapshot, self._clock.monotonic()).impossible(target)

    def _unload_others(self, ticket: Granted) -> None:
        done = Progress(self._registry.now.config.gpu.release_timeout)
        while True:
            census = self._seen(ticket.job)
            card = census.card()
            step = ticket.next_step(card, done.so_far(self._clock.monotonic()))
            if isinstance(step, Start):
                if step.attempt is not None:
                    self._note_attempt(step.attempt, card)
                return
            if isinstance(step, MakeRoom) and step.method == "trim":
                done.trims(step.victims[0].name)
                self._trim(step.victims[0], ticket)
                ticket.pause(0)
            elif isinstance(step, MakeRoom):
                self._unload_first(step.victims, ticket, done)
            elif isinstance(step, Refuse):
                retry_after = census.snapshot.config.health_interval
                raise refusal(step.look, card, done.leaking, retry_after)
            elif isinstance(step, Wait) and step.why == "work":
                done.wait_for(step.consumers)
            else:
                if isinstance(step, Wait) and step.why == "memory":
                    done.waits(self._clock.monotonic())
                ticket.pause(LONGEST_POLL_S)

    def _take_off_the_cpu(self, ticket: Granted) -> None:
        """A model that did not fit when it was loaded, and runs partly on the CPU, stays there
        until it is loaded again: have it unloaded, if there is room for all of it now."""
        job, snapshot = ticket.job, self._registry.now.of(ticket.job)
        state, model = snapshot.states[job.consumer], job.model or ""
        needs_mib = state.model(model).needs_mib
        if needs_mib is None or model not in map(model_key, state.on_cpu):
            return
        census = self._measured_census(job)
        own = census.resident(job.resident)
        reserved_mib = snapshot.config.gpu.reserved_mib
        if needs_mib <= own.held_mib + census.balance().free_mib - reserved_mib:
            self._evict(own, ticket)

    def _unload_first(self, victims: Sequence[Resident], ticket: Granted, done: Progress) -> None:
        job, victim = ticket.job, victims[0]
        done.tries(victim.name)
        last = len(victims) == 1
        fits = (lambda: is_room(self._seen(job).card(), job.resident)) if last else None
        others = None
        if victim.name not in done.waited_for:
            others = partial(self._others_may_go, job, done.tried)
        release = self._evict(victim, ticket, fits, others)
        if release is not None:
            done.unloaded(victim.name, release)
        ticket.pause(0)

    def _trim(self, victim: Resident, ticket: Ticket) -> Release | None:
        try:
            with self._registry.using(victim.name) as now:
                consumer = now.consumers[victim.name]
                return self._trimmer.trim(victim.name, consumer, victim.trim_mib, ticket)
        except NoConsumer:  # a reload has just removed it
            return None
        finally:
            self._changed_at = self._clock.monotonic()

    def _seen(self, job: Job | None = None) -> Census:
        """As of now and for the job, with those in it that may be asked again from now on."""
        self._registry.end_quarantines()
        return self._measured_census(job)

    def _others_may_go(self, job: Job, tried: Set[str]) -> bool:
        """Whether there would surely be room without those that were tried, too."""
        return can_be_made(self._seen(job).card(), job.resident, tried)

    def _evict(
        self,
        victim: Resident,
        ticket: Ticket,
        fits: Callable[[], bool] | None = None,
        elsewhere: Callable[[], bool] | None = None,
    ) -> Release | None:
        name, model = parts_of(victim.name)
        try:
            with self._does("unload", victim.name), self._registry.using(name) as now:
                release = self._evictor.evict(
                    name,
                    now.consumers[name],
                    victim.held_mib,
                    victim.floor_mib,
                    ticket,
                    fits,
                    elsewhere,
                    model,
                )
        except NoConsumer:  # a reload has just removed it
            return None
        finally:
            self._changed_at = self._clock.monotonic()
        if release is None or not release.asked:
            return release
        if release.outcome not in ("leaked", "gone", "busy"):
            with self._lock:
                self.evictions += 1
        return release

    @contextmanager
    def _does(self, what: Literal["unload", "load"], name: str) -> Iterator[None]:
        """Have the estimates know what goes on."""
        self._doing = Doing(what, name, self._clock.monotonic())
        try:
            yield
        finally:
            self._doing = None

    def _note_attempt(self, now: Look, card: Card) -> None:
        name, model = parts_of(now.target)
        self._emit(
            TriedAnyway(
                consumer=name,
                model=model,
                needed_mib=now.needed_mib,
                short_mib=short_mib(now, card.reserved_mib),
            )
        )


def _place_in(queue: Sequence[str], victim: str) -> int | None:
    """Where the first job for it is, counted from 1."""
    whole = parts_of(victim)[1] is None
    for place, wanted in enumerate(queue, start=1):
        if wanted == victim or (whole and parts_of(wanted)[0] == victim):
            return place
    return None
