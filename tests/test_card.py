"""A card is one object: nothing of it is shared with another one."""

from __future__ import annotations

from pathlib import Path

import yaml

from gpumanager.card import GpuCard
from gpumanager.config import Config, parse_config
from gpumanager.consumers.admission import Admission
from gpumanager.consumers.breaker import Breakers
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.registry import Registry
from gpumanager.gpu.device import open_card
from gpumanager.gpu.simulated import SimulatedCard
from gpumanager.host.processes import ConsumerProcesses, SystemProcesses
from gpumanager.model import Job
from gpumanager.upstream.calls import ControlCalls
from gpumanager.upstream.watcher import Watcher
from tests.support.clock import FakeClock
from tests.support.events import ignore


def config() -> Config:
    consumer = {"url": "http://127.0.0.1:1", "vram_resident_mib": 3000, "unload": "/unload"}
    return parse_config(yaml.safe_dump({"consumers": {"a": consumer, "b": consumer}}))


class Cards:
    """Several, side by side in one broker's process."""

    def __init__(self, folder: Path, *totals_mib: int) -> None:
        self.clock = FakeClock()
        self.registries: list[Registry] = []
        self.cards = [self._card(folder / f"{total}.yaml", total) for total in totals_mib]

    def _card(self, file: Path, total_mib: int) -> GpuCard:
        SimulatedCard.create(file, total_mib)
        it, table = config(), SystemProcesses()
        registry = Registry(it, self.clock)
        self.registries.append(registry)
        return GpuCard(
            it,
            registry,
            Learned(it.consumers),
            ControlCalls(Watcher(), self.clock),
            Admission(registry, Breakers(self.clock, ignore), retry_s=5),
            ConsumerProcesses(it, table),
            table,
            self.clock,
            ignore,
            open_card(f"simulated:{file}"),
        )


def test_two_cards_have_a_queue_and_a_memory_each(tmp_path: Path) -> None:
    both = Cards(tmp_path, 8000, 24000)
    first, second = both.cards
    running = first.scheduler.enqueue(Job("a", "tts"))
    beside = second.scheduler.enqueue(Job("b", "tts"))
    behind = first.scheduler.enqueue(Job("b", "tts"))
    assert [card.scheduler.stats().in_flight for card in both.cards] == [1, 1]
    assert [card.scheduler.stats().queue_depth for card in both.cards] == [1, 0]
    readings = [card.sampler.look() for card in both.cards]
    assert [each and each.total_mib for each in readings] == [8000, 24000]
    for registry, reading in zip(both.registries, readings, strict=True):
        assert registry.now.gpu.reading == reading
    for card in both.cards:
        card.history.take()
        assert len(card.history.samples()) == 1
    for ticket in (running, beside, behind):
        ticket.close()
    for card in both.cards:
        card.close()
