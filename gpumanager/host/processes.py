"""The processes of this machine, and which of them a consumer runs in."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import psutil

from gpumanager.addresses import host_and_port
from gpumanager.config import Config, ConsumerConfig
from gpumanager.host import procfs
from gpumanager.host.procfs import Address, lines

FRONTS = frozenset(
    {"systemd", "init", "docker-proxy", "rootlessport", "conmon", "pasta", "slirp4netns", "ssh"}
)
"""Processes that hold a port for another one, which is not their descendant."""

_FIRST_PID_NAMESPACE = 0xEFFFFFFC
"""The inode of the machine's own PID namespace: PROC_PID_INIT_INO in Linux's proc_ns.h."""

_CARDS = ("/dev/nvidia", "/dev/dxg", "/dev/nvmap", "/dev/nvhost", "/dev/nvgpu")
"""What a process has open that uses a card: on Linux, on WSL2, on a Jetson."""


@dataclass(frozen=True, slots=True)
class Network:
    """A network namespace: its own IP addresses, loopback's left out, and the TCP ports that
    are listened on in it."""

    addresses: frozenset[str] = frozenset()
    ports: frozenset[int] = frozenset()


class ProcessTable(Protocol):
    """What there is to know of this machine's processes. Never raises."""

    def listeners(self) -> Mapping[Address, tuple[int, ...]]:
        """Who listens on which TCP address, as far as it may be seen."""

    def ports(self) -> Set[int]:
        """TCP ports that are listened on, by whomever."""

    def ancestry(self, pid: int) -> tuple[int, ...]:
        """`pid`, its parent, and so on; empty if there is no such process."""

    def born(self, pid: int) -> int | None:
        """When it was started, in ticks since boot, None if it has ended: a pid alone may be
        another process by now."""

    def groups(self, pid: int) -> Set[int]:
        """The pids that lead its process group and its session; empty if they are not known. Its
        children stay in them when it ends."""

    def uses_card(self, pid: int) -> bool:
        """Whether it has a device of a card open, as far as that may be seen."""

    def name(self, pid: int) -> str:
        """The name of the program; empty if it is not known."""

    def cgroup(self, pid: int) -> str:
        """The path of its cgroup; empty if it is not known."""

    def command(self, pid: int) -> tuple[str, ...]:
        """Its command line; empty if it is not known."""

    def network(self, pid: int) -> Network:
        """Its network namespace; empty if it is not known."""

    def sees_all(self) -> bool:
        """Whether this is the machine's own PID namespace, where every process shows under the
        number that the driver knows it by."""


class SystemProcesses:
    """The processes of this machine, or of this PID namespace."""

    def listeners(self) -> Mapping[Address, tuple[int, ...]]:
        return {address: pids for address, pids in procfs.listening().items() if pids}

    def ports(self) -> Set[int]:
        return {port for _, port in procfs.listening()}

    def commands(self) -> Mapping[int, str]:
        """The command line of every process that may be seen."""
        found = {}
        for process in psutil.process_iter(["cmdline"]):
            found[process.pid] = " ".join(process.info["cmdline"] or ())
        return found

    def ancestry(self, pid: int) -> tuple[int, ...]:
        try:
            return (pid, *(parent.pid for parent in psutil.Process(pid).parents()))
        except (psutil.Error, OSError):
            return ()

    def born(self, pid: int) -> int | None:
        return procfs.born(pid)

    def groups(self, pid: int) -> Set[int]:
        try:
            return {os.getpgid(pid), os.getsid(pid)} - {0}
        except OSError:
            return set()

    def uses_card(self, pid: int) -> bool:
        return any(name.startswith(_CARDS) for name in procfs.open_files(pid))

    def name(self, pid: int) -> str:
        try:
            return psutil.Process(pid).name()
        except (psutil.Error, OSError):
            return ""

    def cgroup(self, pid: int) -> str:
        try:
            lines = Path(f"/proc/{pid}/cgroup").read_text(errors="replace").splitlines()
        except OSError:
            return ""
        paths = dict(line.split(":", 2)[::2] for line in lines if line.count(":") >= 2)
        return paths.get("0", "")  # the unified hierarchy

    def command(self, pid: int) -> tuple[str, ...]:
        try:
            return tuple(psutil.Process(pid).cmdline())
        except (psutil.Error, OSError):
            return ()

    def network(self, pid: int) -> Network:
        # /proc/PID/net may be read by everybody; /proc/PID/ns/net, which would tell at once whether
        # the namespace is another one, only by who may trace the process.
        own = Path(f"/proc/{pid}/net")
        return Network(
            frozenset(_own_ipv4(lines(own / "fib_trie")) | _own_ipv6(lines(own / "if_inet6"))),
            frozenset(procfs.ports(lines(own / "tcp")) | procfs.ports(lines(own / "tcp6"))),
        )

    def sees_all(self) -> bool:
        return sees_all()


