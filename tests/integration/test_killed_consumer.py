"""A consumer that is killed with SIGKILL in each phase of a job, and comes back."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from tests.support.broker import LiveBroker, config_for, live_broker
from tests.support.ports import free_port
from tests.support.threads import Outcome, eventually

CONSUMER = """
import http.server, sys, threading, time

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(b'{"loaded": true}')

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        phase = self.path.partition("?")[2]
        print("reached", flush=True)
        if phase == "before":
            time.sleep(30)
        if phase == "within":
            self.send_response(200)
            self.send_header("Content-Length", "10")
            self.end_headers()
            self.wfile.write(b"half ")
            time.sleep(30)
        self.answer(b"done")

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print("up", flush=True)
server.serve_forever()
"""


class Consumer:
    """The process; `start` again after `kill`, on the same port."""

    def __init__(self) -> None:
        self.port = free_port()
        self.reached = threading.Event()
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CONSUMER, str(self.port)], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "up\n"

    def await_job(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "reached\n"

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(10)
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture
def consumer() -> Iterator[Consumer]:
    running = Consumer()
    running.start()
    yield running
    running.kill()


@pytest.fixture
def broker(consumer: Consumer) -> Iterator[LiveBroker]:
    config = config_for(
        f"http://127.0.0.1:{consumer.port}", consumer={"health": "/health"}, health_interval=0.1
    )
    with live_broker(config) as running:
        eventually(lambda: running.broker.registry.get("mvoice").healthy)
        yield running


@pytest.mark.parametrize("phase", ["before", "within"])
def test_in_mid_job(broker: LiveBroker, consumer: Consumer, phase: str) -> None:
    with broker.raw() as client:
        client.request("POST", f"/v1/tts?{phase}", b"{}")
        consumer.await_job()
        if phase == "within":
            client.until(b"half ")
        waiting = Outcome(lambda: broker.post("/v1/tts", data=b"{}"))
        broker.await_waiting(1)
        consumer.kill()
        got = client.answer()
        assert got.status == (502 if phase == "before" else 200)
        assert got.complete is (phase == "before")
    # The next in line meets the corpse, or what the probe said of it.
    assert waiting.result().status_code in (502, 503)
    broker.await_idle()
    registry = broker.broker.registry
    eventually(lambda: registry.get("mvoice").healthy is False)
    assert registry.get("mvoice").loaded is False
    consumer.start()
    eventually(lambda: broker.post("/v1/tts", data=b"{}").content == b"done")


def test_while_nothing_runs(broker: LiveBroker, consumer: Consumer) -> None:
    consumer.kill()
    assert broker.post("/v1/tts", data=b"{}").json()["error"] == "consumer_unreachable"
    consumer.start()
    eventually(lambda: broker.post("/v1/tts", data=b"{}").content == b"done")
