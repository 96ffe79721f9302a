"""Moving a server to another port, so that the broker can listen in its place: done where setup
knows how, told where it does not."""

from __future__ import annotations

import re
import shlex
import socket
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from gpumanager.host.processes import FRONTS, ProcessTable
from gpumanager.setup.discovery import Found
from gpumanager.setup.systemd import Scope, ServiceError, Systemd
from gpumanager.setup.userservice import MARK

DROP_IN = "gpumanager.conf"
MOVED_S = 90.0
"""The longest that a restarted server may take until it listens: ComfyUI first loads its nodes."""

POLL_S = 0.1
CONNECT_S = 2.0


@dataclass(frozen=True, slots=True)
class Move:
    """A server's way from its port to another one. `told` says what setup will do, `by_hand` what
    somebody has to type if it does not or cannot, a line each. `act` does it, and raises
    ServiceError if the server does not listen there afterwards; None where setup cannot."""

    name: str
    port: int
    to: int
    told: str
    by_hand: tuple[str, ...]
    act: Callable[[], None] | None = None


def plan(
    name: str,
    found: Found,
    to: int,
    table: ProcessTable,
    systemd: Callable[[Scope], Systemd],
    *,
    limit_s: float = MOVED_S,
) -> Move:
    """How the server of a consumer gets from the port where it was found `to` another one.
    `systemd` gives the user's, or the system's."""
    if (inside := _published(found, table)) is not None:
        return _of_container(name, found, to, inside)
    if found.manager is not None and found.manager.kind == "container":
        return _of_container(name, found, to, found.service.port)
    manager = found.manager
    if manager is not None and _is_main(found, systemd(manager.scope), manager.name, table):
        return _of_unit(name, found, to, systemd(manager.scope), manager.name, limit_s)
    # What another account runs cannot be seen; a unit of the server's own name is a good guess.
    unit = f"{found.service.service}.service"
    if not found.pids and systemd("system").is_active(unit):
        return _of_unit(name, found, to, systemd("system"), unit, limit_s)
    return _of_process(name, found, to, table)


def free_port(after: int, taken: Collection[int]) -> int:
    """The first port after another one that is not taken, and that nobody listens on."""
    port = after + 1
    while port in taken or not _can_be_had(port):
        port += 1
    return port


def listens(port: int) -> bool:
    """Whether anybody does so on this machine."""
    try:
        socket.create_connection(("127.0.0.1", port), CONNECT_S).close()
    except OSError:
        return False
    return True


def with_port(command: str, port: int, to: int, flag: str | None) -> str | None:
    """A command line that has a server listen on another port; None if it does not say where it
    is told its port, and there is no `flag` to tell it with."""
    named = re.compile(
        rf"((?:--?[\w-]*port|-p)(?:=|\s+)|--?[\w-]+(?:=|\s+)[\w.\[\]*]*:){port}(?=[\s\"']|$)"
    )
    changed, count = named.subn(rf"\g<1>{to}", command)
    if count == 1:
        return changed
    return None if count or flag is None else f"{command} {flag} {to}"


def _of_unit(name: str, found: Found, to: int, systemd: Systemd, unit: str, limit_s: float) -> Move:
    scope = systemd.scope
    setting = _setting(found, to, systemd.command(unit))
    if setting is None:
        how = _in_words(found, to)
        edit = f"systemctl --{scope} edit {unit}    # {how}"
        restart = f"systemctl --{scope} restart {unit}"
        sudo = "" if systemd.may_change else "sudo "
        told = f"{name}: setup does not know how the unit {unit} sets its port"
        return Move(name, found.port, to, told, (sudo + edit, sudo + restart))
    file = systemd.units / f"{unit}.d" / DROP_IN
    if not systemd.may_change:
        told = f"{name}: the unit {unit} is the system's, so you have to move it to port {to}"
        return Move(name, found.port, to, told, _with_sudo(file, setting, unit))
    comment = f"{MARK}: gpumanager listens on {found.port} in its place"
    text = "\n".join([comment, "[Service]", *setting, ""])
    told = f"{name}: {file} will move it to port {to}; {unit} will be restarted"
    by_hand = (
        f"systemctl --{scope} edit {unit}    # {_in_words(found, to)}",
        f"systemctl --{scope} restart {unit}",
    )

    def act() -> None:
        _move_unit(systemd, unit, file, text, (found.port, to), limit_s)

    return Move(name, found.port, to, told, by_hand, act)


