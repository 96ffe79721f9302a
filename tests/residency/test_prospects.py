"""What a job would find on the card, by what is known already."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from gpumanager.config import parse_config
from gpumanager.consumers.learning import Figures
from gpumanager.consumers.snapshot import Snapshot
from gpumanager.model import (
    ConsumerState,
    GpuState,
    Holdings,
    Job,
    MemoryReading,
    ModelState,
    StoppedBy,
)
from gpumanager.residency.prospects import prospect

NOW = 1000.0
CONFIG = parse_config(
    yaml.safe_dump(
        {
            "gpu": {"reserved_mib": 500},
            "consumers": {
                "tts": {"url": "http://127.0.0.1:1", "vram_resident_mib": 4000},
                "image": {"url": "http://127.0.0.1:2", "vram_resident_mib": 6000},
                "ollama": {"url": "http://127.0.0.1:3", "preset": "ollama"},
            },
        }
    )
)


def snapshot(free: int = 1000, **states: ConsumerState) -> Snapshot:
    known = {name: ConsumerState(loaded=False) for name in CONFIG.consumers} | states
    held = {name: 4000 if state.loaded else 0 for name, state in known.items()}
    reading = MemoryReading(16_000, 16_000 - free, free, holdings=Holdings(held))
    learned = {
        "tts": Figures(loads=(4.0, 6.0), unloads=(0.5,), runs=(2.0,)),
        "ollama": Figures(loads=(8.0,), runs=(3.0,)),
        "ollama/large": Figures(loads=(20.0,)),
    }
    return Snapshot(CONFIG, known, GpuState(reading, NOW, last=reading), learned)


def job(name: str, **more: Any) -> Job:
    return Job(name, "llm", **more)


def test_what_is_loaded_is_told_and_what_that_takes() -> None:
    found = prospect(snapshot(tts=ConsumerState(loaded=True)), job("tts"), NOW)
    assert found.loaded
    assert (found.load_s, found.unload_s, found.run_s) == (5.0, 0.5, 2.0)


def test_what_was_stopped_is_not_loaded() -> None:
    stopped = ConsumerState(loaded=True, stopped_by=StoppedBy("unit"))
    assert not prospect(snapshot(tts=stopped), job("tts"), NOW).loaded


@pytest.mark.parametrize(("free", "fits"), [(6499, False), (6500, True)])
def test_it_fits_if_there_is_room_beside_the_reserve(free: int, fits: bool) -> None:
    found = prospect(snapshot(free), job("image"), NOW)
    assert (found.loaded, found.fits) == (False, fits)


def test_where_nothing_is_known_of_the_card_all_fits() -> None:
    blind = Snapshot(CONFIG, snapshot().states)
    assert prospect(blind, job("image"), NOW).fits


def test_of_a_model_it_is_that_model_that_matters() -> None:
    state = ConsumerState(
        loaded=True, models={"small": ModelState(loaded=True, sure=True, context=4096)}
    )
    found = snapshot(ollama=state)
    assert prospect(found, job("ollama", model="small"), NOW).loaded
    assert not prospect(found, job("ollama", model="small", context=8192), NOW).loaded
    large = prospect(found, job("ollama", model="large"), NOW)
    assert not large.loaded
    assert (large.load_s, large.run_s) == (20.0, 3.0)  # its own, else its consumer's