def sees_all() -> bool:
    """Whether this process is in the machine's own PID namespace."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino == _FIRST_PID_NAMESPACE
    except OSError:
        return True  # no Linux: no such namespaces


def programs_at(port: int, table: ProcessTable) -> tuple[str, ...]:
    """Who listens at a TCP port of this machine, by program and pid, as far as it may be seen."""
    pids = {pid for (_, at), own in table.listeners().items() if at == port for pid in own}
    return tuple(f"{table.name(pid) or 'a process'} (pid {pid})" for pid in sorted(pids))


def with_birth(pids: Iterable[int]) -> list[tuple[int, float]]:
    """Each pid with the time its process was started, in seconds since the epoch: a pid alone may
    be another process by now. Those that have ended are left out."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            found.append((pid, psutil.Process(pid).create_time()))
    return found


def still_there(processes: Iterable[tuple[int, float]]) -> list[int]:
    """The pids of the processes, given with the time of their start, that have not ended since."""
    before = list(processes)
    alive = dict(with_birth(pid for pid, _ in before))
    return [pid for pid, born in before if alive.get(pid) == born]


def _own_ipv4(trie: list[str]) -> set[str]:
    """From fib_trie: a line with an address, then a line that says `/32 host LOCAL`."""
    found = {
        before.rpartition(" ")[2]
        for before, line in pairwise(trie)
        if line.strip() == "/32 host LOCAL"
    }
    return {address for address in found if not address.startswith("127.")}


def _own_ipv6(rows: list[str]) -> set[str]:
    """From if_inet6: an address in 32 hexadecimal digits first in each line."""
    found = {
        str(ipaddress.IPv6Address(int(row.split()[0], 16)))
        for row in rows
        if re.match(r"[0-9a-f]{32} ", row)
    }
    return found - {"::1"}


class ConsumerProcesses:
    """The processes that listen where the consumers are. Safe from any thread."""

    def __init__(self, config: Config, table: ProcessTable) -> None:
        self._config = config
        self._table = table
        self._consumers: Mapping[str, ConsumerConfig] = {}
        self._addresses: Mapping[str, Address] = {}

    def find(self) -> dict[str, tuple[int, ...]]:
        """The listening processes of each consumer of this machine, where they can be seen and
        are its own."""
        return dict(self._find(self._local()))

    def fronts(self) -> dict[str, tuple[int, ...]]:
        """The processes that hold a consumer's port for another process, as docker-proxy does."""
        return dict(self._find(self._local(), fronts=True))

    def of(self, name: str) -> tuple[int, ...]:
        """The listening processes of one consumer; empty if they cannot be seen."""
        address = self._local().get(name)
        return () if address is None else dict(self._find({name: address})).get(name, ())

    def _local(self) -> Mapping[str, Address]:
        """Where the consumers of this machine are; looked up again when the config changed."""
        consumers = self._config.consumers
        if consumers is not self._consumers:
            self._addresses = {
                name: address
                for name, consumer in consumers.items()
                if (address := _local_address(consumer.base_url)) is not None
            }
            self._consumers = consumers
        return self._addresses

    def _find(
        self, addresses: Mapping[str, Address], *, fronts: bool = False
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        listeners = self._table.listeners()
        for name, (host, port) in addresses.items():
            anywhere = "::" if ":" in host else "0.0.0.0"  # noqa: S104  # looked for, not bound
            for ip in (host, f"::ffff:{host}", anywhere, "::"):
                if pids := listeners.get((ip, port)):
                    wanted = tuple(
                        pid for pid in pids if (self._table.name(pid) in FRONTS) == fronts
                    )
                    if wanted:
                        yield name, wanted
                    break


def own_addresses() -> Set[str]:
    """The IP addresses of this machine."""
    return {each.address for rows in psutil.net_if_addrs().values() for each in rows}


def _local_address(base_url: str) -> Address | None:
    """The IP and port a consumer of this machine is reached at; None for another machine's."""
    host, port = host_and_port(base_url)
    if host == "localhost":
        return "127.0.0.1", port
    try:
        found = socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST)
    except OSError:
        return None  # a name: that of another machine, as far as can be told without asking
    address = str(found[0][4][0])
    return (address, port) if address in own_addresses() or address.startswith("127.") else None
