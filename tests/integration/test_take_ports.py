"""`gpumanager setup --take-ports`: the broker listens in the place of a server, which moves."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pexpect
import psutil
import pytest
import requests
from click.testing import CliRunner, Result

from gpumanager.cli.group import main
from gpumanager.config import Config, load_config
from gpumanager.gpu.simulated import SimulatedCard
from gpumanager.host.processes import SystemProcesses
from tests.support.box import Box, is_up
from tests.support.fake_servers import ROOT, Running, command, fake_server
from tests.support.ports import free_port
from tests.support.threads import PATIENCE_S, eventually

pytestmark = pytest.mark.timeout(90)

UNITS = "/user.slice/user-1000.slice/user@1000.service/app.slice/"


class Units:
    """A user's box with systemd, and a server in a unit of the user's own."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home = home
        self.box = Box(home, {})
        self.box.with_systemd()
        self.box.environ |= {"PATH": f"{home / 'bin'}:{os.environ['PATH']}"}
        for key in ("HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "SYSTEMCTL_LOG", "PATH"):
            monkeypatch.setenv(key, self.box.environ[key])
        self.cgroups: dict[int, str] = {}
        real = SystemProcesses.cgroup
        monkeypatch.setattr(
            SystemProcesses, "cgroup", lambda table, pid: self.cgroups.get(pid) or real(table, pid)
        )
        self.card = SimulatedCard.create(home / "card.json", 12_000)
        self.units = home / "config" / "systemd" / "user"

    def start(self, kind: str, port: int, unit: str, *options: str, script: str = "") -> None:
        """Have the stand-in for systemd run a server at a port."""
        words = [*command(kind, self.card.path, kind, 4000, port), "detached", *options]
        self.units.mkdir(parents=True)
        (self.units / unit).write_text(f"[Service]\nExecStart={script}{shlex.join(words)}\n")
        self.systemctl("restart", unit)
        eventually(lambda: is_up(f"http://127.0.0.1:{port}/"), 30)
        self.cgroups[self.pid(unit)] = UNITS + unit

    def systemctl(self, *words: str) -> None:
        own = str(self.home / "bin" / "systemctl")
        subprocess.run([own, "--user", *words], check=True, cwd=ROOT)

    def pid(self, unit: str) -> int:
        return int((self.home / f"{unit}.pid").read_text())

    def setup(self, port: int, *words: str) -> Result:
        listen = f"127.0.0.1:{self.box.port}"
        args = ["setup", "--yes", "--ports", str(port), "--listen", listen, *words]
        return CliRunner().invoke(main, args)

    def config(self) -> Config:
        return load_config(str(self.box.config))

    def close(self) -> None:
        for file in self.home.glob("*.pid"):
            process = psutil.Process(int(file.read_text()))
            process.kill()
            process.wait(10)
        self.box.close()


@pytest.fixture
def units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Units]:
    monkeypatch.chdir(ROOT)  # where the units' servers find their modules
    it = Units(tmp_path, monkeypatch)
    yield it
    it.close()


def chat(url: str) -> int:
    return requests.post(f"{url}/api/chat", json={"model": "m"}, timeout=PATIENCE_S).status_code


def jobs(broker: str) -> Any:
    found = requests.get(f"{broker}/v1/status", timeout=PATIENCE_S).json()
    return found["scheduler"]["total_jobs"]


def test_a_users_unit_moves_aside_and_its_clients_notice_nothing(units: Units) -> None:
    port = free_port()
    units.start("ollama", port, "ollama.service")
    done = units.setup(port, "--take-ports")
    assert done.exit_code == 0, done.output
    config = units.config()
    assert dict(config.ports) == {port: "ollama"}
    to = int(config.consumers["ollama"].url.rpartition(":")[2])
    assert to > port
    drop_in = units.units / "ollama.service.d" / "gpumanager.conf"
    assert f"\n[Service]\nEnvironment=OLLAMA_HOST=127.0.0.1:{to}\n" in drop_in.read_text()
    assert f"+  {port}: ollama" in done.output
    assert f"{drop_in} will move it to port {to}; ollama.service will be restarted" in done.output
    assert chat(f"http://127.0.0.1:{port}") == 200
    assert jobs(units.box.url) == 1
    assert chat(f"http://127.0.0.1:{to}") == 200
    assert jobs(units.box.url) == 1
    # Once more there is nothing to do: who answers at the port is the broker now.
    server = units.pid("ollama.service")
    again = units.setup(port, "--take-ports")
    assert again.exit_code == 0, again.output
    assert "nothing to add" in again.output
    assert units.pid("ollama.service") == server
    assert units.config() == config


