"""What runs on this machine: AI servers by their own answers, what runs them, what they hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import jmespath
import requests
import yaml
from jmespath.exceptions import JMESPathError

from gpumanager.config import Kind
from gpumanager.processes import ProcessTable, SystemProcesses

TIMEOUT_S = 2.0
ASKERS = 16
MOST_PORTS = 400
LARGEST_ANSWER = 1024 * 1024
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
        return f"http://127.0.0.1:{self.port}"


@cache
def known_services() -> tuple[Service, ...]:
    """All of services.yaml, in its order."""
    rows = yaml.safe_load(files("gpumanager.setup").joinpath("services.yaml").read_text("utf-8"))
    return tuple(Service(**row) for row in rows)


def discover(
    *,
    skip: Iterable[int] = (),
    only: Iterable[int] | None = None,
    held_mib: Mapping[int, int] | None = None,
    table: ProcessTable | None = None,
) -> list[Found]:
    """Ask whatever listens on this machine what it is; in services.yaml's order, then by port.

    `skip`: ports not to be asked; `only`: ask just these; `held_mib`: memory of the card by PID,
    None if that is not known.
    """
    table = SystemProcesses() if table is None else table
    listeners = table.listeners()
    ports = set(only) if only is not None else _candidates(table) - set(skip)
    with ThreadPoolExecutor(ASKERS, "setup-ask") as askers:
        answers = list(askers.map(_identify, sorted(ports)))
    found = []
    for port, service, reported_mib in answers:
        if service is None:
            continue
        pids = tuple(
            sorted({pid for (_, at), own in listeners.items() if at == port for pid in own})
        )
        mib = _mib(pids, held_mib, table)
        mib = reported_mib if mib is None else mib
        found.append(Found(service, port, pids, _manager(pids, table), mib))
    # The first of a kind gets its route: which that is, services.yaml says, not the port.
    found.sort(key=lambda each: (known_services().index(each.service), each.port))
    return found


def _candidates(table: ProcessTable) -> set[int]:
    """Ports that are listened on here, and the usual ones, for where that cannot be listed."""
    worth = {port for port in table.ports() if port >= _PRIVILEGED or port in _WEB}
    return {service.port for service in known_services()} | set(sorted(worth)[:MOST_PORTS])


def _identify(port: int) -> tuple[int, Service | None, int | None]:
    """What listens on a port, and the MiB that it says it holds, if it does; every path is asked
    once."""
    answers: dict[str, bytes | None] = {}
    with requests.Session() as session:
        session.trust_env = False
        for service in known_services():
            if service.ask not in answers:
                try:
                    answers[service.ask] = _ask(session, port, service.ask)
                except requests.RequestException:
                    return port, None, None  # nobody there, or nobody who speaks HTTP
            answer = answers[service.ask]
            if answer is not None and service.is_it(answer):
                return port, service, service.reported_mib(answer)
    return port, None, None


def _ask(session: requests.Session, port: int, path: str) -> bytes | None:
    """The answer, if it is a good one."""
    url = f"http://127.0.0.1:{port}{path}"
    with session.get(url, timeout=TIMEOUT_S, stream=True, allow_redirects=False) as answer:
        if answer.status_code != 200:
            return None
        return answer.raw.read(LARGEST_ANSWER, decode_content=True) or b""


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
