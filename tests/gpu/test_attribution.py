"""Which consumer holds what, on a stand-in for the machine's processes, and on its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

import pytest
import yaml

from gpumanager.clock import SystemClock
from gpumanager.config import Config, parse_config
from gpumanager.gpu.attribution import REFRESH_S, Attributor
from gpumanager.gpu.containers import ContainedConsumers, Resolver
from gpumanager.host.processes import ConsumerProcesses, Network, SystemProcesses
from gpumanager.host.procfs import Address
from gpumanager.model import GpuProcess, Holdings, MemoryReading
from tests.support.clock import FakeClock

SERVE = """
import socket, subprocess, sys
server = socket.create_server(("127.0.0.1", 0))
waits = [sys.executable, "-c", "import sys; sys.stdin.read()"]
child = subprocess.Popen(waits, stdin=subprocess.PIPE)
print(server.getsockname()[1], child.pid, flush=True)
sys.stdin.read()
child.communicate()
"""


class FakeProcesses:
    """`tree` has each pid's parent, `names` and `cgroups` what is not said otherwise."""

    def __init__(self) -> None:
        self.listening: dict[Address, tuple[int, ...]] = {
            ("127.0.0.1", 8766): (100,),
            ("0.0.0.0", 11434): (200,),
        }
        self.tree = {100: 1, 200: 1, 201: 200, 202: 201, 300: 1}
        self.names = {300: "game"}
        self.cgroups: dict[int, str] = {}
        self.commands: dict[int, tuple[str, ...]] = {}
        self.networks: dict[int, Network] = {}
        self.all_seen = True
        self.births: dict[int, int] = {}
        self.led: dict[int, set[int]] = {}
        self.on_card: set[int] = set()
        self.looks = 0

    def ports(self) -> set[int]:
        return {port for _, port in self.listening}

    def listeners(self) -> Mapping[Address, tuple[int, ...]]:
        self.looks += 1
        return self.listening

    def ancestry(self, pid: int) -> tuple[int, ...]:
        chain = []
        while pid in self.tree:
            chain.append(pid)
            pid = self.tree[pid]
        return tuple(chain)

    def born(self, pid: int) -> int | None:
        return self.births.get(pid, pid) if pid in self.tree else None

    def groups(self, pid: int) -> set[int]:
        return self.led.get(pid, set())

    def uses_card(self, pid: int) -> bool:
        return pid in self.on_card

    def name(self, pid: int) -> str:
        return self.names.get(pid, "python" if pid in self.tree else "")

    def cgroup(self, pid: int) -> str:
        return self.cgroups.get(pid, "/user.slice/user-1000.slice/session-1.scope")

    def command(self, pid: int) -> tuple[str, ...]:
        return self.commands.get(pid, ())

    def network(self, pid: int) -> Network:
        return self.networks.get(pid, Network(frozenset({"192.0.2.9"}), frozenset({8766, 11434})))

    def sees_all(self) -> bool:
        return self.all_seen


def config(**urls: str) -> Config:
    urls = urls or {"mvoice": "http://127.0.0.1:8766", "ollama": "http://localhost:11434"}
    return parse_config(yaml.safe_dump({"consumers": {n: {"url": u} for n, u in urls.items()}}))


def reading(**held: int) -> MemoryReading:
    """Processes as `p100=MiB`."""
    found = tuple(GpuProcess(int(name[1:]), mib) for name, mib in held.items())
    used = sum(held.values())
    return MemoryReading(24_000, used, 24_000 - used, processes=found)


def attributor(
    table: FakeProcesses,
    of: Config | None = None,
    names: Mapping[str, set[str]] | None = None,
) -> tuple[Attributor, FakeClock]:
    """`names`: what names resolve to."""
    clock, it = FakeClock(), of or config()
    resolver = Resolver(lambda host: (names or {}).get(host, set()), wait_s=10)
    consumers = ConsumerProcesses(it, table)
    contained = ContainedConsumers(it, consumers, table, resolver)
    return Attributor(consumers, contained, table, clock), clock


def test_a_process_its_descendants_and_strangers() -> None:
    one, _ = attributor(FakeProcesses())
    holdings = one.attribute(reading(p100=1000, p202=4000, p201=50, p300=700))
    assert holdings == Holdings(
        {"mvoice": 1000, "ollama": 4050},
        {"mvoice": (100,), "ollama": (202, 201)},
        (GpuProcess(300, 700, "game"),),
    )


