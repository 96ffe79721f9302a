"""The broker's periodic threads: which there are, and that each is started and ended once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from gpumanager.consumers.prober import Prober
from gpumanager.consumers.registry import Registry
from gpumanager.residency.ahead import LookAhead
from gpumanager.residency.housekeeper import Housekeeper
from gpumanager.worker import PeriodicWorker

log = logging.getLogger(__name__)


class Threads:
    """Some are there `always`; beside them one prober for every consumer that can be asked, made
    by `prober_of`, and one each for the housekeeper and for looking `ahead`, if there is anything
    to keep or to prepare.

    Not for several threads at a time, but for `wake_prober`.
    """

    def __init__(
        self,
        always: Iterable[PeriodicWorker],
        registry: Registry,
        prober_of: Callable[[str], Prober],
        housekeeper: Housekeeper,
        ahead: LookAhead,
    ) -> None:
        self._always = tuple(always)
        self._registry = registry
        self._prober_of = prober_of
        self._housekeeper = housekeeper
        self._ahead = ahead
        self._probers: dict[str, PeriodicWorker] = {}
        self._tidying: PeriodicWorker | None = None
        self._looking: PeriodicWorker | None = None

    def all(self) -> list[PeriodicWorker]:
        """All that there are at the moment."""
        others = [each for each in (self._tidying, self._looking) if each is not None]
        return [*self._always, *self._probers.values(), *others]

    def start(self) -> None:
        """Have all run that the config in force asks for. Idempotent."""
        config = self._registry.now.config
        for name, consumer in config.consumers.items():
            if name in self._probers or (consumer.health is None and consumer.probe is None):
                continue  # who is never probed is never refused
            self._probers[name] = PeriodicWorker(
                f"probe-{name}", self._prober_of(name).probe, retry_s=config.health_interval
            )
        if self._housekeeper.needed and self._tidying is None:
            self._tidying = PeriodicWorker("housekeeper", self._housekeeper.tidy, retry_s=1.0)
        if self._ahead.needed and self._looking is None:
            self._looking = PeriodicWorker("look-ahead", self._ahead.look, retry_s=1.0)
        for worker in self.all():
            worker.start()

    def stop(self) -> None:
        """End them all, and wait for that. Idempotent."""
        self._ahead.stop()
        self._end(self.all())

    def end_probers(self, names: Iterable[str]) -> None:
        """End those of these consumers, and wait for that; `start` makes new ones."""
        self._end([self._probers.pop(name) for name in names if name in self._probers])

    def wake_prober(self, name: str) -> None:
        """Have a consumer probed at once, if it is ever. From any thread."""
        prober = self._probers.get(name)
        if prober is not None:
            prober.wake()

    def _end(self, workers: list[PeriodicWorker]) -> None:
        for worker in workers:
            worker.stop()
        for worker in workers:
            if not worker.join():
                log.warning("thread still running", extra={"worker": worker.name})
