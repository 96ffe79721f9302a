"""A broker in a process of its own, as an operator runs it, and what can be seen of it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
import yaml

from tests.support.threads import eventually

ROOT = Path(__file__).parent.parent


class Broker:
    """A broker in a process of its own."""

    def __init__(self, pid: int, port: int, log: Path) -> None:
        self.pid, self.port = pid, port
        self.config_file = log.with_name("broker.yaml")
        self._log = log
        self.session = requests.Session()
        self.session.trust_env = False

    def get(self, path: str) -> requests.Response:
        return self.session.get(f"http://127.0.0.1:{self.port}{path}", timeout=30)

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self.get("/v1/status").json()["scheduler"]
        return stats

    def rss_mib(self) -> float:
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+)", status)
        return int(found[1]) / 1024 if found else 0.0

    def threads(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/task").iterdir()))

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def await_waiting(self, count: int) -> None:
        eventually(lambda: self.stats()["queue_depth"] == count, timeout=30)

    def await_idle(self) -> None:
        eventually(
            lambda: (s := self.stats())["queue_depth"] == 0 and s["in_flight"] == 0, timeout=60
        )

    def log(self) -> str:
        """All that it has logged so far."""
        return self._log.read_text(errors="replace")


@contextmanager
def serving(config: dict[str, Any]) -> Iterator[Broker]:
    """`waitress-serve wsgi:app` with `config`, on a free port, with a state of its own."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "broker.yaml", Path(folder) / "log"
        state = str(Path(folder) / "state.json")
        file.write_text(
            yaml.safe_dump({"state_file": state, **config, "listen": f"127.0.0.1:{port}"})
        )
        with log.open("w") as sink:
            process = subprocess.Popen(
                [str(Path(sys.executable).parent / "waitress-serve"), "wsgi:app"],
                cwd=ROOT,
                env={**os.environ, "GPUMANAGER_CONFIG": str(file)},
                stdout=sink,
                stderr=sink,
            )
        running = Broker(process.pid, port, log)

        def up() -> bool:
            try:
                return running.get("/healthz").ok
            except requests.ConnectionError:
                return False

        try:
            eventually(up, timeout=20)
            yield running
            if process.poll() is not None:
                raise RuntimeError("the broker died")
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def upstream() -> Iterator[int]:
    """The port of a consumer in a process of its own (`benchmarks.performance.upstream`)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.performance.upstream"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()
            process.wait(10)


def one_consumer(port: int) -> str:
    """A config with the consumer of `upstream` for `llm`, and nothing that happens by itself."""
    config = {
        "health_interval": 1000,
        "gpu": {"sample_interval": 1000},
        "log": {"level": "warning"},
        "routing": {"llm": "it"},
        "consumers": {
            "it": {
                "url": f"http://127.0.0.1:{port}",
                "paths": {"llm": "/v1/chat/completions"},
            }
        },
    }
    return yaml.safe_dump(config)
