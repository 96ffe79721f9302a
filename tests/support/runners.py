"""The child processes of a fake server, each of which holds memory of a simulated card: what Ollama
calls a runner, LocalAI a backend, and llama.cpp's router an instance."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from gpumanager.gpu.simulated import OutOfMemory, SimulatedCard


class Runners:
    """Starts them and ends them. To be made before the server has threads or a listening socket:
    the process that forks them is forked here. It ends with this process, however that ends, and
    they end with it. Safe from any thread."""

    def __init__(self, card: Path, owner: str) -> None:
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        if os.fork() == 0:
            os.close(self._orders)
            os.close(self._answers)
            _as_a_child(_Forker(SimulatedCard(card), owner, orders, answers).run)
        os.close(orders)
        os.close(answers)
        self._lock = threading.Lock()

    def start(self, mib: int) -> int | None:
        """The pid of a new one that holds `mib`; None if the card has not so much."""
        pid, word = self._ask(f"start {mib}").split()
        if word == "ready":
            return int(pid)
        self.end(int(pid))
        return None

    def take(self, pid: int, mib: int) -> bool:
        """Have one take `mib` more; False if the card has not so much, or the process has ended."""
        return self._ask(f"take {pid} {mib}") == "taken"

    def keep(self, pid: int, mib: int) -> None:
        """Have one give back all but `mib`."""
        self._ask(f"keep {pid} {mib}")

    def end(self, pid: int) -> None:
        """Kill one; its memory is back when this returns, but for the card's own lag."""
        self._ask(f"end {pid}")

    def _ask(self, order: str) -> str:
        with self._lock:
            os.write(self._orders, order.encode() + b"\n")
            return _line(self._answers)


class _Forker:
    """The process that forks them. It has one thread, so that forking is safe and quick."""

    def __init__(self, card: SimulatedCard, owner: str, orders: int, answers: int) -> None:
        self.card, self.owner = card, owner
        self.orders, self.answers = orders, answers
        self.children: dict[int, int] = {}  # what orders go to each through

    def run(self) -> None:
        while order := _line(self.orders):
            word, *numbers = order.split()
            if word == "start":
                self._start(int(numbers[0]))
            elif word == "end":
                self._end(int(numbers[0]))
            else:
                self._pass_on(word, *map(int, numbers))

    def _start(self, mib: int) -> None:
        orders, sending = os.pipe()
        pid = os.fork()
        if pid == 0:
            # Or its brothers would outlive the end of this process.
            for each in [self.orders, sending, *self.children.values()]:
                os.close(each)
            _as_a_child(lambda: self._runner(mib, orders))
        os.close(orders)
        self.children[pid] = sending

    def _end(self, pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)
        os.close(self.children.pop(pid))
        self._answer("ended")

    def _pass_on(self, word: str, pid: int, mib: int) -> None:
        if os.waitpid(pid, os.WNOHANG) == (0, 0):
            os.write(self.children[pid], f"{word} {mib}\n".encode())
        else:
            self._answer("gone")

    def _runner(self, mib: int, orders: int) -> None:
        try:
            self.card.allocate(self.owner, mib)
        except OutOfMemory:
            self._answer(f"{os.getpid()} failed")
            return
        self._answer(f"{os.getpid()} ready")
        while order := _line(orders):
            word, number = order.split()
            if word == "keep":
                self.card.free(self.owner, keep_mib=int(number))
                self._answer("kept")
                continue
            try:
                self.card.allocate(self.owner, int(number))
            except OutOfMemory:
                self._answer("failed")
            else:
                self._answer("taken")

    def _answer(self, text: str) -> None:
        os.write(self.answers, text.encode() + b"\n")


def _line(reading: int) -> str:
    """The next line without its end; empty once nobody can write any more."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(reading, 1)
        if not byte:
            return ""
        line += byte
    return line.decode().strip()


def _as_a_child(act: Callable[[], None]) -> NoReturn:
    """Do it, and never come back to what the parent was about to do."""
    status = 1
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        act()
        status = 0
    except BaseException as error:
        print(f"a fake's child: {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)
