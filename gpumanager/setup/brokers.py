"""Brokers that run on this machine: who they are, by their own answers."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from gpumanager.client import UNAUTHORIZED, BrokerClient, BrokerUnavailable
from gpumanager.config import Config, ConfigError, load_config
from gpumanager.host.processes import ProcessTable, SystemProcesses, programs_at
from gpumanager.setup.asking import Asker, NoAnswer

CONNECT_S = 1.0
_WORDS = ("gpumanager", "wsgi")
"""In the command line of a process that may be a broker."""

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

    @property
    def card(self) -> str:
        """The card it has, in words."""
        if self.device is None:
            return "card not known"
        return "a simulated card" if on_simulated_card(self.device) else f"card {self.device}"

    def may_share_card(self, other: RunningBroker) -> bool:
        """Whether both may be for one card: a number and a UUID may be the same one's."""
        mine, theirs = self.device, other.device
        if mine is None or theirs is None:
            return True
        if on_simulated_card(mine) or on_simulated_card(theirs) or type(mine) is type(theirs):
            return mine == theirs
        return True

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
    return _url(_ANYWHERE.get(config.host, config.host), config.port)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


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


def running(table: SystemProcesses, own_port: int, key: str | None) -> list[RunningBroker]:
    """The brokers of this machine, each once, in the order of their ports. The key is shown to the
    one at `own_port` only. Who cannot be a broker by its command line is not asked."""
    commands = table.commands()
    found: dict[tuple[int, ...], RunningBroker] = {}
    for (ip, port), pids in sorted(table.listeners().items(), key=lambda each: each[0][1]):
        mine = [pid for pid in pids if _may_be_broker(commands.get(pid, ""))]
        if not mine or pids in found:
            continue
        broker = ask(_url(_ANYWHERE.get(ip, ip), port), port, key if port == own_port else None)
        if broker is not None:
            found[pids] = broker if broker.told else _by_command(broker, commands[mine[0]])
    return list(found.values())


def _may_be_broker(command: str) -> bool:
    return any(word in command for word in _WORDS)


def _by_command(broker: RunningBroker, command: str) -> RunningBroker:
    """What the command line tells of a broker that wants a key before it tells it."""
    words = command.split()
    if "demo" in words[1:4]:
        return replace(broker, device="simulated:")
    for word, path in pairwise(words):
        if word == "--config":
            try:
                device = load_config(path).gpu.device
            except ConfigError:
                return replace(broker, config_file=path)
            return replace(broker, config_file=path, device=device)
    return broker


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
