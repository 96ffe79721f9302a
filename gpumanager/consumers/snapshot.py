"""What the broker goes by, as of one moment: plain data that is never changed again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from gpumanager.config import Config, ConsumerConfig
from gpumanager.consumers.footprint import Figure
from gpumanager.consumers.learning import NOTHING, Figures
from gpumanager.model import (
    ConsumerState,
    Declared,
    GpuState,
    Job,
    MemoryReading,
    ModelListing,
    parts_of,
)

LISTED_SHARE = 0.15
LISTED_MIB = 512
"""On top of the size of a model's weights, for its buffers, its context of a usual length, and what
the driver keeps for its process: a first guess, as llama.cpp's models of 2026 need it."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The config in force; the state of each of its consumers, by name; the latest sample of the
    card; what was learned of each consumer, by name, as far as anything was; the models that each
    said last that it offers, and how many jobs it works on at once, as far as anybody asked.

    `states` also has the last state of the consumers that a reload has removed, for those who
    still work with a snapshot from before.
    """

    config: Config
    states: Mapping[str, ConsumerState] = field(default_factory=lambda: MappingProxyType({}))
    gpu: GpuState = field(default_factory=GpuState)
    learned: Mapping[str, Figures] = field(default_factory=lambda: MappingProxyType({}))
    listings: Mapping[str, ModelListing] = field(default_factory=lambda: MappingProxyType({}))
    slots: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def consumers(self) -> Mapping[str, ConsumerConfig]:
        """The consumers' settings, by name."""
        return self.config.consumers

    def figures(self, name: str) -> Figures:
        """What was learned of one consumer."""
        return self.learned.get(name, NOTHING)

    def needed(self, name: str, context: int | None = None) -> Figure:
        """What a consumer of the config, or a model of one, by the name that residents have, needs
        to be resident and work; with a `context` of so many tokens. It is a guess, unless it is
        declared: it may cost others an eviction, but refuses nothing.

        A model of which nothing is known or declared is taken to need its size, as its consumer
        lists it, and some room; else what its consumer does.
        """
        owner, model = parts_of(name)
        consumer, needs = self.config.consumers[owner], self.learned.get(name, NOTHING).needs
        declared = consumer.declared_for(model)
        if declared is not None:
            return needs.of(declared, context)
        if needs.nothing:
            usual = self.learned.get(owner, NOTHING).needs.of(consumer.declared, context)
            listed_mib = self.listed_mib(owner, model)
            if listed_mib is None or _holds_nothing(consumer, usual):
                return usual
            listed_mib = round(listed_mib * (1 + LISTED_SHARE)) + LISTED_MIB
            guess = needs.of(Declared(listed_mib, consumer.max_mib), context)
            capped = guess.mib < listed_mib
            return guess if capped else replace(guess, source="listed")
        if consumer.elastic:
            return needs.of(consumer.declared)
        return needs.of(Declared(0, consumer.max_mib), context)

    def listed_mib(self, name: str, model: str | None) -> int | None:
        """The size of a model, as its consumer lists it; None where it does not, or where that does
        not tell what it holds of the card."""
        listing = self.listings.get(name)
        if listing is None or model is None or self.config.consumers[name].elastic:
            return None
        return listing.sizes.get(model)

    def models(self, name: str) -> tuple[str, ...]:
        """The models of a consumer that count by themselves: those that are loaded, and those that
        something is known of. None of a consumer that cannot tell them apart, nor of one that is
        loaded, as far as is known, without having said what with."""
        consumer, state = self.config.consumers[name], self.states[name]
        if not consumer.tells_models_apart or (state.loaded and not state.loaded_models):
            return ()
        return self.known_models(name)

    def known_models(self, name: str) -> tuple[str, ...]:
        """The models of a consumer that were loaded or used, or that anything was learned of."""
        learned = (parts_of(each) for each in self.learned if each.startswith(f"{name}/"))
        models = (model for _, model in learned if model)
        return tuple(dict.fromkeys([*self.states[name].models, *models]))

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


def _holds_nothing(consumer: ConsumerConfig, usual: Figure) -> bool:
    """Whether its jobs are known to hold nothing of the card, as on a CPU, whatever it lists."""
    explicit = "vram_resident_mib" in consumer.model_fields_set
    return usual.mib == 0 and (usual.source == "measured" or explicit)
