"""On a real card, with processes that hold real CUDA memory; without one skipped, with why."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import yaml

from gpumanager.clock import SystemClock
from gpumanager.config import Config, parse_config
from gpumanager.gpu.attribution import Attributor
from gpumanager.gpu.containers import ContainedConsumers
from gpumanager.gpu.device import GpuMemory, GpuUnavailable, open_card
from gpumanager.host import checkpoint
from gpumanager.host.errors import ReclaimFailed
from gpumanager.host.processes import ConsumerProcesses, SystemProcesses
from gpumanager.model import MemoryReading
from gpumanager.residency.release import judge
from tests.support.cuda_process import CudaProcess, cuda_process

HELD_MIB = 4096
CONTEXT_MIB = 600
"""What a CUDA context may take beside what was asked for."""


def why_not() -> str:
    """Why nothing here can run; empty if it can."""
    card = open_card(0)
    try:
        card.read()
    except GpuUnavailable as error:
        return f"no GPU: {error}"
    finally:
        card.close()
    return "" if find_spec("cuda") else f"no cuda-bindings: {checkpoint.INSTALL}"


REASON = why_not()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(REASON), reason=REASON),
    pytest.mark.timeout(180),
]


@pytest.fixture
def holder() -> Iterator[CudaProcess]:
    with cuda_process(HELD_MIB) as running:
        yield running


def config(port: int) -> Config:
    consumer = {"url": f"http://127.0.0.1:{port}"}
    return parse_config(yaml.safe_dump({"consumers": {"it": consumer}}))


@pytest.fixture
def memory(holder: CudaProcess) -> Iterator[GpuMemory]:
    table, clock = SystemProcesses(), SystemClock()
    consumers = ConsumerProcesses(config(holder.port), table)
    contained = ContainedConsumers(config(holder.port), consumers, table)
    attributor = Attributor(consumers, contained, table, clock)
    found = GpuMemory(open_card(0), clock, attributor)
    yield found
    found.close()


def attributed(reading: MemoryReading) -> int:
    """What the holder's process is seen to hold; skips where the platform does not tell."""
    assert reading.holdings is not None
    if reading.holdings.reason:
        pytest.skip(f"no figures per process here: {reading.holdings.reason}")
    return reading.holdings.consumers["it"]


def seconds_until(condition: Callable[[], bool], limit: float = 30) -> float:
    """How long it took; each look takes about a tenth of a millisecond."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > limit:
            pytest.fail("it never came")
    return time.monotonic() - began


def report(capsys: pytest.CaptureFixture[str], **figures: object) -> None:
    """One line of JSON on the terminal, for docs/vram.md."""
    with capsys.disabled():
        print("\n" + json.dumps(figures))


def test_attribution_is_exact(
    holder: CudaProcess, memory: GpuMemory, capsys: pytest.CaptureFixture[str]
) -> None:
    held = attributed(memory.read())
    assert HELD_MIB <= held <= HELD_MIB + CONTEXT_MIB
    holder.ask("free")
    residue = attributed(memory.read())
    assert residue <= CONTEXT_MIB
    assert held - residue == HELD_MIB
    report(capsys, held_mib=held, context_residue_mib=residue)


def test_a_release_is_seen_and_judged(
    holder: CudaProcess, memory: GpuMemory, capsys: pytest.CaptureFixture[str]
) -> None:
    before = memory.read()
    attributed(before)
    holder.ask("free")

    def released() -> bool:
        return judge("it", before, memory.read(), HELD_MIB).outcome == "released"

    freed_s = seconds_until(released)
    holder.ask(f"take {HELD_MIB}")
    before = memory.read()
    expected = attributed(before)
    holder.process.kill()

    def ended() -> bool:
        return judge("it", before, memory.read(), expected).outcome == "released"

    killed_s = seconds_until(ended)
    report(capsys, freed_visible_ms=round(freed_s * 1000, 1), killed_ms=round(killed_s * 1000, 1))


def test_what_a_sample_costs(memory: GpuMemory, capsys: pytest.CaptureFixture[str]) -> None:
    memory.read()
    times = []
    for _ in range(200):
        began = time.perf_counter()
        memory.read()
        times.append(time.perf_counter() - began)
    times.sort()
    report(capsys, sample_p50_ms=round(times[100] * 1000, 3), p99_ms=round(times[198] * 1000, 3))
    assert times[100] < 0.05


def test_a_checkpoint_takes_the_memory_and_gives_it_back(
    holder: CudaProcess, memory: GpuMemory, capsys: pytest.CaptureFixture[str]
) -> None:
    holder.ask("fill 171")
    held = attributed(memory.read())
    free = memory.read().free_mib
    began = time.monotonic()
    try:
        checkpoint.suspend([holder.pid], 60)
    except ReclaimFailed as error:
        pytest.skip(f"no checkpoints here: {error}")
    suspended_s = time.monotonic() - began
    assert memory.read().free_mib - free >= 0.9 * held
    began = time.monotonic()
    checkpoint.resume([holder.pid], 60)
    resumed_s = time.monotonic() - began
    assert holder.ask("check 171") == "True"
    report(
        capsys,
        checkpoint_gib=round(held / 1024, 2),
        suspend_s=round(suspended_s, 2),
        resume_s=round(resumed_s, 2),
        suspend_gib_s=round(held / 1024 / suspended_s, 2),
        resume_gib_s=round(held / 1024 / resumed_s, 2),
    )
