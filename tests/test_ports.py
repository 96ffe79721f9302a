"""Test processes side by side never get the same port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.support.ports import BLOCKS, free_port

ROOT = Path(__file__).parent.parent

ASKS = """
import os, sys
os.getpid = lambda: int(sys.argv[1])
from tests.support.ports import free_port
print(*(free_port() for _ in range(99)), flush=True)
sys.stdin.read()
"""


def test_processes_side_by_side_never_get_the_same_port() -> None:
    own = {free_port() for _ in range(99)}
    command = [sys.executable, "-c", ASKS, str(os.getpid())]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        theirs = {int(port) for port in other.stdout.readline().split()}
    assert len(theirs) == 99
    assert not own & theirs
    assert all(BLOCKS.start < port < BLOCKS.stop for port in own | theirs)


def test_a_port_in_use_is_passed_over() -> None:
    ports = [free_port() for _ in range(99)]
    with socket.create_server(("127.0.0.1", ports[0])):
        assert ports[0] not in [free_port() for _ in range(98)]
