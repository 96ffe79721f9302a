"""Who holds what of the card, who could go, and what each one needs: drawn up as plain data for
the decisions, from the config, the registry and what was learned. Makes no calls."""

from __future__ import annotations

from collections.abc import Mapping, Set

from gpumanager.config import Config, ConsumerConfig
from gpumanager.learning import Learned
from gpumanager.ledger import Balance, Held, balance, held
from gpumanager.model import ConsumerState, MemoryReading
from gpumanager.scheduling.victims import Resident

RELOAD_S = 5.0
"""Taken for the time to load a consumer that was never seen to load."""


class Census:
    """Counts the consumers; each answer is as of the states and the reading it is given."""

    def __init__(self, config: Config, learned: Learned) -> None:
        self._config = config
        self._learned = learned

    def needed(self, name: str, now: Balance) -> int:
        """MiB that a consumer needs to be resident and work."""
        most = now.total_mib - self._config.gpu.reserved_mib if now.total_mib else None
        return self._learned.needed_mib(name, self._config.consumers[name].vram_resident_mib, most)

    def balance(
        self, states: Mapping[str, ConsumerState], reading: MemoryReading | None
    ) -> Balance:
        """How much of the card is free."""
        mib = [each.mib for each in self.held(states, reading).values()]
        return balance(reading, self._config.gpu.total_mib, mib)

    def held(
        self, states: Mapping[str, ConsumerState], reading: MemoryReading | None
    ) -> dict[str, Held]:
        """What each consumer holds."""
        return {
            name: held(name, states[name], consumer.vram_resident_mib, reading)
            for name, consumer in self._config.consumers.items()
        }

    def residents(
        self,
        states: Mapping[str, ConsumerState],
        reading: MemoryReading | None,
        tried: Set[str] = frozenset(),
    ) -> list[Resident]:
        """All consumers as the choice of victims sees them. Those in `tried` may not go."""
        return [
            self.resident(name, states[name], reading, tried) for name in self._config.consumers
        ]

    def resident(
        self,
        name: str,
        state: ConsumerState,
        reading: MemoryReading | None,
        tried: Set[str] = frozenset(),
    ) -> Resident:
        """One of them."""
        consumer = self._config.consumers[name]
        figures = self._learned.figures(name)
        return Resident(
            name=name,
            loaded=state.loaded,
            held_mib=held(name, state, consumer.vram_resident_mib, reading).mib,
            last_used=state.last_used,
            priority=consumer.priority,
            evictable=_evictable(consumer, state) and name not in tried,
            floor_mib=_floor(consumer, figures.residue_mib),
            reload_s=RELOAD_S if figures.load_s is None else figures.load_s.p50,
        )


def _evictable(consumer: ConsumerConfig, state: ConsumerState) -> bool:
    return (
        bool(consumer.rungs)
        and not consumer.vram_managed
        and not state.is_pinned(consumer.pinned)
        and not state.quarantine
    )


def _floor(consumer: ConsumerConfig, residue_mib: int | None) -> int:
    """What it keeps after an unload: as declared, else as was seen."""
    return (residue_mib or 0) if consumer.floor_mib is None else consumer.floor_mib
