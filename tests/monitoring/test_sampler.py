"""What the sampler leaves in the registry."""

from __future__ import annotations

import logging

import pytest

from gpumanager.learning import Learned
from gpumanager.model import MemoryReading
from gpumanager.monitoring.memory import GpuMemory, GpuUnavailable
from gpumanager.monitoring.sampler import Sampler
from gpumanager.registry import Registry
from tests.support.clock import FakeClock

READING = MemoryReading(8000, 1000, 7000)


class ScriptedCard:
    def __init__(self, *answers: MemoryReading | str) -> None:
        self.answers = list(answers)

    def read(self) -> MemoryReading:
        answer = self.answers.pop(0)
        if isinstance(answer, str):
            raise GpuUnavailable(answer)
        return answer

    def close(self) -> None:
        pass


def make(*answers: MemoryReading | str) -> tuple[Sampler, Registry, FakeClock]:
    clock = FakeClock()
    registry = Registry({}, clock)
    memory = GpuMemory(ScriptedCard(*answers), clock)
    return Sampler(memory, registry, Learned(()), clock, interval=2.0), registry, clock


def test_a_sample_is_published_with_its_time() -> None:
    sampler, registry, clock = make(READING)
    assert sampler.sample() == 2.0
    assert registry.gpu.reading == READING
    assert registry.gpu.sampled_at == clock.monotonic()
    assert registry.gpu.err == ""


def test_a_failing_field_shows_as_err_beside_the_figures() -> None:
    sampler, registry, _ = make(MemoryReading(8000, 1000, 7000, fault="name: Unknown Error"))
    sampler.sample()
    assert registry.gpu.reading is not None
    assert registry.gpu.err == "name: Unknown Error"


def test_a_lost_card_shows_as_err_keeps_no_stale_figures_and_recovers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sampler, registry, clock = make(READING, "GPU is lost", READING)
    with caplog.at_level(logging.INFO):
        sampler.sample()
        before = registry.gpu.sampled_at
        clock.advance(2)
        sampler.sample()
        assert registry.gpu.reading is None
        assert registry.gpu.err == "GPU is lost"
        assert registry.gpu.sampled_at == before
        sampler.sample()  # put off
        clock.advance(2)
        sampler.sample()
    assert registry.gpu.err == ""
    assert registry.gpu.reading == READING
    events = [record.message for record in caplog.records]
    assert events == ["gpu unavailable", "gpu available"]
