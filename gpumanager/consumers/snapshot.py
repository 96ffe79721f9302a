"""What the broker goes by, as of one moment: plain data that is never changed again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from gpumanager.config import Config, ConsumerConfig
from gpumanager.consumers.footprint import Figure
from gpumanager.consumers.learning import NOTHING, Figures
from gpumanager.model import ConsumerState, GpuState, Job, MemoryReading


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The config in force; the state of each of its consumers, by name; the latest sample of the
    card; and what was learned of each consumer, by name, as far as anything was.

    `states` also has the last state of the consumers that a reload has removed, for those who
    still work with a snapshot from before.
    """

    config: Config
    states: Mapping[str, ConsumerState] = field(default_factory=lambda: MappingProxyType({}))
    gpu: GpuState = field(default_factory=GpuState)
    learned: Mapping[str, Figures] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def consumers(self) -> Mapping[str, ConsumerConfig]:
        """The consumers' settings, by name."""
        return self.config.consumers

    def figures(self, name: str) -> Figures:
        """What was learned of one consumer."""
        return self.learned.get(name, NOTHING)

    def needed(self, name: str) -> Figure:
        """What a consumer of the config needs to be resident and work. It is a guess, unless it is
        declared: it may cost others an eviction, but refuses nothing."""
        known = self.learned.get(name, NOTHING)
        return known.needs.of(self.config.consumers[name].declared)

    def seeing(self, reading: MemoryReading | None) -> Snapshot:
        """The same, with this reading of the card."""
        return replace(self, gpu=replace(self.gpu, reading=reading))

    def supposing(self, states: Mapping[str, ConsumerState]) -> Snapshot:
        """The same, with these states of the consumers."""
        return replace(self, states=states)

    def settings(self, job: Job) -> ConsumerConfig:
        """Those of a job's consumer: as of its admission, if it was told."""
        admitted = job.settings
        if isinstance(admitted, ConsumerConfig):
            return admitted
        return self.config.consumers[job.consumer]

    def of(self, job: Job | None) -> Snapshot:
        """The same, as it is for a job: with the settings of its consumer as of its admission.
        What a reload has changed of them since is for the jobs after it."""
        if job is None:
            return self
        name, settings = job.consumer, self.settings(job)
        consumers = self.config.consumers
        if consumers.get(name) is settings:
            return self
        config = self.config.model_copy(update={"consumers": {**consumers, name: settings}})
        return replace(self, config=config)
