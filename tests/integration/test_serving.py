"""The broker as its own process, under plain waitress-serve and under its own command."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import requests

from tests.support.broker import config_for
from tests.support.ports import free_port
from tests.support.sockets import RawClient, ScriptedConsumer
from tests.support.threads import PATIENCE_S, Outcome, eventually

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent


class Process:
    def __init__(self, popen: subprocess.Popen[str], port: int, log: Path) -> None:
        self.popen = popen
        self.port = port
        self.log = log

    def get(self, path: str) -> requests.Response:
        return requests.get(f"http://127.0.0.1:{self.port}{path}", timeout=PATIENCE_S)

    def post(self, path: str) -> requests.Response:
        return requests.post(f"http://127.0.0.1:{self.port}{path}", b"{}", timeout=PATIENCE_S)

    def up(self) -> bool:
        if self.popen.poll() is not None:
            raise RuntimeError(f"it ended with {self.popen.returncode}: {self.log.read_text()}")
        try:
            return self.get("/healthz").status_code == 200
        except requests.ConnectionError:
            return False

    def waiting(self) -> int:
        return int(self.get("/v1/status").json()["scheduler"]["queue_depth"])


@contextmanager
def serving(tmp_path: Path, how: str, config: str, port: int) -> Iterator[Process]:
    file = tmp_path / "broker.yaml"
    file.write_text(config)
    command = {
        "waitress-serve": [str(BIN / "waitress-serve"), "wsgi:app"],
        "waitress-serve, flags": [
            *(str(BIN / "waitress-serve"), f"--listen=127.0.0.1:{port}", "--threads=9"),
            "wsgi:app",
        ],
        "gpumanager serve": [str(BIN / "gpumanager"), "serve", "--config", str(file)],
    }[how]
    log = tmp_path / "log"
    with log.open("w") as stderr:
        popen = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "GPUMANAGER_CONFIG": str(file)},
            stdout=stderr,
            stderr=stderr,
            text=True,
        )
        try:
            process = Process(popen, port, log)
            eventually(process.up, 20)
            yield process
        finally:
            popen.kill()
            popen.wait(10)


WAYS = ["waitress-serve", "gpumanager serve"]


@pytest.mark.parametrize("how", [*WAYS, "waitress-serve, flags"])
def test_it_serves_its_listen_address_unless_flags_say_otherwise(
    tmp_path: Path, held_consumer: ScriptedConsumer, release: threading.Event, how: str
) -> None:
    port = free_port()
    listen = "127.0.0.1:1" if "flags" in how else f"127.0.0.1:{port}"
    release.set()
    with serving(tmp_path, how, config_for(held_consumer.url, listen=listen), port) as process:
        assert process.post("/v1/tts").json() == {"done": True}
        status = process.get("/v1/status").json()
        assert status["scheduler"]["total_jobs"] == 1
        assert status["config_file"] == str(tmp_path / "broker.yaml")
        assert status["gpu"]["device"] == 0
        threads = len(list(Path(f"/proc/{process.popen.pid}/task").iterdir()))
        assert threads < 40  # the others come when they are needed


@pytest.mark.parametrize("how", [*WAYS, "waitress-serve, flags"])
def test_it_listens_on_a_consumers_port_too(
    tmp_path: Path, held_consumer: ScriptedConsumer, release: threading.Event, how: str
) -> None:
    port, own = free_port(), free_port()
    release.set()
    config = config_for(held_consumer.url, listen=f"127.0.0.1:{port}", ports={own: "mvoice"})
    with serving(tmp_path, how, config, port) as process:
        found = requests.get(f"http://127.0.0.1:{own}/any", timeout=PATIENCE_S)
        assert found.json() == {"done": True}
        assert held_consumer.requests[-1].line == b"GET /any HTTP/1.1"
        assert process.post("/v1/tts").json() == {"done": True}
        process.popen.terminate()
        assert process.popen.wait(PATIENCE_S) == 0


@pytest.mark.parametrize("how", WAYS)
def test_a_consumers_port_that_is_taken_is_told(
    tmp_path: Path, held_consumer: ScriptedConsumer, how: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        listen = f"127.0.0.1:{free_port()}"
        config = config_for(held_consumer.url, listen=listen, ports={port: "mvoice"})
        with (
            pytest.raises(RuntimeError, match="it ended with 2") as ended,
            serving(tmp_path, how, config, 1),
        ):
            pass
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in str(ended.value)
    assert "Traceback" not in str(ended.value)


@pytest.mark.parametrize("how", WAYS)
def test_the_control_plane_answers_while_the_line_is_full(
    tmp_path: Path, held_consumer: ScriptedConsumer, release: threading.Event, how: str
) -> None:
    port = free_port()
    config = config_for(
        held_consumer.url,
        listen=f"127.0.0.1:{port}",
        scheduler={"kind": "locked", "max_queue": 40, "max_wait": 60},
    )
    with serving(tmp_path, how, config, port) as process:
        clients = [Outcome(lambda: process.post("/v1/tts")) for _ in range(41)]
        eventually(lambda: process.waiting() == 40)
        assert process.get("/healthz").json() == {"status": "ok"}
        refused = process.post("/v1/tts")
        assert (refused.status_code, refused.json()["error"]) == (503, "queue_full")
        release.set()
        assert {client.result().status_code for client in clients} == {200}


@pytest.mark.parametrize("how", WAYS)
def test_a_client_that_leaves_is_noticed_within_a_second(
    tmp_path: Path, held_consumer: ScriptedConsumer, how: str
) -> None:
    port = free_port()
    config = config_for(held_consumer.url, listen=f"127.0.0.1:{port}")
    with (
        serving(tmp_path, how, config, port) as process,
        RawClient(port) as running,
        RawClient(port) as waiting,
    ):
        running.request("POST", "/v1/tts", b"{}")
        eventually(lambda: held_consumer.requests)
        waiting.request("POST", "/v1/tts", b"{}")
        eventually(lambda: process.waiting() == 1)
        waiting.sock.close()
        eventually(lambda: process.waiting() == 0, 1)
        running.sock.close()
        eventually(lambda: process.get("/v1/status").json()["scheduler"]["in_flight"] == 0, 1)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(
    tmp_path: Path,
    held_consumer: ScriptedConsumer,
    release: threading.Event,
    how: str,
    number: signal.Signals,
) -> None:
    port = free_port()
    config = config_for(held_consumer.url, listen=f"127.0.0.1:{port}", drain_timeout=10)
    with serving(tmp_path, how, config, port) as process:
        running = Outcome(lambda: process.post("/v1/tts"))
        eventually(lambda: held_consumer.requests)
        waiting = Outcome(lambda: process.post("/v1/tts"))
        eventually(lambda: process.waiting() == 1)

        process.popen.send_signal(number)
        turned_away = waiting.result()
        assert (turned_away.status_code, turned_away.json()["error"]) == (503, "shutting_down")
        assert int(turned_away.headers["Retry-After"]) >= 1
        assert process.get("/healthz").json() == {"status": "draining"}
        assert process.post("/v1/tts").json()["error"] == "shutting_down"

        release.set()
        assert running.result().json() == {"done": True}
        assert process.popen.wait(10) == 0
        assert len(held_consumer.requests) == 1


@pytest.mark.parametrize("how", WAYS)
def test_an_idle_broker_ends_at_once(
    tmp_path: Path, held_consumer: ScriptedConsumer, how: str
) -> None:
    port = free_port()
    with serving(
        tmp_path, how, config_for(held_consumer.url, listen=f"127.0.0.1:{port}"), port
    ) as process:
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(5) == 0


def test_a_second_signal_ends_it_at_once(tmp_path: Path, held_consumer: ScriptedConsumer) -> None:
    port = free_port()
    config = config_for(held_consumer.url, listen=f"127.0.0.1:{port}", drain_timeout=60)
    with serving(tmp_path, "gpumanager serve", config, port) as process:
        client = RawClient(port).request("POST", "/v1/tts", b"{}")
        eventually(lambda: held_consumer.requests)
        process.popen.send_signal(signal.SIGTERM)
        eventually(lambda: process.get("/healthz").status_code == 503)
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(5) == 128 + signal.SIGTERM
        client.sock.close()


def test_the_first_signal_after_a_drain_by_a_call_lets_the_running_job_finish(
    tmp_path: Path, held_consumer: ScriptedConsumer, release: threading.Event
) -> None:
    port = free_port()
    config = config_for(held_consumer.url, listen=f"127.0.0.1:{port}", drain_timeout=20)
    with serving(tmp_path, "gpumanager serve", config, port) as process:
        running = Outcome(lambda: process.post("/v1/tts"))
        eventually(lambda: held_consumer.requests)
        boot = process.get("/v1/events").json()["boot"]
        assert process.post(f"/v1/drain?boot={boot}").status_code == 202
        process.popen.send_signal(signal.SIGTERM)  # as `systemctl stop` does after `drain`
        with pytest.raises(subprocess.TimeoutExpired):
            process.popen.wait(0.5)
        release.set()
        assert running.result().json() == {"done": True}
        assert process.popen.wait(10) == 0


def test_a_job_that_outlasts_the_drain_is_cut_off(
    tmp_path: Path, held_consumer: ScriptedConsumer
) -> None:
    port = free_port()
    config = config_for(held_consumer.url, listen=f"127.0.0.1:{port}", drain_timeout=0.2)
    with serving(tmp_path, "gpumanager serve", config, port) as process:
        with RawClient(port) as client:
            client.request("POST", "/v1/tts", b"{}")
            eventually(lambda: held_consumer.requests)
            process.popen.send_signal(signal.SIGTERM)
            assert process.popen.wait(15) == 0
        assert "finished=false" in process.log.read_text()


@pytest.mark.parametrize("how", WAYS)
def test_a_bad_config_starts_nothing(tmp_path: Path, how: str) -> None:
    with (
        pytest.raises(RuntimeError, match="it ended with 2") as ended,
        serving(tmp_path, how, "listen: nowhere\nrooting: {}\n", free_port()),
    ):
        pass
    assert "line 1" in str(ended.value)
    assert "line 2" in str(ended.value)
    assert "routing" in str(ended.value)
    assert "Traceback" not in str(ended.value)


def test_an_address_that_is_taken_is_told(tmp_path: Path, held_consumer: ScriptedConsumer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        file = tmp_path / "broker.yaml"
        file.write_text(config_for(held_consumer.url, listen=f"127.0.0.1:{taken.getsockname()[1]}"))
        ended = subprocess.run(
            [str(BIN / "gpumanager"), "serve", "--config", str(file)],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    assert ended.returncode == 1
    assert "cannot listen" in ended.stderr
    name = psutil.Process().name()
    assert f'taken_by="{name} (pid {os.getpid()})"' in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("shape", ["logfmt", "json"])
def test_one_structured_line_a_request(
    tmp_path: Path, held_consumer: ScriptedConsumer, release: threading.Event, shape: str
) -> None:
    port = free_port()
    release.set()
    config = config_for(held_consumer.url, listen=f"127.0.0.1:{port}", log={"format": shape})
    with serving(tmp_path, "gpumanager serve", config, port) as process:
        requests.post(
            f"http://127.0.0.1:{port}/v1/tts",
            b"{}",
            headers={"X-Request-Id": "one-of-many"},
            timeout=PATIENCE_S,
        )
        eventually(lambda: "one-of-many" in process.log.read_text())
        (line,) = [x for x in process.log.read_text().splitlines() if "one-of-many" in x]
    names = ("method", "path", "status", "ms", "consumer", "wait_ms", "run_ms", "request_id")
    if shape == "json":
        fields = json.loads(line)
        assert set(names) <= set(fields)
        assert (fields["msg"], fields["status"], fields["path"]) == ("request", 200, "/v1/tts")
    else:
        for name in names:
            assert f" {name}=" in line
        assert " msg=request " in line
