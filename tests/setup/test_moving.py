"""How a server gets to another port: what setup does by itself, and what it says otherwise."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from gpumanager.config import parse_config
from gpumanager.setup.discovery import Found, Manager, _manager
from gpumanager.setup.moving import Move, free_port, listens, plan, with_port
from gpumanager.setup.services import known_services
from gpumanager.setup.systemd import Scope, Systemd
from gpumanager.setup.taking import Place, held_by_broker, reached_from_outside
from gpumanager.setup.yamledit import with_value
from tests.gpu.test_attribution import FakeProcesses
from tests.support import systemctl
from tests.support.ports import free_port as own_port

SERVICES = {service.service: service for service in known_services()}


@pytest.mark.parametrize(
    ("command", "flag", "after"),
    [
        ("python main.py --port 8188", "--port", "python main.py --port 8189"),
        ("python main.py --port=8188 -x", None, "python main.py --port=8189 -x"),
        ("vllm serve m --api-port '8188'", None, None),
        ("uvicorn app:app -p 8188", None, "uvicorn app:app -p 8189"),
        ("llama-swap --listen 127.0.0.1:8188", None, "llama-swap --listen 127.0.0.1:8189"),
        ("llama-swap --listen :8188", None, "llama-swap --listen :8189"),
        ("python main.py", "--port", "python main.py --port 8189"),
        ("python main.py", None, None),
        ("it --port 81881", None, None),
        ("it --port 8188 --other-port 8188", "--port", None),
        ("it --max-tokens 8188", None, None),
    ],
)
def test_a_command_line_says_where_the_port_stands(
    command: str, flag: str | None, after: str | None
) -> None:
    assert with_port(command, 8188, 8189, flag) == after


def planned(found: Found, table: FakeProcesses, folder: Path, user_id: int = 1000) -> Move:
    environ = {
        "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
        "XDG_CONFIG_HOME": str(folder),
        "SYSTEMCTL_LOG": str(folder / "log"),
    }
    if not (folder / "bin").exists():
        systemctl.install(folder / "bin")

    def systemd(scope: Scope) -> Systemd:
        return Systemd(environ, scope, folder / "etc", user_id)

    return plan("it", found, found.port + 1, table, systemd)


def unit(folder: Path, name: str, command: str, pid: int) -> None:
    (folder / "systemd" / "user").mkdir(parents=True)
    (folder / "systemd" / "user" / name).write_text(f"[Service]\nExecStart={command}\n")
    (folder / f"{name}.pid").write_text(str(pid))


def test_a_systems_unit_is_moved_with_sudo(tmp_path: Path) -> None:
    unit(tmp_path, "ollama.service", "/usr/bin/ollama serve", 200)
    manager = Manager("unit", "ollama.service")
    found = Found(SERVICES["ollama"], 11434, (200,), manager)
    move = planned(found, FakeProcesses(), tmp_path)
    assert move.act is None
    assert move.by_hand == (
        f"sudo mkdir -p {tmp_path}/etc/ollama.service.d",
        "printf '%s\\n' '[Service]' Environment=OLLAMA_HOST=127.0.0.1:11435 | "
        f"sudo tee {tmp_path}/etc/ollama.service.d/gpumanager.conf",
        "sudo systemctl daemon-reload && sudo systemctl restart ollama.service",
    )
    assert planned(found, FakeProcesses(), tmp_path, user_id=0).act is not None


def test_what_another_account_runs_is_looked_for_among_the_units(tmp_path: Path) -> None:

    unit(tmp_path, "ollama.service", "/usr/bin/ollama serve", os.getpid())
    move = planned(Found(SERVICES["ollama"], 11434), FakeProcesses(), tmp_path)
    assert move.by_hand[-1].endswith("sudo systemctl restart ollama.service")
    move = planned(Found(SERVICES["comfyui"], 8188), FakeProcesses(), tmp_path)
    assert move.by_hand == ("start it again with --port 8189",)


def test_a_unit_whose_port_is_not_seen_is_edited_by_hand(tmp_path: Path) -> None:
    unit(tmp_path, "v.service", "/opt/start.sh", 200)
    found = Found(SERVICES["vllm"], 8000, (200,), Manager("unit", "v.service", "user"))
    move = planned(found, FakeProcesses(), tmp_path)
    assert move.act is None
    assert move.by_hand[0].startswith("systemctl --user edit v.service    # port 8001, wherever")


def test_a_containers_port_is_published_elsewhere(tmp_path: Path) -> None:
    table = FakeProcesses()
    table.names[200] = "docker-proxy"
    table.cgroups[200] = "/system.slice/docker.service"
    table.commands[200] = ("docker-proxy", "-host-port", "11500", "-container-port", "11434")
    assert _manager((200,), table) is None  # Docker's own unit is not the server's
    move = planned(Found(SERVICES["ollama"], 11500, (200,)), table, tmp_path)
    assert move.by_hand[0].startswith("docker run … -p 127.0.0.1:11501:11434 …")
    manager = Manager("container", "ab" * 6)
    move = planned(Found(SERVICES["comfyui"], 8188, (300,), manager), table, tmp_path)
    assert f"container {'ab' * 6}" in move.told
    assert '"127.0.0.1:8189:8188"' in move.by_hand[1]
    assert "--port 8189" in move.by_hand[2]
    assert move.act is None


def test_a_process_is_told_as_it_would_be_typed(tmp_path: Path) -> None:
    table = FakeProcesses()
    table.commands[200] = ("python", "my main.py", "--port", "8188")
    move = planned(Found(SERVICES["comfyui"], 8188, (200,)), table, tmp_path)
    assert move.by_hand == ("end process 200, then start it so: python 'my main.py' --port 8189",)
    move = planned(Found(SERVICES["vllm"], 8000, (300,)), table, tmp_path)
    assert move.by_hand == ("start it again with port 8001, wherever its port is set",)


def test_the_next_free_port_is_the_one() -> None:
    port = own_port()
    with socket.create_server(("127.0.0.1", port + 1)):
        assert listens(port + 1)
        assert free_port(port, {port + 2}) > port + 2


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a:\n  b:\n    url: x   # c\n", "a:\n  b:\n    url: new   # c\n"),
        ("{a: {b: {url: 'x'}}}", "{a: {b: {url: 'new'}}}"),
        ('a: {b: {url: "x", z: 1}}\r\n', 'a: {b: {url: "new", z: 1}}\r\n'),
    ],
)
def test_one_value_changes_and_nothing_else(before: str, after: str) -> None:
    assert with_value(before, ("a", "b", "url"), "new") == after


@pytest.mark.parametrize(
    "before",
    [
        "a:\n  b:\n    url: |\n      x\n",
        "a:\n  c: &c {url: x}\n  b: {<<: *c}\n",
        "a:\n  c: {url: &u x}\n  b: {url: *u}\n",
        "a: []\n",
    ],
)
def test_a_value_without_a_place_of_its_own_stays(before: str) -> None:
    with pytest.raises(ValueError, match=r"a\.b\.url"):
        with_value(before, ("a", "b", "url"), "new")


def test_a_server_for_other_machines_is_told_of() -> None:
    config = parse_config("listen: 127.0.0.1:1\n")
    place = Place("it", Found(SERVICES["ollama"], 11434), 11435)
    assert reached_from_outside(place, config, {("0.0.0.0", 11434): (1,)})
    assert not reached_from_outside(place, config, {("127.0.0.1", 11434): (1,), ("::", 9): (2,)})
    open_to_all = parse_config("listen: 0.0.0.0:1\n")
    assert not reached_from_outside(place, open_to_all, {("0.0.0.0", 11434): (1,)})


def test_a_port_that_the_broker_has_is_nobody_elses() -> None:
    to = own_port()
    config = parse_config(
        f"listen: 127.0.0.1:1\nports: {{11434: it}}\n"
        f"consumers: {{it: {{url: 'http://127.0.0.1:{to}'}}}}\n"
    )
    table = FakeProcesses()
    table.listening = {("127.0.0.1", 1): (100,), ("127.0.0.1", 11434): (200,)}
    assert held_by_broker(config, table) == set()
    with socket.create_server(("127.0.0.1", to)):
        assert held_by_broker(config, table) == {11434}
    table.listening["127.0.0.1", 11434] = (100,)
    assert held_by_broker(config, table) == {11434}
