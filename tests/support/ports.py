"""Ports for the servers that tests start by number."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from itertools import cycle

BLOCKS = range(20_000, 30_000, 100)
"""The first ports of the blocks. They lie below those that Linux hands out by itself (from 32768
on), to clients and to servers on port 0, so that nobody comes by one of ours by chance."""

_lock = threading.Lock()


def free_port() -> int:
    """A port of loopback that nobody listens on, and that no other process of tests will take."""
    with _lock:
        ports = _own_ports()
        for _ in range(BLOCKS.step - 1):
            port = next(ports)
            with suppress(OSError), socket.create_server(("127.0.0.1", port)):
                return port
    raise RuntimeError("every port of this process's block is in use")


@cache
def _own_ports() -> Iterator[int]:
    """The ports of a block that belongs to this process until it ends: for as long, its first port
    is bound."""
    at = os.getpid() % len(BLOCKS)
    for first in [*BLOCKS[at:], *BLOCKS[:at]]:
        guard = socket.socket()
        try:
            guard.bind(("127.0.0.1", first))
        except OSError:
            guard.close()
        else:
            guard.detach()  # nobody closes it
            return cycle(range(first + 1, first + BLOCKS.step))
    raise RuntimeError("every block of ports is in use")
