"""Random cards: consumers, what is known of them and of the card, and a job that needs room."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import yaml

from gpumanager.config import Config, parse_config
from gpumanager.consumers.learning import Figures, Learned
from gpumanager.consumers.snapshot import Snapshot
from gpumanager.model import ConsumerState, GpuProcess, GpuState, Holdings, MemoryReading

NOW = 1000.0


@dataclass(frozen=True, slots=True)
class Case:
    """A job of `target` needs room at `NOW`; `queue` is whose jobs wait behind it, and those in
    `tried` were tried for it already."""

    target: str
    queue: list[str]
    tried: frozenset[str]


def situation(seed: int) -> tuple[Snapshot, list[Case]]:
    """What is known at `NOW`, and jobs that need room then."""
    chance = random.Random(seed)
    names = [f"c{index}" for index in range(chance.randint(1, 7))]
    holds = {name: chance.choice((0, 0, 400, chance.randrange(500, 8000))) for name in names}
    total = sum(holds.values()) + chance.choice((0, 500, 3000, 9000)) + 1000
    config = _config(chance, names, total)
    states = {name: _state(chance, mib) for name, mib in holds.items()}
    reading = _reading(chance, holds, total)
    last = reading if reading is not None else _reading(chance, holds, total)
    cases = [
        Case(
            target,
            chance.choices([*names, "removed by a reload"], k=chance.randint(0, 12)),
            frozenset(name for name in names if chance.random() < often),
        )
        for target in names
        for often in (0.0, 0.3)
    ]
    gpu = GpuState(reading, NOW, "" if reading else "no driver", last)
    for name, state in states.items():
        # Who is loaded, and nobody knows how much it holds, goes by now where the decision before
        # took it to hold nothing.
        if state.resident_mib is None and not config.consumers[name].vram_resident_mib:
            states[name] = replace(state, resident_mib=0)
    return Snapshot(config, states, gpu, _learned(chance, names)), cases


def _config(chance: random.Random, names: list[str], total: int) -> Config:
    def consumer(name: str) -> dict[str, Any]:
        has: dict[str, Any] = {
            "url": "http://127.0.0.1:1",
            "vram_resident_mib": chance.choice((0, chance.randrange(300, 9000))),
            "priority": chance.randint(0, 2),
            "pinned": chance.random() < 0.1,
            "vram_managed": chance.random() < 0.1,
            "elastic": chance.random() < 0.1,
            "can_coexist_with": [each for each in names if each != name and chance.random() < 0.15],
        }
        has |= {"floor_mib": chance.choice((0, 300))} if chance.random() < 0.3 else {}
        has |= {"unload": "/unload"} if chance.random() < 0.85 else {}
        if "unload" in has and chance.random() < 0.3:
            has["evict"] = ["http", {"unit": f"{name}.service"}]
        return has

    consumers = {name: consumer(name) for name in names}
    reserved = chance.choice((0, 200, 1000))
    least = max(each["vram_resident_mib"] for each in consumers.values()) + reserved + 1
    gpu = {
        "reserved_mib": reserved,
        "total_mib": chance.choice((0, 0, max(total, least), max(total // 2, least))),
    }
    top = {"eviction": chance.choice(("lru", "cost")), "gpu": gpu}
    return parse_config(yaml.safe_dump({**top, "consumers": consumers}))


def _state(chance: random.Random, mib: int) -> ConsumerState:
    loaded = chance.random() < (0.8 if mib > 600 else 0.3)
    state = ConsumerState(
        loaded=loaded,
        assumed=chance.uniform(900, NOW) if loaded and chance.random() < 0.4 else None,
        unloaded_at=chance.uniform(900, NOW) if not loaded and chance.random() < 0.5 else None,
        tells=chance.random() < 0.5,
        resident_mib=chance.choice((None, mib, mib // 2)),
        report_outdated=chance.random() < 0.3,
        last_used=chance.choice((None, chance.uniform(0, NOW))),
        pinned=chance.choice((None, None, None, True, False)),
    )
    if chance.random() < 0.2:
        ago = chance.uniform(0, 40)
        state = replace(state, loaded=False, assumed=None, unloaded_at=NOW - ago)
        state = replace(state, quarantine="kept it", leaks=chance.choice((1, 1, 2)))
    return state


def _reading(chance: random.Random, holds: dict[str, int], total: int) -> MemoryReading | None:
    kind = chance.choice(("none", "in total", "by process", "by process"))
    if kind == "none":
        return None
    foreign = chance.choice((0, 300, 1500))
    used = min(total, sum(holds.values()) + foreign)
    reading = MemoryReading(total, used, total - used)
    if kind == "in total":
        return reading
    seen = {name: mib for name, mib in holds.items() if chance.random() < 0.9}
    game = (GpuProcess(99, foreign, "game"),) if foreign else ()
    return replace(reading, processes=game, holdings=Holdings(seen, {}, game))


def _learned(chance: random.Random, names: list[str]) -> Mapping[str, Figures]:
    learned = Learned(names, now=lambda: NOW)
    for name in names:
        for _ in range(chance.randint(0, 4)):
            learned.held(name, chance.randrange(300, 9000), chance.choice(("measured", "reported")))
            learned.ran(name, chance.uniform(0.1, 30), cold=chance.random() < 0.3)
        if chance.random() < 0.5:
            learned.loaded(name, chance.uniform(0.1, 60))
        if chance.random() < 0.5:
            kept, until = chance.choice((None, 0, 900, 2500)), chance.choice((0.0, NOW + 5))
            learned.unloaded(name, chance.uniform(0.1, 5), kept, until)
        if chance.random() < 0.1:
            learned.ran_out(name, chance.randrange(500, 9000))
    return {name: learned.figures(name) for name in names}