def test_who_runs_but_holds_nothing_is_known_to_hold_nothing() -> None:
    one, _ = attributor(FakeProcesses())
    assert one.attribute(reading(p100=1000)).consumers == {"mvoice": 1000, "ollama": 0}


def test_who_is_not_seen_cannot_be_told_apart() -> None:
    table = FakeProcesses()
    del table.listening["0.0.0.0", 11434]
    table.tree[200] = 1
    one, _ = attributor(table)
    holdings = one.attribute(reading(p100=1000, p202=4000))
    assert holdings.consumers == {"mvoice": 1000}
    assert holdings.foreign == (GpuProcess(202, 4000, "python"),)


@pytest.mark.parametrize("front", ["docker-proxy", "systemd", "rootlessport"])
def test_one_that_only_holds_the_port_for_another_is_not_it(front: str) -> None:
    table = FakeProcesses()
    table.names[200] = front
    one, _ = attributor(table)
    assert one.attribute(reading(p100=1000)).consumers == {"mvoice": 1000}


def test_one_that_systemd_gave_its_socket_is_found_beside_it() -> None:
    table = FakeProcesses()
    table.names[1] = "systemd"
    table.listening["0.0.0.0", 11434] = (1, 200)
    one, _ = attributor(table)
    assert one.attribute(reading(p202=4000)).consumers == {"mvoice": 0, "ollama": 4000}


@pytest.mark.parametrize(
    "cgroup",
    [
        "/user.slice/user@1000.service/app.slice/ollama.service",
        "/system.slice/docker-0123456789abcdef.scope",
        "/docker/" + "0" * 64,
    ],
)
def test_a_process_beside_the_listening_one_is_known_by_their_service(cgroup: str) -> None:
    table = FakeProcesses()
    table.tree[202] = 1  # no descendant
    table.cgroups = {200: cgroup, 202: cgroup}
    one, _ = attributor(table)
    assert one.attribute(reading(p202=4000)).consumers == {"mvoice": 0, "ollama": 4000}


@pytest.mark.parametrize(
    "cgroups",
    [
        {200: "/a/session-1.scope", 202: "/a/session-1.scope"},
        {200: "/a/user@1000.service", 202: "/a/user@1000.service"},
        {100: "/a/box.service", 200: "/a/box.service", 202: "/a/box.service"},
        {202: "/a/other.service"},
    ],
)
def test_a_cgroup_that_is_no_single_consumers_own_proves_nothing(cgroups: dict[int, str]) -> None:
    table = FakeProcesses()
    table.tree[202] = 1
    table.cgroups = cgroups
    one, _ = attributor(table)
    (foreign,) = one.attribute(reading(p202=4000)).foreign
    assert foreign.pid == 202


def test_the_nearest_consumer_counts() -> None:
    table = FakeProcesses()
    table.tree[200] = 100  # mvoice started ollama
    one, _ = attributor(table)
    assert one.attribute(reading(p202=4000)).consumers == {"mvoice": 0, "ollama": 4000}


def test_two_consumers_in_one_process_cannot_be_told_apart() -> None:
    table = FakeProcesses()
    table.listening["127.0.0.1", 8766] = (200,)
    one, _ = attributor(table)
    shared = reading(p202=4000, p300=50)
    # Neither is measured, at 0 least of all, and their process is nobody else's.
    assert one.attribute(shared) == Holdings(foreign=(GpuProcess(300, 50, "game"),))


def test_a_process_number_that_is_somebody_elses_here_proves_nothing() -> None:
    table = FakeProcesses()
    table.all_seen = False  # in a container without the host's PID namespace
    one, _ = attributor(table)
    seen = one.attribute(reading(p100=1000, p7777=5000))
    assert "outside this PID namespace" in seen.reason
    assert seen.consumers == {}


def test_a_process_that_has_just_ended_hides_nobody() -> None:
    one, _ = attributor(FakeProcesses())
    seen = one.attribute(reading(p100=1000, p7777=5000))
    assert seen.consumers == {"mvoice": 1000, "ollama": 0}
    assert seen.foreign == (GpuProcess(7777, 5000, ""),)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (MemoryReading(24_000, 5000, 19_000), "no figures per process"),
        (MemoryReading(24_000, 5000, 19_000, processes=()), "5000 MiB are in use, but no process"),
        (reading(p7777=5000), "outside this PID namespace"),
    ],
)
def test_a_platform_that_does_not_tell_is_told_of(what: MemoryReading, words: str) -> None:
    one, _ = attributor(FakeProcesses())
    holdings = one.attribute(what)
    assert words in holdings.reason
    assert (holdings.consumers, holdings.foreign) == ({}, ())


