"""Unloads one consumer, and sees to it that its memory comes back.

Runs on the thread of the job that holds the GPU. All calls to consumers and all waits happen here,
outside any lock, each with a bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from gpumanager.clock import Clock
from gpumanager.config import ConsumerConfig, EvictionMethod
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.registry import Registry
from gpumanager.errors import BrokerError, ConsumerUnreachable
from gpumanager.gpu.inventory import keeps_mib
from gpumanager.model import (
    CONTEXT_MIB,
    Job,
    MemoryReading,
    ProbeReport,
    StoppedBy,
    resident_name,
)
from gpumanager.residency.census import usable
from gpumanager.residency.release import LEAKED_SHARE, noise_mib
from gpumanager.residency.rest import Rest
from gpumanager.residency.settling import Settling, Unloaded
from gpumanager.scheduling.interface import Release, Ticket
from gpumanager.telemetry.events import (
    Emit,
    Evicted,
    EvictionFailed,
    EvictionSkipped,
    LoadedMeanwhile,
    Quarantined,
)
from gpumanager.upstream.calls import GivingUp

MOST = 0.5
"""Of what was expected: if so much has come back in the end, it was slow, and no leak."""

MOST_ASKED = 3
"""How often one is asked again that jobs of somebody else have loaded meanwhile."""

GAP_S = 60.0
"""A card that could be read so lately is looked for again before its word is done without."""


class Controls(Protocol):
    """The calls that change what a consumer has loaded. They raise BrokerError on failure."""

    def load(
        self,
        name: str,
        consumer: ConsumerConfig,
        model: str | None = None,
        giving_up: GivingUp | None = None,
    ) -> None:
        """Have the consumer load its model, or the one that is given; returns when it says so, or
        raises the error that it was given up with."""

    def warm(
        self,
        name: str,
        consumer: ConsumerConfig,
        model: str | None = None,
        giving_up: GivingUp | None = None,
    ) -> None:
        """As `load`, for a consumer that loads with its first job."""

    def trim(self, name: str, consumer: ConsumerConfig) -> None:
        """Have the consumer give back what it holds beyond its models."""

    def unload(self, name: str, consumer: ConsumerConfig, model: str | None = None) -> bool:
        """Have the consumer drop all its models, or the one that is given; returns when it says so,
        which is not yet proof. False if it says that it does not have that loaded."""

    def settled(self, name: str, consumer: ConsumerConfig, model: str | None = None) -> bool:
        """Whether it says that the unload is over; True if it does not tell."""

    def busy(self, name: str, consumer: ConsumerConfig) -> bool | None:
        """Whether it says that it works on something; None if it does not tell."""

    def probe(self, name: str, consumer: ConsumerConfig) -> ProbeReport:
        """Ask it how it is, and what it holds."""


class Stops(Protocol):
    """Stops consumers, and starts them again. Both raise BrokerError on failure."""

    def stop(self, name: str, method: EvictionMethod) -> StoppedBy:
        """Stop it by a method other than `http`."""

    def bring_back(self, name: str, stopped_by: StoppedBy) -> bool:
        """Start it again; True if it can be used at once, False if it has yet to get ready."""


class Evictor:
    """`measure` returns a fresh reading of the card, or None where it cannot be measured."""

    def __init__(
        self,
        registry: Registry,
        learned: Learned,
        controls: Controls,
        stops: Stops,
        measure: Callable[[], MemoryReading | None],
        clock: Clock,
        emit: Emit,
    ) -> None:
        self._registry = registry
        self._learned = learned
        self._controls = controls
        self._stops = stops
        self._measure = measure
        self._clock = clock
        self._emit = emit
        self._rest = Rest(controls, measure, clock)
        self._settling = Settling(registry, controls, self._rest, measure, clock)

    def evict(
        self,
        name: str,
        consumer: ConsumerConfig,
        held_mib: int,
        floor_mib: int,
        ticket: Ticket,
        fits: Callable[[], bool] | None = None,
        elsewhere: Callable[[], bool] | None = None,
        model: str | None = None,
    ) -> Release | None:
        """Unload the consumer by one eviction method after the other, until one gives its memory
        back; None if not one of them could be carried out. With a `model`, its unload call is for
        that one only; the other methods are for all of the consumer.

        `held_mib` is what it is taken to hold, `floor_mib` what it may keep. `fits` says whether
        the room is enough now: until it is, a release is given longer, in case more comes; None
        does without that. `elsewhere` says whether somebody else could go instead: then one that
        works on a job of somebody else is left alone; without, the end of that job is waited for.
        One that gave nothing back, by any method, though it held something, is put into
        quarantine. Raises the error the ticket was cancelled with.
        """
        release: Release | None = None
        tried = []
        if elsewhere is not None and self._rest.is_busy(name, consumer) and elsewhere():
            return self._left_alone(name, ticket)
        eviction_methods = list(
            usable(consumer, self._registry.get(name)) or consumer.eviction_methods
        )
        if self._registry.get(name).growth.over == "loads":
            # Its unload leaves more behind each time; a new process does not.
            eviction_methods.sort(key=lambda method: bool(method.http))
        times_asked = 0
        while eviction_methods:
            method = eviction_methods.pop(0)
            began = self._clock.monotonic()
            try:
                self._rest.wait(name, consumer, method, ticket)
                before = self._measure() or self._last_seen()
                holds = self._what_it_holds(name, consumer, before)
                asked = self._carry_out(name, consumer, method, model)
            except BrokerError as error:
                if self._gone(name, error):
                    return Release("gone")
                self._emit(
                    EvictionFailed(
                        consumer=name,
                        target=ticket.job.consumer,
                        method=method.name,
                        reason=error.message,
                    )
                )
                continue
            if not asked and model is not None:
                # It does not have that model: what it held is back, or on its way.
                return Release("gone", asked=False)
            if method.name not in tried:
                tried.append(method.name)
            alone = model if method.http else None
            if holds is None or (alone is not None and held_mib < holds):
                expected = held_mib - floor_mib
            else:
                expected = holds - floor_mib
            # Of the host's memory another program may have taken at once what it gave back.
            certain = holds is not None and before is not None and not noise_mib(name, before)
            unloaded = Unloaded(
                name,
                consumer,
                before,
                max(0, expected),
                certain=certain,
                call=consumer.settled if method.http else None,
                again=bool(method.http) and times_asked < MOST_ASKED,
                model=alone,
            )
            release = self._settling.wait(
                unloaded, ticket, fits, elsewhere if method.http else None
            )
            seconds = self._clock.monotonic() - began
            release = replace(release, seconds=seconds, certain=unloaded.certain)
            if release.ask_again:
                self._emit(LoadedMeanwhile(consumer=name, model=alone))
                times_asked += 1
                eviction_methods.insert(0, method)
                continue
            if not asked and release.outcome != "leaked":
                # It had unloaded by itself, as Ollama does after a while: nobody was evicted, and
                # how long that took, or what it kept, is not known.
                return replace(release, asked=False)
            self._take_note(unloaded, method, release, ticket.job)
            if release.outcome == "busy":
                return release
            if release.outcome != "leaked":
                self._registry.release(name)
                residue = release.residue_mib
                if release.complete and alone is not None:
                    self._registry.came_back(name, alone)
                    floor_mib = keeps_mib(self._registry.now, name)
                if release.complete and residue is not None and residue <= floor_mib:
                    self._registry.came_back(name)
                return release
        if release is not None and release.certain:
            self._quarantine(name, release, tried)
        return release

    def _quarantine(self, name: str, release: Release, tried: Sequence[str]) -> None:
        held = release.residue_mib
        kept = "" if held is None else f", and holds {held} MiB"
        reason = f"gave back {release.mib} of {release.expected_mib} MiB"
        reason += f" after {', '.join(tried)}{kept}"
        most = round(MOST * release.expected_mib)
        ends_mib = max(CONTEXT_MIB, (held or 0) + release.mib - most)
        seconds = self._registry.quarantine(name, reason, ends_mib)
        self._emit(Quarantined(consumer=name, reason=reason, pause_ms=round(seconds * 1000)))

    def _last_seen(self) -> MemoryReading | None:
        """The card as it was before it went out of view, if that was just now and may pass."""
        gpu = self._registry.now.gpu
        seen_at = -math.inf if gpu.sampled_at is None else gpu.sampled_at
        return gpu.last if self._clock.monotonic() - seen_at <= GAP_S else None

    def _left_alone(self, name: str, ticket: Ticket) -> Release:
        self._emit(EvictionSkipped(consumer=name, target=ticket.job.consumer))
        return Release("busy")

    def _what_it_holds(
        self, name: str, consumer: ConsumerConfig, before: MemoryReading | None
    ) -> int | None:
        """MiB by the card's figures for its processes, else by its own word of this moment; None
        if neither tells, so that there is only what was declared."""
        if before is None:
            return None
        own = before.measured_mib(name)
        if own is not None:
            return own
        try:
            return self._controls.probe(name, consumer).resident_mib
        except BrokerError:
            return None

    def _carry_out(
        self, name: str, consumer: ConsumerConfig, method: EvictionMethod, model: str | None
    ) -> bool:
        """False if there was nothing to ask for."""
        with self._registry.busy(name):
            if method.http:
                asked = self._controls.unload(name, consumer, model)
                self._registry.set_loaded(name, False, model)
                return asked
            self._registry.mark_stopped(name, self._stops.stop(name, method))
            return True

    def _gone(self, name: str, error: BrokerError) -> bool:
        """Its process has ended, and took the memory along."""
        if isinstance(error, ConsumerUnreachable) and error.nothing_listens:
            self._registry.set_loaded(name, False)
            return True
        return False

    def _take_note(
        self, unloaded: Unloaded, method: EvictionMethod, release: Release, job: Job
    ) -> None:
        name, model = unloaded.name, unloaded.model
        gave = release.mib > LEAKED_SHARE * release.expected_mib
        kept = release.residue_mib if method.http and gave else None
        if model is not None:
            self._learned.unloaded(resident_name(name, model), release.seconds, None)
        if not self._registry.get(name).loaded_models:
            self._learned.unloaded(name, release.seconds, kept, release.more_until)
        self._emit(
            Evicted(
                consumer=name,
                model=model,
                target=job.consumer,
                target_model=job.model,
                method=method.name,
                outcome=release.outcome,
                mib=release.mib,
                expected_mib=release.expected_mib,
                ms=round(release.seconds * 1000),
                taken_by=release.taken_by or None,
            )
        )