def test_the_way_back_is_as_documented(units: Units) -> None:
    port = free_port()
    units.start("ollama", port, "ollama.service")
    assert units.setup(port, "--take-ports").exit_code == 0
    to = units.config().consumers["ollama"].url.rpartition(":")[2]
    text = units.box.config.read_text()
    text = text.replace(f"ports:\n  {port}: ollama    # it listens on {to}\n", "")
    units.box.config.write_text(text.replace(to, str(port)))
    assert not units.config().ports
    units.systemctl("restart", "gpumanager.service")
    (units.units / "ollama.service.d" / "gpumanager.conf").unlink()
    units.systemctl("daemon-reload")
    units.systemctl("restart", "ollama.service")
    eventually(lambda: is_up(f"http://127.0.0.1:{port}/"), 30)
    found = requests.get(f"http://127.0.0.1:{port}/api/version", timeout=PATIENCE_S)
    assert "X-Request-Id" not in found.headers
    eventually(lambda: is_up(f"{units.box.url}/healthz"), 30)
    eventually(lambda: chat(units.box.url) == 200, 30)  # once it was probed there
    assert "nothing to add" in units.setup(port).output


def test_a_unit_gets_its_port_by_a_word_of_its_command(units: Units) -> None:
    port = free_port()
    units.start("comfyui", port, "comfyui.service", "--port", str(port))
    done = units.setup(port, "--take-ports")
    assert done.exit_code == 0, done.output
    to = int(units.config().consumers["comfyui"].url.rpartition(":")[2])
    text = (units.units / "comfyui.service.d" / "gpumanager.conf").read_text()
    assert "\nExecStart=\nExecStart=" in text
    assert text.endswith(f"--port {to}\n")
    stats = requests.get(f"http://127.0.0.1:{port}/system_stats", timeout=PATIENCE_S)
    assert stats.headers["X-Request-Id"]


def test_a_unit_that_does_not_move_is_as_it_was(units: Units) -> None:
    port = free_port()
    # Its own setting comes last, as one of an EnvironmentFile does.
    units.start("ollama", port, "ollama.service", script=f"env OLLAMA_HOST=127.0.0.1:{port} ")
    units.cgroups[units.pid("ollama.service")] = UNITS + "ollama.service"
    done = units.setup(port, "--take-ports")
    assert done.exit_code == 0, done.output
    assert f"after its restart it still listens on port {port}" in done.output
    assert "systemctl --user edit ollama.service    # OLLAMA_HOST=127.0.0.1:" in done.output
    assert "then, to start the broker: gpumanager setup" in done.output
    assert not list((units.units / "ollama.service.d").iterdir())
    eventually(lambda: is_up(f"http://127.0.0.1:{port}/"), 30)
    assert not units.box.brokers()


def test_a_server_in_a_desktops_unit_is_no_reason_to_restart_that(units: Units) -> None:
    port = free_port()
    units.start("ollama", port, "desktop.service")
    server = units.pid("desktop.service")
    (units.home / "desktop.service.pid").write_text(str(os.getpid()))
    try:
        done = units.setup(port, "--take-ports")
    finally:
        (units.home / "desktop.service.pid").write_text(str(server))
    assert done.exit_code == 0, done.output
    assert f"end process {server}, then start it so: OLLAMA_HOST=127.0.0.1:" in done.output
    assert is_up(f"http://127.0.0.1:{port}/")


# -- without systemd ---------------------------------------------------------------------------


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    with ExitStack() as stack:
        card = SimulatedCard.create(tmp_path / "card.json", 12_000)
        fakes = {"ollama": stack.enter_context(fake_server("ollama", card.path, "ollama", 6000))}
        it = Box(tmp_path, fakes)
        stack.callback(it.close)
        yield it


def stopped(server: Running) -> None:
    process = psutil.Process(server.pid)
    process.kill()
    process.wait(10)


