"""Whose a process in a container is: by its network, docker-proxy's command line, or the engine."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import yaml

from gpumanager.clock import SystemClock
from gpumanager.config import Config, parse_config
from gpumanager.gpu.attribution import REFRESH_S, Attributor
from gpumanager.gpu.containers import ContainedConsumers, Resolver
from gpumanager.host import engine as engine_socket
from gpumanager.host.errors import ReclaimFailed
from gpumanager.host.processes import ConsumerProcesses, Network, SystemProcesses
from gpumanager.model import GpuProcess, Holdings
from tests.gpu.test_attribution import FakeProcesses, attributor, config, reading
from tests.support.in_namespaces import OWN_PIDS, running_inside

OLLAMAS = Network(frozenset({"172.18.0.3", "fd00::3"}), frozenset({11434}))
SPEECHS = Network(frozenset({"172.18.0.4"}), frozenset({8880, 11434}))
COMPOSE = {"ollama": {"172.18.0.3"}, "speech": {"172.18.0.4"}}

IN_A_NETWORK_OF_ITS_OWN = """
import fcntl, socket, struct, sys
SIOCSIFFLAGS, SIOCSIFADDR, IFF_UP = 0x8914, 0x8916, 1
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
    address = struct.pack("<HH4s8x", socket.AF_INET, 0, socket.inet_aton("10.213.77.2"))
    fcntl.ioctl(control, SIOCSIFADDR, struct.pack("16s16s", b"lo", address))
    fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
server = socket.create_server(("0.0.0.0", 7341))
print("listens", flush=True)
sys.stdin.read()
"""


def composed() -> tuple[FakeProcesses, Config]:
    """A broker with the host's PID namespace, beside two services of a compose file."""
    table = FakeProcesses()
    table.listening = {}
    table.tree.update({400: 1, 401: 400, 500: 1})
    table.networks = {401: OLLAMAS, 400: OLLAMAS, 500: SPEECHS}
    return table, config(ollama="http://ollama:11434", speech="http://speech:8880")


def test_a_name_is_resolved_and_found_in_a_processs_own_network() -> None:
    table, it = composed()
    one, _ = attributor(table, it, COMPOSE)
    assert one.attribute(reading(p401=4000, p500=1500, p300=70)) == Holdings(
        {"ollama": 4000, "speech": 1500},
        {"ollama": (401,), "speech": (500,)},
        (GpuProcess(300, 70, "game"),),
    )


def test_one_that_was_found_here_once_holds_nothing_when_it_is_not_on_the_card() -> None:
    table, it = composed()
    one, _ = attributor(table, it, COMPOSE)
    assert one.attribute(reading(p401=4000)).consumers == {"ollama": 4000}  # speech: who knows
    assert one.attribute(reading(p300=70)).consumers == {"ollama": 0}


def test_a_name_that_is_not_here_is_not_known_to_hold_nothing() -> None:
    table, it = composed()
    table.networks = {}
    one, _ = attributor(table, it, COMPOSE)
    assert one.attribute(reading(p401=4000)).consumers == {}


@pytest.mark.parametrize("answer", [{"192.0.2.9"}, {"127.0.1.1"}, set()])
def test_this_network_itself_is_nobodys_container(answer: set[str]) -> None:
    table, it = composed()
    table.networks = {}  # they all have this process's own
    one, _ = attributor(table, it, {"ollama": answer})
    assert one.attribute(reading(p401=4000)).foreign == (GpuProcess(401, 4000, "python"),)


def test_two_consumers_in_one_network_with_a_process_each() -> None:
    table, it = composed()
    pod = Network(frozenset({"172.18.0.3"}), frozenset({11434, 8880}))
    table.networks = {401: pod}
    one, _ = attributor(table, it, {"ollama": {"172.18.0.3"}, "speech": {"172.18.0.3"}})
    assert one.attribute(reading(p401=4000)) == Holdings()  # somebody's, but whose?


def test_docker_proxy_tells_where_it_forwards_to() -> None:
    table = FakeProcesses()
    table.names[200] = "docker-proxy"
    table.commands[200] = (
        *("/usr/bin/docker-proxy", "-proto", "tcp", "-host-ip", "0.0.0.0", "-host-port", "11434"),
        *("-container-ip", "172.18.0.3", "-container-port", "11434"),
    )
    table.tree[401] = 1
    table.networks[401] = OLLAMAS
    one, clock = attributor(table)
    assert one.attribute(reading(p401=4000)).consumers == {"mvoice": 0, "ollama": 4000}
    clock.advance(REFRESH_S)
    assert one.attribute(reading(p100=10)).consumers == {"mvoice": 10, "ollama": 0}


@pytest.mark.parametrize(
    "command",
    [(), ("docker-proxy", "-container-ip"), ("docker-proxy", "-container-ip", "a", "-x", "1")],
)
def test_another_front_tells_nothing(command: tuple[str, ...]) -> None:
    table = FakeProcesses()
    table.names[200] = "docker-proxy"
    table.commands[200] = command
    one, _ = attributor(table)
    assert one.attribute(reading(p100=10)).consumers == {"mvoice": 10}


# -- the engine ----------------------------------------------------------------------------------


class Engine:
    """In the place of the container engine's socket."""

    def __init__(self, answer: Mapping[str, Any] | str) -> None:
        self.answer = answer
        self.asked: list[tuple[str, str | None]] = []

    def inspect(self, container: str, socket_path: str | None) -> Mapping[str, Any]:
        self.asked.append((container, socket_path))
        if isinstance(self.answer, str):
            raise ReclaimFailed(self.answer)
        return self.answer


def contained_config(**keys: Any) -> Config:
    ollama = {"url": "http://127.0.0.1:11434", **keys}
    return parse_config(yaml.safe_dump({"consumers": {"ollama": ollama}}))


