"""Process numbers that are not what they seem: those of another PID namespace, and those that were
another process's before. In real namespaces, with real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpumanager.gpu.simulated import SimulatedCard
from tests.support.families import family
from tests.support.in_namespaces import OWN_PIDS, run_inside

MIB = 3000
ELSEWHERE = "the card's processes are outside this PID namespace"

pytestmark = pytest.mark.timeout(60)

BROKER = """
import json, os, socket, subprocess, sys
import yaml
from gpumanager.clock import SystemClock
from gpumanager.config import parse_config
from gpumanager.gpu.attribution import Attributor
from gpumanager.gpu.containers import ContainedConsumers
from gpumanager.gpu.device import GpuMemory, SimulatedMemory
from gpumanager.gpu.simulated import SimulatedCard
from gpumanager.host.processes import ConsumerProcesses, SystemProcesses
from gpumanager.model import GpuProcess, MemoryReading

def attributor(port):
    it = parse_config(yaml.safe_dump({"consumers": {"it": {"url": f"http://127.0.0.1:{port}"}}}))
    table = SystemProcesses()
    consumers = ConsumerProcesses(it, table)
    return Attributor(consumers, ContainedConsumers(it, consumers, table), table, SystemClock())

def reading(*pids):
    return MemoryReading(20000, 9000, 11000, processes=tuple(GpuProcess(pid, 3000) for pid in pids))

def told(holdings):
    foreign = [[each.pid, each.mib, each.name] for each in holdings.foreign]
    return [dict(holdings.consumers), foreign, holdings.reason]
"""

HOST_PIDS = f"""{BROKER}
server = socket.create_server(("127.0.0.1", 0))
port = server.getsockname()[1]
outside = [int(word) for word in sys.argv[1:]]
others = [subprocess.Popen(["sleep", "30"]) for _ in range(3)]
mine = [os.getpid(), *(each.pid for each in others)]
print(json.dumps([
    mine,
    told(attributor(port).attribute(reading(*outside))),
    told(attributor(port).attribute(reading(mine[0], *outside))),
    told(attributor(port).attribute(reading(*mine))),
    told(attributor(port).attribute(reading())),
]))
for each in others:
    each.kill()
"""

TRANSLATED = f"""{BROKER}
server = socket.create_server(("127.0.0.1", 0))
port = server.getsockname()[1]
subprocess.run(["mount", "-t", "tmpfs", "none", "/mnt"], check=True)
subprocess.run(["mount", "--move", "/mnt", "/dev"], check=True)
open("/dev/nvidia0", "w").close()
held = open("/dev/nvidia0")
other = subprocess.Popen(["sleep", "30"])
print(json.dumps([
    told(attributor(port).attribute(reading(os.getpid()))),
    told(attributor(port).attribute(reading(os.getpid(), other.pid))),
]))
other.kill()
"""

SIMULATED = f"""{BROKER}
server = socket.create_server(("127.0.0.1", 0))
card = SimulatedCard.create(sys.argv[1] + "/inside.json", 20000)
card.allocate("it", 3000)
memory = GpuMemory(
    SimulatedMemory(str(card.path)), SystemClock(), attributor(server.getsockname()[1])
)
print(json.dumps(told(memory.read().holdings)))
"""

REUSED = f"""{BROKER}
import signal
from gpumanager.residency.release import judge

card = SimulatedCard.create(sys.argv[1] + "/inside.json", 20000)
ready, tell = os.pipe()

def start(role, pid=None):
    # A new process, which has that number.
    if pid is not None:
        with open("/proc/sys/kernel/ns_last_pid", "w") as last:
            last.write(str(pid - 1))
    started = os.fork()
    if not started:
        if role == "server":
            server = socket.create_server(("127.0.0.1", 0))
            os.write(tell, b"%5d" % server.getsockname()[1])
        card.allocate(role, 3000)
        os.write(tell, b"ready")
        while True:
            signal.pause()
    if role == "server":
        port = int(os.read(ready, 5))
    assert os.read(ready, 5) == b"ready"
    return (started, port) if role == "server" else started

def end(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)

try:
    open("/proc/sys/kernel/ns_last_pid", "w").close()
except OSError as error:
    print(json.dumps(str(error)))
    sys.exit()
pid, port = start("server")
memory = GpuMemory(SimulatedMemory(str(card.path)), SystemClock(), attributor(port))
before = memory.read()
end(pid)
assert start("game", pid) == pid
after = memory.read()
release = judge("it", before, after, 3000)
print(json.dumps([pid, told(before.holdings), told(after.holdings), release.outcome, release.mib]))
end(pid)
"""


def test_a_broker_in_a_container_whose_driver_tells_the_hosts_pids(tmp_path: Path) -> None:
    card = SimulatedCard.create(tmp_path / "card.json", 20_000)
    with family("forked", card.path, MIB) as server:
        outside = [str(server.holder()), str(server.holder())]
        mine, unknown, mixed, valid, nothing = run_inside(HOST_PIDS, *outside)
    assert 1 in mine  # as a container's main process
    for told in (unknown, mixed, valid):  # valid: they happen to be somebody's here, too
        assert told == [{}, [], ELSEWHERE]
    assert nothing == [{}, [], "9000 MiB are in use, but no process shows"]


def test_a_driver_that_tells_the_pids_of_the_container() -> None:
    own, strange = run_inside(TRANSLATED, options=("-m", *OWN_PIDS))
    assert own == [{"it": MIB}, [], ""]
    assert strange == [{}, [], ELSEWHERE]  # a process that does not use the card is not meant


def test_a_simulated_cards_pids_are_those_of_its_own_namespace(tmp_path: Path) -> None:
    assert run_inside(SIMULATED, str(tmp_path)) == [{"it": MIB}, [], ""]


def test_a_pid_that_is_another_process_now(tmp_path: Path) -> None:
    told = run_inside(REUSED, str(tmp_path))
    if isinstance(told, str):
        pytest.skip(f"pids cannot be chosen here: {told}")
    pid, before, after, outcome, mib = told
    assert before == [{"it": MIB}, [], ""]
    assert after[0] == {}
    assert [row[:2] for row in after[1]] == [[pid, MIB]]
    # The server's memory came back, and the one under its pid has taken it.
    assert (outcome, mib) == ("stolen", MIB)
