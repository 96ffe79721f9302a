"""What runs on this machine: AI servers by their own answers, what runs them, what they hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from http import HTTPStatus
from importlib.resources import files
from typing import Any, Literal

import jmespath
import yaml
from jmespath.exceptions import JMESPathError

from gpumanager.config import Kind
from gpumanager.processes import ProcessTable, SystemProcesses
from gpumanager.setup import DEMO_ROOT
from gpumanager.setup.asking import Asker, NoAnswer
from gpumanager.setup.brokers import RunningBroker, identified

ASKERS = 16
MOST_PORTS = 400
_PRIVILEGED = 1024
"""Below it are ssh, printers and the like, but for the web's own ports."""

_WEB = frozenset({80, 443})


@dataclass(frozen=True, slots=True)
class Service:
    """A kind of server that setup knows; see services.yaml."""

    service: str
    kind: Kind
    port: int
    ask: str
    text: str | None = None
    expr: str | None = None
    resident_mib: str | None = None
    preset: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    job: Mapping[str, Any] | None = None

    def is_it(self, answer: bytes) -> bool:
        """Whether what was answered to `ask` is one's of this kind."""
        text = answer.decode(errors="replace")
        if self.text is not None:
            return re.search(self.text, text) is not None
        return bool(_search(self.expr or "", text))

    def reported_mib(self, answer: bytes) -> int | None:
        """What it says in its answer that it holds, where `resident_mib` tells how to see it."""
        if self.resident_mib is None:
            return None
        found = _search(self.resident_mib, answer.decode(errors="replace"))
        return int(found) if isinstance(found, int | float) else None


def _search(expression: str, text: str) -> Any:
    """A JMESPath expression's value for JSON; None if it has none, or the text is no JSON."""
    try:
        return jmespath.search(expression, json.loads(text))
    except (JMESPathError, ValueError, RecursionError):
        return None


@dataclass(frozen=True, slots=True)
class Manager:
    """What runs a process: a systemd unit, of the user or the system, or a container by its id."""

    kind: Literal["unit", "container"]
    name: str
    scope: Literal["user", "system"] = "system"


@dataclass(frozen=True, slots=True)
class Found:
    """A server that answers. `mib` is what its processes hold of the card now, None if that
    cannot be told."""

    service: Service
    port: int
    pids: tuple[int, ...] = ()
    manager: Manager | None = None
    mib: int | None = None

    @property
    def url(self) -> str:
        return _url(self.port)


@cache
def known_services() -> tuple[Service, ...]:
    """All of services.yaml, in its order."""
    rows = yaml.safe_load(files("gpumanager.setup").joinpath("services.yaml").read_text("utf-8"))
    return tuple(Service(**row) for row in rows)


@dataclass(frozen=True, slots=True)
class Discovered:
    """What answers on this machine: servers, in services.yaml's order, then by port; and our own,
    which are no consumers: brokers, and the ports of demos' speech services."""

    servers: tuple[Found, ...] = ()
    brokers: tuple[RunningBroker, ...] = ()
    demos: tuple[int, ...] = ()


def discover(
    *,
    skip: Iterable[int] = (),
    only: Iterable[int] | None = None,
    held_mib: Mapping[int, int] | None = None,
    table: ProcessTable | None = None,
) -> Discovered:
    """Ask whatever listens on this machine what it is.

    `skip`: ports not to be asked; `only`: ask just these; `held_mib`: memory of the card by PID,
    None if that is not known.
    """
    table = SystemProcesses() if table is None else table
    listeners = table.listeners()
    ports = sorted(set(only) if only is not None else _candidates(table) - set(skip))
    with ThreadPoolExecutor(ASKERS, "setup-ask") as askers:
        answers = list(zip(ports, askers.map(_identify, ports), strict=True))
    found = []
    for port, answer in answers:
        if answer.service is None:
            continue
        service, reported_mib = answer.service, answer.reported_mib
        pids = tuple(
            sorted({pid for (_, at), own in listeners.items() if at == port for pid in own})
        )
        mib = _mib(pids, held_mib, table)
        mib = reported_mib if mib is None else mib
        found.append(Found(service, port, pids, _manager(pids, table), mib))
    # The first of a kind gets its route: which that is, services.yaml says, not the port.
    found.sort(key=lambda each: (known_services().index(each.service), each.port))
    return Discovered(
        servers=tuple(found),
        brokers=tuple(answer.broker for _, answer in answers if answer.broker is not None),
        demos=tuple(port for port, answer in answers if answer.is_demo),
    )


def _candidates(table: ProcessTable) -> set[int]:
    """Ports that are listened on here, and the usual ones, for where that cannot be listed."""
    worth = {port for port in table.ports() if port >= _PRIVILEGED or port in _WEB}
    return {service.port for service in known_services()} | set(sorted(worth)[:MOST_PORTS])


@dataclass(frozen=True, slots=True)
class _Identity:
    """Who answers at a port: at most one of a known server, a broker, a demo's speech service.
    `reported_mib`: what a server says it holds, if it does."""

    service: Service | None = None
    reported_mib: int | None = None
    broker: RunningBroker | None = None
    is_demo: bool = False


def _identify(port: int) -> _Identity:
    """Who listens on a port; every path is asked once."""
    answers: dict[str, tuple[int, bytes]] = {}
    with Asker(_url(port)) as asker:
        try:
            status, root = answers["/"] = asker.get("/")
            if (broker := identified(_url(port), port, status, root, None)) is not None:
                return _Identity(broker=broker)
            if root.startswith(DEMO_ROOT.encode()):
                return _Identity(is_demo=True)
            for service in known_services():
                if service.ask not in answers:
                    answers[service.ask] = asker.get(service.ask)
                status, answer = answers[service.ask]
                if status == HTTPStatus.OK and service.is_it(answer):
                    return _Identity(service, service.reported_mib(answer))
        except NoAnswer:
            pass
    return _Identity()


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


_UNIT = re.compile(r"/([^/]+\.service)(?:/|$)")
_CONTAINER = re.compile(r"(?:docker|libpod|cri-containerd)[-/]([0-9a-f]{64})")


def _manager(pids: Iterable[int], table: ProcessTable) -> Manager | None:
    """What runs the first of the processes that anything is known of, by its cgroup."""
    for pid in pids:
        cgroup = table.cgroup(pid)
        if container := _CONTAINER.search(cgroup):
            return Manager("container", container[1][:12])
        units = [
            name for name in _UNIT.findall(cgroup) if not name.startswith(("user@", "session-"))
        ]
        if units:
            return Manager("unit", units[-1], "user" if "user@" in cgroup else "system")
    return None


def _mib(
    pids: tuple[int, ...], held_mib: Mapping[int, int] | None, table: ProcessTable
) -> int | None:
    """What the processes and their descendants hold."""
    if held_mib is None or not pids:
        return None
    own = set(pids)
    return sum(mib for pid, mib in held_mib.items() if own.intersection(table.ancestry(pid)))
