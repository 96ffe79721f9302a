"""Servers of several processes that hold memory of a simulated card, as real ones are built.

`python -m tests.support.families KIND CARD MIB PORT` prints the port, then `PID holds` for each
process that holds MIB now, and runs until its input ends; orphans run on. Kinds:

- `workers`: the parent listens, two children hold (tensor parallelism); one that ends is replaced.
- `forked`: the parent listens, two children have its socket, too, and hold.
- `reused`: two children listen on one port, each with a socket of its own, and hold.
- `detached`: the parent listens; a child starts the one that holds, and ends at `go on`.
- `apart`: the same, and the one that holds has a session of its own.
- `two ports`: one process listens on two ports, and holds.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gpumanager.gpu.simulated import SimulatedCard

ROOT = Path(__file__).parent.parent.parent


def say(*words: object) -> None:
    """In one piece: several processes have the same output."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def hold(card: SimulatedCard, mib: int) -> None:
    """For ever, in this process."""
    card.allocate("family", mib)
    say(os.getpid(), "holds")
    while True:
        signal.pause()


def child(card: SimulatedCard, mib: int) -> int:
    if pid := os.fork():
        return pid
    hold(card, mib)
    return 0


def holder(card: SimulatedCard, mib: int) -> None:
    card.allocate("family", mib)
    say(os.getpid(), "holds")
    sys.stdin.read()


def workers(card: SimulatedCard, mib: int) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    say(server.getsockname()[1])

    def worker() -> subprocess.Popen[bytes]:
        # A fork alone would have the server's socket, too. It ends with this process.
        command = [sys.executable, "-m", "tests.support.families", "holder"]
        return subprocess.Popen([*command, card.path, str(mib)], stdin=subprocess.PIPE)

    def replace() -> None:
        running = [worker(), worker()]
        while True:
            ended, _ = os.wait()
            running = [each for each in running if each.pid != ended] + [worker()]

    threading.Thread(target=replace, daemon=True).start()
    sys.stdin.read()


def forked(card: SimulatedCard, mib: int) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    say(server.getsockname()[1])
    children = [child(card, mib) for _ in range(2)]
    end(children)


def reused(card: SimulatedCard, mib: int) -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as first:
        port = first.getsockname()[1]
    say(port)
    children = []
    for _ in range(2):
        pid = os.fork()
        if not pid:
            socket.create_server(("127.0.0.1", port), reuse_port=True).detach()
            hold(card, mib)
        children.append(pid)
    end(children)


def detached(card: SimulatedCard, mib: int, port: int = 0, *, apart: bool = False) -> None:
    server = socket.create_server(("127.0.0.1", port))
    say(server.getsockname()[1])
    between = os.fork()
    if not between:
        server.close()
        say(os.getpid(), "between")
        if not os.fork():
            if apart:
                os.setsid()
            hold(card, mib)
        while True:
            signal.pause()
    sys.stdin.readline()
    os.kill(between, signal.SIGKILL)
    os.waitpid(between, 0)
    say(between, "ended")
    sys.stdin.read()


def two_ports(card: SimulatedCard, mib: int) -> None:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    say(*(server.getsockname()[1] for server in servers))
    card.allocate("family", mib)
    say(os.getpid(), "holds")
    sys.stdin.read()


def end(children: list[int]) -> None:
    """With its input; its children with it."""
    sys.stdin.read()
    for pid in children:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def main() -> None:
    kind, card, mib = sys.argv[1], SimulatedCard(sys.argv[2]), int(sys.argv[3])
    if kind in ("detached", "apart"):
        detached(card, mib, int(sys.argv[4]), apart=kind == "apart")
    else:
        kinds = {"workers": workers, "forked": forked, "reused": reused, "two ports": two_ports}
        {**kinds, "holder": holder}[kind](card, mib)


class Family:
    """A server that runs. `leads`: whether it leads a session, as when systemd starts it."""

    def __init__(self, kind: str, card: Path, mib: int, port: int, *, leads: bool) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.families", kind, card, str(mib), str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=leads,
        )
        self._others: list[int] = []
        """Each as a pidfd: a pid may be another process's by the end."""
        self.ports = tuple(int(word) for word in self._line().split())

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def port(self) -> int:
        return self.ports[0]

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def holder(self) -> int:
        """The pid of the next process that says that it holds its memory."""
        while True:
            pid, word = self._line().split()
            self._others.append(os.pidfd_open(int(pid)))
            if word == "holds":
                return int(pid)

    def go_on(self) -> None:
        """Have the one between end, and wait for that."""
        assert self.process.stdin is not None
        self.process.stdin.write("go on\n")
        self.process.stdin.flush()
        assert self._line().split()[1] == "ended"

    def kill(self) -> None:
        """Only the first process."""
        self.process.kill()
        self.process.wait(10)

    def close(self) -> None:
        self.process.kill()
        for other in self._others:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(other, signal.SIGKILL)
            os.close(other)
        self.process.communicate(timeout=20)


@contextmanager
def family(
    kind: str, card: Path, mib: int, port: int = 0, *, leads: bool = True
) -> Iterator[Family]:
    """Run one until the block is left."""
    it = Family(kind, card, mib, port, leads=leads)
    try:
        yield it
    finally:
        it.close()


if __name__ == "__main__":
    main()
