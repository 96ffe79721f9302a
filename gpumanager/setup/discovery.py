"""What runs on this machine: AI servers by their own answers, what runs them, what they hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from gpumanager.host.processes import FRONTS, ProcessTable, SystemProcesses
from gpumanager.setup.brokers import RunningBroker
from gpumanager.setup.services import Identity, Service, identify, known_services

ASKERS = 16
MOST_PORTS = 400
_PRIVILEGED = 1024
"""Below it are ssh, printers and the like, but for the web's own ports."""

_WEB = frozenset({80, 443})


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


@dataclass(frozen=True, slots=True)
class Unknown:
    """A server that is not known. `program` is the name of its process, as far as it may be seen;
    `hint` is what it says of itself: its page's title, or its Server header."""

    port: int
    program: str = ""
    hint: str = ""

    def __str__(self) -> str:
        about = ", ".join(part for part in (self.program, self.hint) if part)
        return f"port {self.port}" + (f" ({about})" if about else "")


@dataclass(frozen=True, slots=True)
class Discovered:
    """What answers on this machine: servers, in services.yaml's order, then by port; our own,
    which are no consumers: brokers, and the ports of demos' speech services; and those who speak
    HTTP and are not known."""

    servers: tuple[Found, ...] = ()
    brokers: tuple[RunningBroker, ...] = ()
    demos: tuple[int, ...] = ()
    unknown: tuple[Unknown, ...] = ()


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
    ports = sorted((set(only) if only is not None else _candidates(table)) - set(skip))
    with ThreadPoolExecutor(ASKERS, "setup-ask") as askers:
        answers = dict(zip(ports, askers.map(_identify, ports), strict=True))
    found, unknown = [], []
    for port, answer in answers.items():
        pids = tuple(
            sorted({pid for (_, at), own in listeners.items() if at == port for pid in own})
        )
        if answer.service is not None:
            mib = _mib(pids, held_mib, table)
            mib = answer.reported_mib if mib is None else mib
            found.append(Found(answer.service, port, pids, _manager(pids, table), mib))
        elif answer.speaks_http:
            unknown.append(Unknown(port, table.name(pids[0]) if pids else "", answer.hint))
    # The first of a kind gets its route: which that is, services.yaml says, not the port.
    order = {service.service: number for number, service in enumerate(known_services())}
    found.sort(key=lambda each: (order[each.service.service], each.port))
    return Discovered(
        servers=tuple(found),
        brokers=tuple(answer.broker for answer in answers.values() if answer.broker is not None),
        demos=tuple(port for port, answer in answers.items() if answer.is_demo),
        unknown=tuple(unknown),
    )


def _identify(port: int) -> Identity:
    return identify(_url(port), port)


def _candidates(table: ProcessTable) -> set[int]:
    """Ports that are listened on here, and the usual ones, for where that cannot be listed."""
    worth = {port for port in table.ports() if port >= _PRIVILEGED or port in _WEB}
    return {service.port for service in known_services()} | set(sorted(worth)[:MOST_PORTS])


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


_UNIT = re.compile(r"/([^/]+\.service)(?:/|$)")
_CONTAINER = re.compile(r"(?:docker|libpod|cri-containerd)[-/]([0-9a-f]{64})")


def _manager(pids: Iterable[int], table: ProcessTable) -> Manager | None:
    """What runs the first of the processes that anything is known of, by its cgroup. One that
    holds the port for another (docker-proxy) belongs to a unit that runs much else."""
    for pid in pids:
        if table.name(pid) in FRONTS:
            continue
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