def test_an_idle_card_is_no_riddle() -> None:
    one, _ = attributor(FakeProcesses())
    idle = MemoryReading(24_000, 400, 23_600, processes=())
    assert one.attribute(idle) == Holdings({"mvoice": 0, "ollama": 0})


def test_a_look_up_that_breaks_is_told_of() -> None:
    class Broken(FakeProcesses):
        def listeners(self) -> Mapping[Address, tuple[int, ...]]:
            raise RuntimeError("odd")

    one, _ = attributor(Broken())
    assert one.attribute(reading(p100=1)).reason == "the processes cannot be looked up: odd"


def test_who_listens_is_looked_up_only_for_new_processes_and_now_and_then() -> None:
    table = FakeProcesses()
    one, clock = attributor(table)
    for _ in range(3):
        one.attribute(reading(p100=1000, p202=4000))
    one.attribute(reading(p100=1000))  # one has ended
    one.attribute(reading(p100=1000, p201=50))  # a new child of a known one
    assert table.looks == 1
    one.attribute(reading(p100=1000, p300=1))  # nobody's
    assert table.looks == 2
    clock.advance(REFRESH_S)
    one.attribute(reading(p100=1000))
    assert table.looks == 3


def test_a_process_that_ended_a_moment_ago_is_whose_it_was() -> None:
    table = FakeProcesses()
    one, clock = attributor(table)
    one.attribute(reading(p100=1000, p202=4000))
    del table.tree[202]  # the driver lists it still: its memory is on its way back
    table.tree[203] = 201
    for seconds in (0, REFRESH_S):
        clock.advance(seconds)
        seen = one.attribute(reading(p100=1000, p202=4000, p203=500))
        assert seen.consumers == {"mvoice": 1000, "ollama": 4500}


def test_another_process_under_the_same_number_is_another_one() -> None:
    table = FakeProcesses()
    one, _ = attributor(table)
    one.attribute(reading(p100=1000, p202=4000))
    table.tree[202], table.births[202], table.names[202] = 1, 9000, "game"
    seen = one.attribute(reading(p100=1000, p202=4000))
    assert seen.consumers == {"mvoice": 1000, "ollama": 0}
    assert seen.foreign == (GpuProcess(202, 4000, "game"),)


def test_another_process_under_the_number_of_one_that_listened_is_not_the_consumer() -> None:
    table = FakeProcesses()
    one, _ = attributor(table)
    one.attribute(reading(p100=1000, p202=4000))
    table.births[100] = 9000
    del table.listening["127.0.0.1", 8766]
    assert one.attribute(reading(p100=1000)).consumers == {"ollama": 0}


def test_one_that_was_started_again_is_known_by_its_new_process() -> None:
    table = FakeProcesses()
    one, _ = attributor(table)
    one.attribute(reading(p100=1000))
    table.tree[101] = 1
    table.listening["127.0.0.1", 8766] = (101,)
    assert one.attribute(reading(p101=1200)).consumers == {"mvoice": 1200, "ollama": 0}


@pytest.mark.parametrize("url", ["http://192.0.2.1:8766", "http://gpu.example.org:8766"])
def test_a_consumer_of_another_machine_has_no_process_here(url: str) -> None:
    table = FakeProcesses()
    table.listening["192.0.2.1", 8766] = (100,)
    consumers = ConsumerProcesses(config(far=url), table)
    assert consumers.find() == {}
    assert consumers.of("far") == ()


def test_on_the_real_machine() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            port, child = map(int, server.stdout.readline().split())
            table = SystemProcesses()
            consumers = ConsumerProcesses(config(it=f"http://127.0.0.1:{port}"), table)
            assert consumers.of("it") == (server.pid,)
            contained = ContainedConsumers(config(), consumers, table)
            one = Attributor(consumers, contained, table, SystemClock())
            found = one.attribute(reading(**{f"p{child}": 3000, f"p{os.getpid()}": 20}))
            assert found.consumers == {"it": 3000}
            assert found.pids == {"it": (child,)}
            assert [(each.pid, each.mib) for each in found.foreign] == [(os.getpid(), 20)]
        finally:
            server.stdin.close()
    assert table.ancestry(server.pid) == ()
    assert (table.name(server.pid), table.cgroup(server.pid)) == ("", "")
