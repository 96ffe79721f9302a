"""What `gpumanager top` shows: all of it where it fits, and else as much as the terminal is high,
with what is cut counted."""

from __future__ import annotations

import os
import select
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from gpumanager.cli import views
from gpumanager.client import BrokerClient

try:
    import termios
    import tty
except ImportError:  # no terminal of Unix: keys are not looked at
    termios = tty = None  # type: ignore[assignment]

LAST_EVENTS = 8
"""Where no height bounds it."""

KEPT_EVENTS = 200
FRAME = 2
"""Lines that a panel has above and below its content."""

_HEAD = 1
"""Lines of a table's head."""


LISTS = 3
"""The queue, the consumers, the events."""


@dataclass(slots=True, eq=False)
class _List:
    """A panel with a list of `count` entries. `rows` is what it has for them."""

    count: int
    head: int
    rows: int = 1

    @property
    def least(self) -> int:
        """The smallest height that is worth it."""
        return FRAME + self.head + 1

    @property
    def wants_more(self) -> bool:
        return self.rows < max(1, self.count)


def picture(
    found: Mapping[str, Any],
    events: Sequence[Mapping[str, Any]],
    url: str,
    console: Console,
    *,
    fit: bool,
) -> RenderableType:
    """The card, what runs, the queue, the consumers, and the latest events, the newest first.
    With `fit` no higher than the console."""
    scheduler = found["scheduler"]
    head = Text.assemble(
        ("gpumanager ", "bold"),
        f"{found['version']}  {url}  {scheduler['total_jobs']} jobs, ",
        f"{scheduler['evictions']} evictions, {scheduler['queue_depth']} waiting",
        _later(found.get("jobs", {})),
        no_wrap=True,
        overflow="ellipsis",
    )
    inner = max(1, console.width - 4)
    memory = Panel(views.card(found, inner), title="memory", title_align="left")
    running = Panel(views.running(found, inner), title="running", title_align="left")
    queue = _List(len(found["queue"]), _HEAD)
    with_models = sum(1 + len(views.models_shown(each)) for each in found["consumers"])
    consumers = _List(with_models, _HEAD)
    lately = _List(len(events) if fit else min(LAST_EVENTS, len(events)), 0)
    left = (console.height if fit else 10**6) - 1
    shown: list[Panel | _List] = []
    for part in (memory, queue, running, consumers, lately):  # the first ones matter most
        height = part.least if isinstance(part, _List) else len(console.render_lines(part))
        if height <= left:
            left -= height
            shown.append(part)
    _share([part for part in (queue, consumers, lately) if part in shown], left)
    drawn = (
        (memory, memory),
        (running, running),
        (queue, Panel(views.queue(found["queue"], queue.rows, width=inner), title="queue")),
        (consumers, Panel(views.services(found, consumers.rows, width=inner), title="consumers")),
        (lately, Panel(views.lately(events, lately.rows), title="lately")),
    )
    panels = [panel for part, panel in drawn if part in shown]
    for panel in panels:
        panel.title_align = "left"
    return Group(head, *panels)


def _later(counts: Mapping[str, int]) -> str:
    """How many asynchronous jobs wait and run, if there are any."""
    if not any(counts.values()):
        return ""
    return f", asynchronous: {counts['waiting']} waiting, {counts['running']} running"


def _share(lists: list[_List], left: int) -> None:
    """Give out `left` lines beside the one that each list has: to the shortest first, and to the
    last, the events, what nobody else wants; but a few of them are worth more than the end of a
    long list."""
    events = lists[-1] if len(lists) == LISTS else None
    while left > 0:
        wanting = [each for each in lists if each.wants_more and each is not events]
        if events and events.wants_more and (not wanting or events.rows < _few(wanting)):
            wanting = [events]
        if not wanting:
            break
        min(wanting, key=lambda each: each.rows).rows += 1
        left -= 1


def _few(wanting: Sequence[_List]) -> int:
    return min(4, *(each.rows for each in wanting))


class LatestEvents:
    """The latest events of a broker, kept up to date with one request a look."""

    def __init__(self, broker: BrokerClient) -> None:
        self._broker = broker
        self._boot: str | None = None
        self._last = 0
        self._kept: deque[Mapping[str, Any]] = deque(maxlen=KEPT_EVENTS)

    def look(self) -> Sequence[Mapping[str, Any]]:
        """In their order. Raises BrokerUnavailable."""
        while True:
            found = self._broker.get("/v1/events", since=self._last)
            if found["boot"] != self._boot:
                self._boot, self._last = found["boot"], 0
                self._kept.clear()
                found = self._broker.get("/v1/events", since=0)
            self._kept.extend(found["events"])
            self._last = found["last"]
            if not found["events"]:
                return tuple(self._kept)


class Keys:
    """The keys that are pressed. Without a terminal there are none."""

    def __init__(self, file: int | None) -> None:
        self._file = file

    def ended(self, seconds: float) -> bool:
        """Whether `q` was pressed within so many seconds; waits for it."""
        if self._file is None:
            time.sleep(seconds)
            return False
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select([self._file], [], [], left)
            if ready:
                pressed = _read(self._file)
                if not pressed or b"q" in pressed.lower():  # nothing: the terminal is gone
                    return True
        return False


def _read(file: int) -> bytes:
    try:
        return os.read(file, 64)
    except OSError:
        return b""


@contextmanager
def keys() -> Iterator[Keys]:
    """Keys as they are pressed, not by the line and not shown; the terminal is given back as it
    was."""
    if termios is None or not sys.stdin.isatty():
        yield Keys(None)
        return
    file = sys.stdin.fileno()
    before = termios.tcgetattr(file)
    try:
        tty.setcbreak(file)
        yield Keys(file)
    finally:
        termios.tcsetattr(file, termios.TCSADRAIN, before)
