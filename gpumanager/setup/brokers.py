"""Brokers that run on this machine: who they are, by their own answers."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from typing import Any

from gpumanager.client import UNAUTHORIZED, BrokerClient, BrokerUnavailable
from gpumanager.config import Config
from gpumanager.processes import ProcessTable, SystemProcesses, programs_at
from gpumanager.setup.asking import Asker, NoAnswer

CONNECT_S = 1.0
_ROOT_WORDS = "gpumanager: "
"""What a broker's answer to `GET /` begins with."""

_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104  # asked, not bound


@dataclass(frozen=True, slots=True)
class RunningBroker:
    """A broker that answers at `port`. `told` says whether its status could be read, which is
    where `config_file` (None: it was started without one) and `device` (as in `gpu.device`) come
    from."""

    port: int
    told: bool = False
    config_file: str | None = None
    device: int | str | None = None

    @property
    def is_demo(self) -> bool:
        """Whether it is `gpumanager demo`'s, or one like it: on a simulated card, with no file."""
        return self.told and self.config_file is None and on_simulated_card(self.device)

    def serves(self, path: str | os.PathLike[str]) -> bool:
        """Whether it was started from this config file."""
        if self.config_file is None:
            return False
        return os.path.realpath(self.config_file) == os.path.realpath(path)

    def __str__(self) -> str:
        if self.is_demo:
            return "gpumanager's demo"
        if self.config_file is not None:
            return f"a broker with the config {self.config_file}"
        return "a broker without a config file" if self.told else "a broker"


@dataclass(frozen=True, slots=True)
class Stranger:
    """Something else that listens at `port`; `programs` are the names of its processes, as far as
    they may be seen."""

    port: int
    programs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " and ".join(self.programs) or "another program"


def on_simulated_card(device: int | str | None) -> bool:
    """Whether a `gpu.device` is no real card."""
    return str(device).startswith("simulated:")


def local_url(config: Config) -> str:
    """Where the config's broker is reached from this machine."""
    host = _ANYWHERE.get(config.host, config.host)
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


def occupant(
    config: Config, key: str | None, table: ProcessTable | None = None
) -> RunningBroker | Stranger | None:
    """Who listens where the config's broker will; None: nobody."""
    host = _ANYWHERE.get(config.host, config.host)
    try:
        socket.create_connection((host, config.port), CONNECT_S).close()
    except OSError:
        return None
    broker = ask(local_url(config), config.port, key)
    if broker is not None:
        return broker
    table = SystemProcesses() if table is None else table
    return Stranger(config.port, programs_at(config.port, table))


def ask(url: str, port: int, key: str | None) -> RunningBroker | None:
    """The broker at `url`, if one answers there."""
    try:
        with Asker(url) as asker:
            status, root = asker.get("/")
    except NoAnswer:
        return None
    return identified(url, port, status, root, key)


def identified(
    url: str, port: int, status: int, root: bytes, key: str | None
) -> RunningBroker | None:
    """The broker that answered `root` with `status` to `GET /`, if that is what a broker says.
    The key is shown to it: give one only where it belongs."""
    if not (root.startswith(_ROOT_WORDS.encode()) or (status == UNAUTHORIZED and _wants_key(root))):
        return None
    try:
        found: Any = BrokerClient(url, key).get("/v1/status")
        if "config_file" not in found:
            return RunningBroker(port)  # an older one
        return RunningBroker(port, True, found["config_file"], found["gpu"].get("device"))
    except (BrokerUnavailable, TypeError, KeyError, AttributeError):
        return RunningBroker(port)


def _wants_key(body: bytes) -> bool:
    """Whether a 401 is a broker's own."""
    try:
        said = json.loads(body)
    except ValueError:
        return False
    return isinstance(said, dict) and said.get("error") == "unauthorized" and "retryable" in said
