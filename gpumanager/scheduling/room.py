"""Making room: carries out what `victims` decides, one victim at a time, and checks the result.

Runs on the thread of the job that has just been granted. All calls to consumers and all waits
happen here, outside any lock, each with a bound.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

from gpumanager.clock import Clock
from gpumanager.config import Config, ConsumerConfig
from gpumanager.errors import BrokerError, ConsumerUnreachable, InsufficientVram
from gpumanager.ledger import Balance, balance
from gpumanager.model import ConsumerState, MemoryReading
from gpumanager.registry import Registry
from gpumanager.scheduling.interface import Ticket
from gpumanager.scheduling.victims import Demand, Plan, Resident, plan_eviction

log = logging.getLogger(__name__)

RELEASE_TIMEOUT_S = 10.0
"""Longest wait for unloaded memory to show as free. Drivers took up to 5 s for it in the field."""

FIRST_PROBES_S = 4.0
"""After the start, the longest wait for the first probes: a little more than one may take."""

FIRST_POLL_S = 0.01
LONGEST_POLL_S = 0.1
"""The card is looked at often at first, for releases that are nearly at once, then less so."""

RELEASE_SHARE = 0.9
"""A victim's memory counts as back once this share of its figure is: declared figures are rough,
and an in-process unload keeps the CUDA context."""


class Controls(Protocol):
    """The calls that change what a consumer has loaded. They raise BrokerError on failure."""

    def load(self, name: str) -> None:
        """Have the consumer load its model; returns when it says so."""

    def unload(self, name: str) -> None:
        """Have the consumer drop its model; returns when it says so, which is not yet proof."""


class RoomMaker:
    """Evicts until the next job's consumer fits, then has it loaded.

    `measure` returns a fresh reading of the card, or None where it cannot be measured; `admit`
    raises if the consumer is known to be broken.
    """

    def __init__(
        self,
        config: Config,
        registry: Registry,
        controls: Controls,
        measure: Callable[[], MemoryReading | None],
        admit: Callable[[str], None],
        clock: Clock,
    ) -> None:
        self._config = config
        self._registry = registry
        self._controls = controls
        self._measure = measure
        self._admit = admit
        self._clock = clock
        self._probes_due = clock.monotonic() + FIRST_PROBES_S
        self._lock = threading.Lock()
        self._evictions = 0

    @property
    def evictions(self) -> int:
        return self._evictions

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
        tried: set[str] = set()
        while True:
            plan = self._plan(target, tried)
            if plan.fits:
                break
            if not plan.victims:
                raise self._insufficient(target, plan)
            victim = plan.victims[0]
            tried.add(victim.name)
            self._evict(victim, target, ticket)
            ticket.pause(0)
        self._load(target)
        ticket.pause(0)  # who left meanwhile has nothing sent in his name

    def _await_first_probes(self, ticket: Ticket) -> None:
        """Just after the start nothing is known yet of what is loaded, and what is assumed may
        be far from it: give the first probes that matter for this job their time."""
        target = self._config.consumers[ticket.job.consumer]
        matter = [
            name
            for name, consumer in self._config.consumers.items()
            if (consumer.health is not None or consumer.probe is not None)
            and (consumer is target or (target.vram_resident_mib and consumer.vram_resident_mib))
        ]
        while self._clock.monotonic() < self._probes_due and any(
            self._registry.get(name).healthy is None for name in matter
        ):
            ticket.pause(FIRST_POLL_S)

    def _plan(self, target: str, tried: set[str]) -> Plan:
        states = self._registry.snapshot()
        now = self._balance(states)
        if now.source == "unknown":
            return Plan(fits=True)
        consumer = self._config.consumers[target]
        demand = Demand(
            target,
            needed_mib=consumer.vram_resident_mib,
            held_mib=states[target].credited_mib(consumer.vram_resident_mib),
            coexists_with=frozenset(consumer.can_coexist_with),
        )
        residents = [
            _resident(name, consumer, states[name], tried)
            for name, consumer in self._config.consumers.items()
        ]
        return plan_eviction(demand, residents, now.free_mib - self._config.gpu.reserved_mib)

    def _balance(self, states: Mapping[str, ConsumerState]) -> Balance:
        return balance(self._measure(), self._config.gpu.total_mib, self._held(states).values())

    def _held(self, states: Mapping[str, ConsumerState]) -> dict[str, int]:
        return {
            name: states[name].held_mib(consumer.vram_resident_mib)
            for name, consumer in self._config.consumers.items()
        }

    def _evict(self, victim: Resident, target: str, ticket: Ticket) -> None:
        before = self._measure()
        began = self._clock.monotonic()
        try:
            with self._registry.busy(victim.name):
                self._controls.unload(victim.name)
        except BrokerError as error:
            log.warning(
                "eviction failed",
                extra={"consumer": victim.name, "target": target, "reason": error.message},
            )
            if isinstance(error, ConsumerUnreachable) and error.nothing_listens:
                self._registry.set_loaded(victim.name, False)  # its process took the memory along
            return
        self._registry.set_loaded(victim.name, False)
        with self._lock:
            self._evictions += 1
        released = before is None or self._await_release(before, victim, target, ticket)
        log.info(
            "evicted",
            extra={
                "consumer": victim.name,
                "target": target,
                "mib": victim.held_mib,
                "released": released,
                "ms": round((self._clock.monotonic() - began) * 1000),
            },
        )

    def _await_release(
        self, before: MemoryReading, victim: Resident, target: str, ticket: Ticket
    ) -> bool:
        """True once the card shows the victim's memory back, or the target fits already."""
        deadline = self._clock.monotonic() + RELEASE_TIMEOUT_S
        delay = FIRST_POLL_S
        while self._clock.monotonic() < deadline:
            reading = self._measure()
            if reading is None:
                return True  # the card is gone from view: from here on the ledger decides
            if reading.free_mib - before.free_mib >= RELEASE_SHARE * victim.held_mib:
                return True
            if self._plan(target, set()).fits:
                return True
            ticket.pause(delay)
            delay = min(LONGEST_POLL_S, 2 * delay)
        return False

    def _load(self, target: str) -> None:
        if self._config.consumers[target].load is None or self._registry.get(target).loaded:
            return
        began = self._clock.monotonic()
        with self._registry.busy(target):
            self._controls.load(target)
        self._registry.set_loaded(target, True)
        ms = round((self._clock.monotonic() - began) * 1000)
        log.info("loaded", extra={"consumer": target, "ms": ms})

    def _insufficient(self, target: str, plan: Plan) -> InsufficientVram:
        states = self._registry.snapshot()
        held = {name: mib for name, mib in self._held(states).items() if mib and name != target}
        now = self._balance(states)
        holders = [f"{name} {mib} MiB" for name, mib in sorted(held.items())]
        own = states[target].held_mib(self._config.consumers[target].vram_resident_mib)
        foreign = now.used_mib - sum(held.values()) - own
        if foreign > 0:
            holders.append(f"others {foreign} MiB")
        return InsufficientVram(
            f"{target} needs {self._config.consumers[target].vram_resident_mib} MiB and is "
            f"{plan.short_mib} MiB short: {now.free_mib} of {now.total_mib} MiB are free, "
            f"{self._config.gpu.reserved_mib} of them reserved; "
            f"held by {', '.join(holders) or 'nobody'}",
            consumer=target,
            retry_after=self._config.health_interval,
        )


def _resident(
    name: str, consumer: ConsumerConfig, state: ConsumerState, tried: set[str]
) -> Resident:
    return Resident(
        name=name,
        loaded=state.loaded,
        held_mib=state.held_mib(consumer.vram_resident_mib),
        last_used=state.last_used,
        priority=consumer.priority,
        evictable=consumer.unload is not None and not consumer.vram_managed and name not in tried,
    )
