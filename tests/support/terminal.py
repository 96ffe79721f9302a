"""A program in a terminal, and what stands on its screen."""

from __future__ import annotations

import os
import signal
import termios
from contextlib import suppress
from typing import Any

import pexpect
import pyte

from tests.support.threads import eventually


def heeds_interrupts() -> None:
    """As in a terminal, also where the tests run in a shell's background, which ignores them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A program in a terminal of `rows` and `columns`, and what stands on its screen."""

    def __init__(self, command: str, rows: int, columns: int) -> None:
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        environ = {**os.environ, "TERM": "xterm", "COLUMNS": "", "LINES": ""}
        self.program: Any = pexpect.spawn(
            command,
            env=environ,
            dimensions=(rows, columns),
            timeout=20,
            preexec_fn=heeds_interrupts,
        )
        self.before = termios.tcgetattr(self.program.child_fd)

    def lines(self) -> list[str]:
        """Once all that has come is drawn."""
        with suppress(pexpect.TIMEOUT, pexpect.EOF):
            for _ in range(20):
                self._stream.feed(self.program.read_nonblocking(65536, timeout=0.1))
        return [line.rstrip() for line in self.screen.display]

    def shows(self, text: str) -> None:
        eventually(lambda: any(text in line for line in self.lines()), 20)

    def resize(self, rows: int, columns: int) -> None:
        self.screen.resize(rows, columns)
        self.program.setwinsize(rows, columns)

    def ends(self) -> int:
        self.program.expect(pexpect.EOF)
        self.program.close()
        return int(self.program.exitstatus)