def test_a_process_of_the_users_is_theirs_to_move(box: Box, tmp_path: Path) -> None:
    server = box.fakes["ollama"]
    done = box.setup("--yes", "--take-ports")
    assert done.returncode == 0, done.stdout + done.stderr
    config = load_config(str(box.config))
    assert dict(config.ports) == {server.port: "ollama"}
    to = int(config.consumers["ollama"].url.rpartition(":")[2])
    typed = done.stdout.partition("then start it so: ")[2].splitlines()[0]
    assert typed.startswith(f"OLLAMA_HOST=127.0.0.1:{to} {sys.executable} ")
    assert "then, to start the broker: gpumanager setup\n" in done.stdout
    assert psutil.pid_exists(server.pid)
    assert is_up(f"{server.url}/")
    assert not box.brokers()
    # Nothing changes until it has moved; it is not taken for one more server.
    again = box.setup("--yes")
    assert again.returncode == 0, again.stdout + again.stderr
    assert typed in again.stdout
    assert "nothing to add" in again.stdout
    # As it says.
    stopped(server)
    own = subprocess.Popen(
        ["/bin/sh", "-c", f"exec env {typed} detached"],
        cwd=ROOT,
        start_new_session=True,
    )
    box.own.append(own)
    eventually(lambda: is_up(f"http://127.0.0.1:{to}/"), 30)
    done = box.setup("--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert chat(server.url) == 200
    assert jobs(box.url) == 1


def test_a_running_broker_is_restarted_by_the_words_that_setup_says(box: Box) -> None:
    server = box.fakes["ollama"]
    assert box.setup("--yes").returncode == 0
    (before,) = box.brokers()
    done = box.setup("--yes", "--take-ports")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [each.pid for each in box.brokers()] == [before.pid]  # nothing has moved yet
    assert chat(box.url) == 200
    to = load_config(str(box.config)).consumers["ollama"].url.rpartition(":")[2]
    stopped(server)
    box.own.append(
        subprocess.Popen(
            [*command("ollama", box.home / "card.json", "ollama", 6000, int(to)), "detached"],
            cwd=ROOT,
            start_new_session=True,
        )
    )
    eventually(lambda: is_up(f"http://127.0.0.1:{to}/"), 30)
    done = box.setup("--yes")
    assert done.returncode == 1
    assert "ports" in done.stderr
    assert f"gpumanager drain --url {box.url}, then gpumanager setup" in done.stderr
    assert box.run("drain", "--url", box.url).returncode == 0
    eventually(lambda: not box.brokers(), 20)
    done = box.setup("--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert chat(server.url) == 200
    assert jobs(box.url) == 1


def test_each_place_is_asked_for(box: Box) -> None:
    port = box.fakes["ollama"].port
    words = f"--dry-run --ports {port} --listen 127.0.0.1:{box.port}"
    told = box.run("setup", *words.split())
    assert "Listen on" not in told.stdout
    terminal = pexpect.spawn(
        f"{sys.executable} -m gpumanager setup --no-service --total-mib 12000 --vram ollama=6000 "
        f"--ports {port} --listen 127.0.0.1:{box.port}",
        env=box.environ,
        encoding="utf-8",
        timeout=30,
        dimensions=(50, 300),
    )
    terminal.expect(f"Listen on {port} in the place of ollama, which moves to")
    terminal.sendline("y")
    terminal.expect(f"{port}: ollama")
    terminal.expect("you have to move it")
    terminal.expect("Go ahead")
    terminal.sendline("n")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 1
    assert not box.config.exists()


def test_a_consumer_of_the_config_moves_if_that_is_wanted(box: Box) -> None:
    port = box.fakes["ollama"].port
    box.config.parent.mkdir(parents=True)
    text = (
        f"listen: 127.0.0.1:{box.port}\nrouting: {{llm: mine}}\n"
        f"consumers:\n  mine: {{preset: ollama, url: 'http://localhost:{port}'}}   # by hand\n"
    )
    box.config.write_text(text)
    assert box.setup("--yes", "--no-service").returncode == 0
    assert box.config.read_text() == text
    assert box.setup("--yes", "--no-service", "--no-take-ports").returncode == 0
    assert box.config.read_text() == text
    done = box.setup("--yes", "--no-service", "--take-ports")
    assert done.returncode == 0, done.stdout + done.stderr
    after = box.config.read_text()
    config = load_config(str(box.config))
    assert dict(config.ports) == {port: "mine"}
    to = int(config.consumers["mine"].url.rpartition(":")[2])
    assert after.startswith(text.replace(str(port), str(to)))


def test_a_config_that_cannot_be_changed_says_what_to_write(box: Box) -> None:
    port = box.fakes["ollama"].port
    box.config.parent.mkdir(parents=True)
    text = (
        f"listen: &a 127.0.0.1:{box.port}\nconsumers:\n  it:\n    preset: ollama\n"
        f"    url: >-\n      http://127.0.0.1:{port}\n"
    )
    box.config.write_text(text)
    done = box.setup("--yes", "--take-ports")
    assert done.returncode == 1
    assert f"ports:\n  {port}: it    # it listens on " in done.stdout
    assert "add by hand what stands above" in done.stderr
    assert box.config.read_text() == text
