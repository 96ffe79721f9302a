"""Linux's own tables of processes, where psutil does not tell enough: who listens where, and when a
process was started.

psutil names one process for each socket. A server that forks its workers has one socket for all of
them, and systemd one together with the service it starts: which of them it names is chance.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Set
from pathlib import Path

Address = tuple[str, int]

_LISTENS = "0A"
"""TCP_LISTEN, as /proc/net/tcp writes it."""

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))


def listening() -> dict[Address, tuple[int, ...]]:
    """The processes that have a listening TCP socket of this network open, by its address; none
    where they may not be seen."""
    sockets = {f"socket:[{inode}]": at for table in _TABLES for at, inode in _rows(lines(table))}
    found: dict[Address, set[int]] = {address: set() for address in sockets.values()}
    for pid, names in _open_files():
        for name in names & sockets.keys():
            found[sockets[name]].add(pid)
    return {address: tuple(sorted(pids)) for address, pids in found.items()}


def ports(rows: list[str]) -> set[int]:
    """The ports that are listened on, from the lines of a `tcp` or `tcp6`."""
    return {port for (_, port), _ in _rows(rows)}


def open_files(pid: int) -> Set[str]:
    """What a process has open, by name; nothing if that may not be seen."""
    found = set()
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            try:
                found.add(os.readlink(entry.path))
            except OSError:
                continue  # it was closed meanwhile
    except OSError:
        pass
    return found


def born(pid: int) -> int | None:
    """When a process was started, in ticks since boot; None if it has ended."""
    try:
        stat = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    except OSError:
        return None
    try:
        content = os.read(stat, 4096)
    except OSError:
        return None
    finally:
        os.close(stat)
    # The name before the last bracket is the process's own choice, brackets included.
    fields = content.rpartition(b")")[2].split()
    return None if fields[0] in (b"Z", b"X", b"x") else int(fields[19])


def lines(file: Path) -> list[str]:
    """The lines of a file below /proc; none if it cannot be read."""
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _open_files() -> Iterator[tuple[int, Set[str]]]:
    try:
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    except OSError:
        return
    for pid in pids:
        yield pid, open_files(pid)


def _rows(rows: list[str]) -> Iterator[tuple[Address, str]]:
    """Address and inode of each listening socket: `N: ADDRESS:PORT REMOTE STATE … INODE …`, the
    address in hexadecimal."""
    for row in rows[1:]:
        columns = row.split()
        if len(columns) > 9 and columns[3] == _LISTENS:
            host, _, port = columns[1].rpartition(":")
            yield (_ip(host), int(port, 16)), columns[9]


def _ip(digits: str) -> str:
    """Each 32 bits are in the machine's own byte order."""
    words = [digits[at : at + 8] for at in range(0, len(digits), 8)]
    raw = b"".join(int(word, 16).to_bytes(4, sys.byteorder) for word in words)
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)