def _of_process(name: str, found: Found, to: int, table: ProcessTable) -> Move:
    pid = next(iter(found.pids), None)
    words = () if pid is None else table.command(pid)
    env, flag = found.service.moves.get("env"), found.service.moves.get("flag")
    command = shlex.join(words) or None
    if command is not None and env is not None:
        command = f"{env}=127.0.0.1:{to} {command}"
    elif command is not None:
        command = with_port(command, found.port, to, flag)
    which = name if pid is None else f"{name} (process {pid})"
    told = f"{which}: you have to move it to port {to}; setup ends no process"
    if command is None:
        return Move(
            name, found.port, to, told, (f"start {name} again with {_in_words(found, to)}",)
        )
    return Move(name, found.port, to, told, (f"end process {pid}, then start it so: {command}",))


def _of_container(name: str, found: Found, to: int, inside: int) -> Move:
    manager = found.manager
    which = f"container {manager.name}" if manager is not None else "container"
    told = f"{name}: you have to publish the port of its {which} as {to}"
    mapping = f"127.0.0.1:{to}:{inside}"
    rows = [
        f"docker run … -p {mapping} …    # in place of the mapping to {found.port}",
        f'or in a compose file: ports: ["{mapping}"], then: docker compose up -d',
    ]
    if manager is not None:
        rows.append(f"or, where it has the host's network: {_in_words(found, to)}")
    return Move(name, found.port, to, told, tuple(rows))


def _setting(found: Found, to: int, command: str | None) -> tuple[str, ...] | None:
    """What a unit's [Service] needs; None if setup does not know it."""
    if (env := found.service.moves.get("env")) is not None:
        return (f"Environment={env}=127.0.0.1:{to}",)
    if command is None:
        return None
    moved = with_port(command, found.port, to, found.service.moves.get("flag"))
    return None if moved is None else ("ExecStart=", f"ExecStart={moved}")


def _in_words(found: Found, to: int) -> str:
    moves = found.service.moves
    if "env" in moves:
        return f"{moves['env']}=127.0.0.1:{to} in its environment"
    return f"{moves['flag']} {to}" if "flag" in moves else f"port {to}, wherever its port is set"


def _with_sudo(file: Path, setting: tuple[str, ...], unit: str) -> tuple[str, ...]:
    lines = " ".join(shlex.quote(line) for line in ("[Service]", *setting))
    return (
        f"sudo mkdir -p {shlex.quote(str(file.parent))}",
        f"printf '%s\\n' {lines} | sudo tee {shlex.quote(str(file))}",
        f"sudo systemctl daemon-reload && sudo systemctl restart {unit}",
    )


def _move_unit(
    systemd: Systemd, unit: str, file: Path, text: str, ports: tuple[int, int], limit_s: float
) -> None:
    """Write the drop-in and restart; if the server does not listen on its new port then, all is
    as it was before, and ServiceError is raised."""
    before = file.read_text("utf-8") if file.exists() else None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
    except OSError as error:
        raise ServiceError(f"{file} cannot be written: {error.strerror or error}") from None
    try:
        _restart(systemd, unit)
        _await_move(*ports, limit_s)
    except ServiceError:
        if before is None:
            file.unlink()
        else:
            file.write_text(before, "utf-8")
        _restart(systemd, unit)
        raise


def _restart(systemd: Systemd, unit: str) -> None:
    systemd.call("daemon-reload")
    systemd.call("restart", unit)


def _await_move(port: int, to: int, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if listens(to):
            if listens(port):
                raise ServiceError(f"it listens on port {to} and still on {port}")
            return
        if listens(port):
            raise ServiceError(f"after its restart it still listens on port {port}")
        time.sleep(POLL_S)
    raise ServiceError(f"nothing listens on port {to} after {limit_s:g} s")


def _published(found: Found, table: ProcessTable) -> int | None:
    """The port inside its container, if a front such as docker-proxy holds the one outside."""
    for pid in found.pids:
        if table.name(pid) in FRONTS:
            options = dict(pairwise(table.command(pid)))
            inside = options.get("-container-port", "")
            return int(inside) if inside.isdecimal() else found.service.port
    return None


def _is_main(found: Found, systemd: Systemd, unit: str, table: ProcessTable) -> bool:
    """Whether the server is what the unit is for, and not one of many in it, as in a desktop's."""
    main = systemd.main_pid(unit)
    return any(main in table.ancestry(pid)[:2] for pid in found.pids)


def _can_be_had(port: int) -> bool:
    with socket.socket() as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            own.bind(("", port))
        except OSError:
            return False
    return True
