"""Whose memory it is, with real servers of several processes on a simulated card: the figures stay
right whatever their processes do, or say that they are not known."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from gpumanager.config import Config, parse_config
from gpumanager.gpu.attribution import REFRESH_S, Attributor
from gpumanager.gpu.containers import ContainedConsumers
from gpumanager.gpu.device import GpuMemory, SimulatedMemory
from gpumanager.gpu.simulated import SimulatedCard
from gpumanager.host.processes import ConsumerProcesses, SystemProcesses
from gpumanager.model import Holdings, MemoryReading
from gpumanager.residency.release import judge
from tests.support.clock import FakeClock
from tests.support.families import family
from tests.support.threads import eventually

CARD_MIB = 20_000
MIB = 3000

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def card(tmp_path: Path) -> Path:
    return SimulatedCard.create(tmp_path / "card.json", CARD_MIB).path


class Machine:
    """What the broker sees of the card, with consumers at those ports."""

    def __init__(self, card: Path, **ports: int) -> None:
        self.clock = FakeClock()
        config = self.config(**ports)
        table = SystemProcesses()
        consumers = ConsumerProcesses(config, table)
        contained = ContainedConsumers(config, consumers, table)
        attributor = Attributor(consumers, contained, table, self.clock)
        self._memory = GpuMemory(SimulatedMemory(str(card)), self.clock, attributor)

    @staticmethod
    def config(**ports: int) -> Config:
        consumers = {name: {"url": f"http://127.0.0.1:{port}"} for name, port in ports.items()}
        return parse_config(yaml.safe_dump({"consumers": consumers}))

    def read(self) -> MemoryReading:
        return self._memory.read()

    def sees(self) -> Holdings:
        holdings = self.read().holdings
        assert holdings is not None
        assert holdings.reason == ""
        return holdings

    def later(self) -> Holdings:
        """Once who listens where has been looked up again."""
        self.clock.advance(REFRESH_S)
        return self.sees()

    def both(self) -> Iterator[Holdings]:
        """At once, and later."""
        yield self.sees()
        yield self.later()


def ended(pid: int) -> Callable[[], bool]:
    return lambda: SystemProcesses().born(pid) is None


def test_a_worker_that_is_replaced_between_two_readings(card: Path) -> None:
    with family("workers", card, MIB) as server:
        first, second = server.holder(), server.holder()
        machine = Machine(card, it=server.port)
        assert machine.sees().consumers == {"it": 2 * MIB}
        os.kill(first, signal.SIGKILL)
        third = server.holder()
        for seen in machine.both():
            assert seen.consumers == {"it": 2 * MIB}
            assert set(seen.pids["it"]) == {second, third}
            assert seen.foreign == ()


def test_a_worker_that_is_replaced_during_an_eviction(card: Path) -> None:
    with family("workers", card, MIB) as server:
        first, _ = server.holder(), server.holder()
        machine = Machine(card, it=server.port)
        before = machine.read()
        os.kill(first, signal.SIGKILL)
        eventually(ended(first), 10)
        # A half is back for a moment, and then it is not: none of it was released.
        assert judge("it", before, machine.read(), 2 * MIB).outcome in ("partial", "leaked")
        server.holder()
        release = judge("it", before, machine.read(), 2 * MIB)
        assert (release.outcome, release.mib, release.residue_mib) == ("leaked", 0, 2 * MIB)


@pytest.mark.parametrize("kind", ["forked", "reused"])
def test_several_processes_that_listen_for_one_consumer(card: Path, kind: str) -> None:
    with family(kind, card, MIB) as server:
        workers = {server.holder(), server.holder()}
        machine = Machine(card, it=server.port)
        for seen in machine.both():
            assert seen.consumers == {"it": 2 * MIB}
            assert set(seen.pids["it"]) == workers


@pytest.mark.parametrize("kind", ["forked", "reused"])
@pytest.mark.parametrize("leads", [True, False])
def test_workers_that_listen_outlive_the_first_process(card: Path, kind: str, leads: bool) -> None:
    with family(kind, card, MIB, leads=leads) as server:
        workers = {server.holder(), server.holder()}
        machine = Machine(card, it=server.port)
        machine.sees()
        server.kill()
        for seen in machine.both():  # they answer still: it is there
            assert seen.consumers == {"it": 2 * MIB}
            assert set(seen.pids["it"]) == workers


@pytest.mark.parametrize(
    ("kind", "leads"), [("detached", True), ("detached", False), ("apart", True)]
)
def test_a_worker_whose_parent_has_ended_is_its_servers_still(
    card: Path, kind: str, leads: bool
) -> None:
    with family(kind, card, MIB, leads=leads) as server:
        worker = server.holder()
        machine = Machine(card, it=server.port)
        assert machine.sees().consumers == {"it": MIB}
        server.go_on()
        assert worker not in SystemProcesses().ancestry(server.pid)
        assert server.pid not in SystemProcesses().ancestry(worker)
        for _ in range(3):
            assert machine.later().consumers == {"it": MIB}
        assert machine.sees().foreign == ()


@pytest.mark.parametrize(
    ("kind", "leads", "found"), [("detached", True, True), ("detached", False, False)]
)
def test_one_that_was_never_seen_below_its_server_is_known_by_its_group_only(
    card: Path, kind: str, leads: bool, found: bool
) -> None:
    with family(kind, card, MIB, leads=leads) as server:
        worker = server.holder()
        server.go_on()
        seen = Machine(card, it=server.port).sees()
        assert seen.consumers == {"it": MIB if found else 0}
        assert [each.pid for each in seen.foreign] == ([] if found else [worker])


@pytest.mark.parametrize("kind", ["detached", "apart"])
def test_a_worker_that_outlives_its_server_is_nobodys(card: Path, kind: str) -> None:
    with family(kind, card, MIB) as server:
        worker = server.holder()
        machine = Machine(card, it=server.port)
        before = machine.read()
        server.kill()
        for seen in machine.both():
            assert seen.consumers == {}  # not known to hold nothing: it is not there
            assert [(each.pid, each.mib) for each in seen.foreign] == [(worker, MIB)]
        # For an eviction it counts as what it was: nothing came back.
        assert judge("it", before, machine.read(), MIB).outcome == "leaked"


def test_a_server_started_anew_has_not_what_the_old_one_left(card: Path) -> None:
    with family("detached", card, MIB) as old:
        left = old.holder()
        machine = Machine(card, it=old.port)
        machine.sees()
        old.kill()
        with family("detached", card, MIB // 2, old.port) as new:
            worker = new.holder()
            for seen in machine.both():
                assert (seen.consumers, seen.pids) == ({"it": MIB // 2}, {"it": (worker,)})
                assert [each.pid for each in seen.foreign] == [left]


def test_two_consumers_in_one_process(card: Path) -> None:
    with family("two ports", card, MIB) as server, family("workers", card, MIB) as other:
        server.holder()
        workers = {other.holder(), other.holder()}
        first, second = server.ports
        machine = Machine(card, first=first, second=second, other=other.port)
        for seen in machine.both():
            assert seen.consumers == {"other": 2 * MIB}  # neither is known to hold nothing
            assert set(seen.pids["other"]) == workers
            assert seen.foreign == ()
