"""A user's home for `gpumanager setup`: a config folder, a PATH, servers, what is started there."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import requests

from tests.support import systemctl
from tests.support.fake_servers import Running
from tests.support.ports import free_port
from tests.support.threads import eventually


class Box:
    """A user's home on a machine with three servers."""

    def __init__(self, home: Path, fakes: dict[str, Running]) -> None:
        self.home = home
        self.fakes = fakes
        self.own: list[subprocess.Popen[bytes]] = []
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.config = home / "config" / "gpumanager" / "consumers.yaml"
        self.environ = {
            **os.environ,
            "HOME": str(home),
            "XDG_CONFIG_HOME": str(home / "config"),
            "XDG_STATE_HOME": str(home / "state"),
            "PATH": f"{home / 'bin'}:/usr/bin:/bin",
            "SYSTEMCTL_LOG": str(home / "systemctl.log"),
            "NO_COLOR": "1",
        }

    def run(
        self, *words: str, answer: str = "", cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "gpumanager", *words],
            env=self.environ,
            cwd=cwd,
            input=answer,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def setup(self, *more: str, answer: str = "") -> subprocess.CompletedProcess[str]:
        ports = ",".join(str(fake.port) for fake in self.fakes.values())
        listen = f"127.0.0.1:{self.port}"
        return self.run("setup", "--listen", listen, "--ports", ports, *more, answer=answer)

    def with_systemd(self) -> None:
        systemctl.install(self.home / "bin")

    def systemctl(self) -> list[list[str]]:
        return systemctl.said(self.home / "systemctl.log")

    def brokers(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if str(self.config) in words and "serve" in words:
                found.append(process)
        return found

    def serve_again(self, cwd: Path) -> None:
        """In place of the broker that setup started, one that has to find its config."""
        for process in self.brokers():
            process.terminate()
            process.wait(20)
        self.serve("serve", cwd=cwd)

    def serve(self, *words: str, cwd: Path | None = None) -> None:
        """Start a broker of this user's, until `close`."""
        command = [sys.executable, "-m", "gpumanager", *words]
        pipe = subprocess.DEVNULL
        process = subprocess.Popen(command, env=self.environ, stdout=pipe, stderr=pipe, cwd=cwd)
        self.own.append(process)
        eventually(lambda: is_up(f"{self.url}/healthz"), 60)

    def close(self) -> None:
        for own in self.own:
            own.terminate()
            own.wait(20)
        for process in self.brokers():
            process.kill()
            process.wait(10)


def is_up(url: str) -> bool:
    with suppress(requests.RequestException):
        return requests.get(url, timeout=5).status_code == 200
    return False
