"""Asks one consumer how it is. Each consumer has a prober and a thread of its own, so that a
slow one delays nobody."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal, Protocol

from gpumanager.config import ConsumerConfig
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.registry import Registry
from gpumanager.errors import BrokerError, ConsumerTimeout, ConsumerUnreachable
from gpumanager.model import ConsumerState, ProbeReport, StoppedBy, model_key, resident_name
from gpumanager.telemetry.events import CameBack, Emit, Healthy, OnCpu, Unhealthy

log = logging.getLogger(__name__)


class Probes(Protocol):
    """The calls a prober makes. They raise BrokerError on failure."""

    def probe(self, name: str, consumer: ConsumerConfig) -> ProbeReport:
        """Ask health, and residency where the consumer can tell."""

    def slots(self, name: str, consumer: ConsumerConfig) -> int | None:
        """Ask how many jobs it works on at once; None where it does not tell."""


ASKED_AGAIN = 12
"""After so many probes a server is asked again how many jobs it works on at once: somebody may
have started it anew with other options between two probes."""


class Prober:
    """`probe` is the body of a periodic worker; `interval` in seconds. `returned` says whether a
    consumer that was stopped by a checkpoint is back by somebody else's doing; `look` asks for the
    models that it offers, if that was some time ago, so that no job has to wait for their sizes."""

    def __init__(
        self,
        name: str,
        probes: Probes,
        registry: Registry,
        learned: Learned,
        returned: Callable[[str, StoppedBy], Literal["resumed", "replaced"] | None],
        emit: Emit,
        *,
        interval: float,
        look: Callable[[str], object] = lambda name: None,  # noqa: ARG005
    ) -> None:
        self._name = name
        self._look = look
        self._probes = probes
        self._registry = registry
        self._learned = learned
        self._returned = returned
        self._emit = emit
        self._interval = interval
        self._gone = False
        self._ask_slots_in = 0

    def probe(self) -> float:
        """Probe once; returns the seconds until the next."""
        snapshot = self._registry.now
        before = snapshot.states[self._name]
        try:
            report = self._probes.probe(self._name, snapshot.consumers[self._name])
        except BrokerError as error:
            self._failed(error, was_busy=_is_busy(before))
        else:
            self._look_at_a_checkpoint(before)
            if self._gone:
                self._gone = False
                self._registry.process_returned(self._name, seen_version=before.residency_version)
            changed = self._registry.probe_succeeded(
                self._name, report, seen_version=before.residency_version
            )
            if changed:
                self._emit(Healthy(consumer=self._name))
            if report.on_cpu and report.on_cpu != before.on_cpu:
                models = ", ".join(report.on_cpu)
                self._emit(OnCpu(consumer=self._name, models=models))
            self._learn_what_did_not_fit()
            self._look_at_its_models(snapshot.consumers[self._name])
            if changed or before.stopped_by is not None:
                self._ask_slots_in = 0
            self._ask_slots(snapshot.consumers[self._name])
        return self._interval

    def _ask_slots(self, consumer: ConsumerConfig) -> None:
        """Ask it how many jobs it works on at once, if its settings go by that: after each start,
        and now and then. What it said before stands if it does not answer."""
        state = self._registry.get(self._name)
        if consumer.max_parallel != "auto" or not state.loaded or state.busy:
            return
        if self._ask_slots_in > 0:
            self._ask_slots_in -= 1
            return
        try:
            told = self._probes.slots(self._name, consumer)
        except BrokerError as error:
            extra = {"consumer": self._name, "reason": error.message}
            log.debug("slots not told", extra=extra)
        else:
            self._ask_slots_in = ASKED_AGAIN
            self._registry.told_slots(self._name, told)

    def _look_at_its_models(self, consumer: ConsumerConfig) -> None:
        """What they are called, and how large they are, has to be known before a job comes."""
        lists = consumer.list_models
        wanted = lists is not None and (lists.details is not None or consumer.any_model)
        if wanted and consumer.counts_by_model:
            self._look(self._name)

    def _learn_what_did_not_fit(self) -> None:
        """What a model holds that is partly on the CPU is not what it needs: that is more, and as
        much as its server says."""
        snapshot = self._registry.now
        state = snapshot.states[self._name]
        for model in map(model_key, state.on_cpu):
            resident = resident_name(self._name, model)
            self._learned.spilled(resident)
            needs_mib = state.model(model).needs_mib or 0
            if needs_mib > snapshot.needed(resident).mib:
                self._learned.ran_out(resident, needs_mib)

    def _look_at_a_checkpoint(self, before: ConsumerState) -> None:
        stopped_by = before.stopped_by
        if stopped_by is None or stopped_by.method != "checkpoint" or before.busy:
            return
        if (how := self._returned(self._name, stopped_by)) is not None:
            version = before.residency_version
            self._registry.mark_started(self._name, resumed=how == "resumed", seen_version=version)
            self._emit(CameBack(consumer=self._name, how=how))

    def _failed(self, error: BrokerError, *, was_busy: bool) -> None:
        busy = was_busy or _is_busy(self._registry.get(self._name))
        if busy and isinstance(error, ConsumerTimeout):
            return  # a server that works on a job may well be slow to answer: that proves nothing
        gone = isinstance(error, ConsumerUnreachable) and error.nothing_listens
        self._gone = self._gone or gone
        if self._registry.probe_failed(self._name, error.message, process_gone=gone):
            self._emit(Unhealthy(consumer=self._name, reason=error.message))


def _is_busy(state: ConsumerState) -> bool:
    return state.active > 0 or state.busy > 0
