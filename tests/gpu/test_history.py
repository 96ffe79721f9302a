"""The last hour of the card: fine at its end, coarse before, and what the sensors said."""

from __future__ import annotations

import itertools
from datetime import timedelta

from gpumanager.config import parse_config
from gpumanager.consumers.registry import Registry
from gpumanager.gpu.history import COARSE, COARSE_KEPT, EVERY_S, FINE_KEPT, MemoryHistory
from gpumanager.model import GpuState, MemoryReading
from tests.support.clock import FakeClock

CONFIG = "consumers: {voice: {url: 'http://127.0.0.1:1', vram_resident_mib: 2800}}"


def make() -> tuple[MemoryHistory, Registry, FakeClock]:
    clock = FakeClock()
    registry = Registry(parse_config(CONFIG), clock, lambda consumer: False)
    registry.set_gpu(GpuState(MemoryReading(8000, 1000, 7000), clock.monotonic()))
    return MemoryHistory(registry, clock), registry, clock


def test_what_is_assumed_before_anybody_looked_at_the_card_is_no_history() -> None:
    clock = FakeClock()
    registry = Registry(parse_config(CONFIG), clock, lambda consumer: False)
    history = MemoryHistory(registry, clock)
    history.take()
    assert history.samples() == ()
    registry.set_gpu(GpuState(err="NVML: no driver"))
    history.take()
    assert len(history.samples()) == 1


def test_an_hour_is_kept_fine_for_five_minutes_and_coarse_before() -> None:
    history, _, clock = make()
    for _ in range(2 * 3600):
        assert history.take() == EVERY_S
        clock.advance(EVERY_S)
    samples = history.samples()
    gaps = [(b.at - a.at).total_seconds() for a, b in itertools.pairwise(samples)]
    assert gaps[-FINE_KEPT + 1 :] == [EVERY_S] * (FINE_KEPT - 1)
    assert set(gaps[: COARSE_KEPT - 1]) == {EVERY_S * COARSE}
    assert max(gaps) == EVERY_S * COARSE
    assert timedelta(minutes=59) < samples[-1].at - samples[0].at <= timedelta(hours=1)


def test_a_reader_may_ask_for_the_latest_only() -> None:
    history, _, clock = make()
    for _ in range(600):
        history.take()
        clock.advance(EVERY_S)
    found = history.samples(60)
    assert len(found) == 60
    assert found == history.samples()[-60:]


def test_what_the_sensors_say_is_kept_and_what_they_do_not_say_is_none() -> None:
    history, registry, clock = make()
    history.take()
    reading = MemoryReading(8000, 1000, 7000, utilization_percent=37, temperature_c=61)
    registry.set_gpu(GpuState(reading, clock.monotonic()))
    history.take()
    before, after = history.samples()
    assert (before.utilization_percent, before.power_w, before.temperature_c) == (None, None, None)
    assert (after.utilization_percent, after.power_w, after.temperature_c) == (37, None, 61)