@pytest.mark.parametrize(
    ("keys", "asked"),
    [
        ({"container": "llm"}, ("llm", None)),
        ({"evict": [{"container": "llm", "socket": "/run/x.sock"}]}, ("llm", "/run/x.sock")),
        ({"container": "llm", "evict": [{"container": "other"}]}, ("llm", None)),
    ],
)
def test_the_engine_tells_the_main_process(
    keys: Mapping[str, Any], asked: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine({"State": {"Pid": 400}})
    monkeypatch.setattr(engine_socket, "inspect", engine.inspect)
    table = FakeProcesses()
    table.listening = {}
    table.tree.update({400: 1, 401: 400})
    one, clock = attributor(table, contained_config(**keys))
    assert one.attribute(reading(p401=4000)).consumers == {"ollama": 4000}
    clock.advance(REFRESH_S)
    assert one.attribute(reading(p300=10)).consumers == {"ollama": 0}
    assert engine.asked == [asked]  # once, while that process lives
    del table.tree[400]
    clock.advance(REFRESH_S)
    one.attribute(reading(p300=10))
    assert engine.asked == [asked, asked]


@pytest.mark.parametrize(
    "answer",
    ["no socket", {}, {"State": {}}, {"State": {"Pid": 0}}, {"State": {"Pid": 9999}}, {"State": 1}],
)
def test_an_engine_that_does_not_tell(
    answer: Mapping[str, Any] | str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(engine_socket, "inspect", Engine(answer).inspect)
    table = FakeProcesses()
    table.listening = {}
    one, clock = attributor(table, contained_config(container="llm"))
    for _ in range(2):
        assert one.attribute(reading(p300=10)).consumers == {}
        clock.advance(REFRESH_S)
    told = [each for each in caplog.records if each.message == "container not looked up"]
    assert len(told) == (1 if isinstance(answer, str) else 0)


# -- names ---------------------------------------------------------------------------------------


def test_a_resolver_that_hangs_holds_nobody_up() -> None:
    answered = threading.Event()

    def slow(host: str) -> set[str]:
        assert answered.wait(10)
        return {"172.18.0.3"}

    resolver = Resolver(slow, wait_s=0.01)
    assert resolver.addresses({"ollama"}) == {"ollama": frozenset()}
    assert resolver.addresses({"ollama"}) == {"ollama": frozenset()}
    assert sum(thread.name == "resolver" for thread in threading.enumerate()) == 1
    answered.set()
    next(thread for thread in threading.enumerate() if thread.name == "resolver").join(10)
    assert resolver.addresses({"ollama"}) == {"ollama": {"172.18.0.3"}}


def test_the_systems_resolver() -> None:
    found = Resolver(wait_s=10).addresses({"localhost", "nobody.invalid", "a..b"})
    assert "127.0.0.1" in found["localhost"]
    assert found["nobody.invalid"] == found["a..b"] == frozenset()


# -- the machine ---------------------------------------------------------------------------------


def test_a_real_network_namespace() -> None:
    table = SystemProcesses()
    with running_inside(IN_A_NETWORK_OF_ITS_OWN, "-Urn") as (pid, said):
        assert said == "listens"
        there, here = table.network(pid), table.network(os.getpid())
        assert there == Network(frozenset({"10.213.77.2"}), frozenset({7341}))
        assert "10.213.77.2" not in here.addresses
        it = config(far="http://speech.test:7341")
        resolver = Resolver(lambda host: {"10.213.77.2"}, wait_s=10)
        found = ContainedConsumers(it, ConsumerProcesses(it, table), table, resolver).find(())
        assert found.places["far"].is_in(there)
        assert not found.places["far"].is_in(here)
        assert table.command(pid)[0] == sys.executable
    assert table.network(pid) == Network()
    assert table.command(pid) == ()


def test_a_container_with_processes_and_a_network_of_its_own() -> None:
    """By the number that the driver and the broker know it by, outside."""
    table = SystemProcesses()
    with running_inside(IN_A_NETWORK_OF_ITS_OWN, "-n", *OWN_PIDS) as (pid, said):
        assert said == "listens"
        it = config(far="http://speech.test:7341", mvoice="http://127.0.0.1:1")
        resolver = Resolver(lambda host: {"10.213.77.2"}, wait_s=10)
        consumers = ConsumerProcesses(it, table)
        contained = ContainedConsumers(it, consumers, table, resolver)
        one = Attributor(consumers, contained, table, SystemClock())
        seen = one.attribute(reading(**{f"p{pid}": 4000, f"p{os.getpid()}": 20}))
        assert seen.reason == ""
        assert (seen.consumers, seen.pids) == ({"far": 4000}, {"far": (pid,)})
        assert [each.pid for each in seen.foreign] == [os.getpid()]


def test_the_engines_answer_is_read(tmp_path: Any) -> None:
    from tests.host.test_engine import Engine as UnixEngine

    path = str(tmp_path / "docker.sock")
    with UnixEngine(path) as engine:
        thread = threading.Thread(target=engine.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            engine.status, engine.body = 200, json.dumps({"State": {"Pid": 7}}).encode()
            assert engine_socket.inspect("llm", path) == {"State": {"Pid": 7}}
            engine.body = b"[]"
            assert engine_socket.inspect("llm", path) == {}
            engine.status, engine.body = 404, b'{"message": "No such container: llm"}'
            with pytest.raises(ReclaimFailed, match="container llm, inspect: 404 No such"):
                engine_socket.inspect("llm", path)
            assert engine.asked[0] == "/v1.24/containers/llm/json"
        finally:
            engine.shutdown()
            thread.join(5)
