"""`gpumanager top` in a real terminal: it fits, counts what is cut, and ends with `q`."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pexpect
import pytest
import yaml
from rich.console import Console
from rich.text import Text

from gpumanager.cli import top, views
from gpumanager.telemetry.events import Pinned
from tests.support.broker import LiveBroker, live_broker
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer
from tests.support.terminal import Terminal
from tests.support.threads import Outcome, eventually

pytestmark = pytest.mark.timeout(60)

CONSUMERS = 12
WAITING = 15


@pytest.fixture
def broker() -> Iterator[LiveBroker]:
    """One with twelve consumers, a running job, and a queue."""
    free = threading.Event()

    def hold(peer: Connection, _: Received) -> None:
        free.wait(50)
        peer.send(answer(b"{}"))

    with ScriptedConsumer(hold) as consumer:
        consumers = {
            f"consumer-{number:02}": {"url": consumer.url, "paths": {"tts": "/tts"}}
            for number in range(CONSUMERS)
        }
        config = {
            "gpu": {"total_mib": 8000},
            "routing": {"tts": "consumer-00"},
            "consumers": consumers,
        }
        with live_broker(yaml.safe_dump(config)) as live:
            jobs = [Outcome(lambda: live.post("/v1/tts")) for _ in range(1 + WAITING)]
            live.await_waiting(WAITING)
            try:
                yield live
            finally:
                free.set()
                for job in jobs:
                    job.result(30)


@contextmanager
def shown(broker: LiveBroker, rows: int, columns: int = 100, more: str = "") -> Iterator[Terminal]:
    command = f"{sys.executable} -m gpumanager top --interval 0.3 --url {broker.url} {more}"
    terminal = Terminal(command, rows, columns)
    try:
        terminal.shows("gpumanager ")
        yield terminal
    finally:
        terminal.program.close(force=True)


def panels(lines: list[str]) -> list[str]:
    """The titles of the panels, each of which is closed."""
    assert sum(line.startswith("╭") for line in lines) == sum(
        line.startswith("╰") for line in lines
    )
    return [line.split()[1] for line in lines if line.startswith("╭")]


def cut(lines: list[str], what: str) -> int:
    """The number of those of which it says that they are cut."""
    found = [line for line in lines if "… and" in line and line.rstrip("│ ").endswith(what)]
    return int(found[0].split("… and")[1].split()[0]) if found else 0


@pytest.mark.parametrize("rows", [24, 30, 40, 60])
def test_it_fits_and_counts_what_is_cut(broker: LiveBroker, rows: int) -> None:
    with shown(broker, rows) as terminal:
        terminal.shows("lately")
        lines = terminal.lines()
        assert lines[0].startswith("gpumanager ")
        assert panels(lines) == ["memory", "running", "queue", "consumers", "lately"]
        queued = sum(re.match(r"│ \d+ ", line) is not None for line in lines)
        named = sum(line.startswith("│ consumer-") and " loaded " in line for line in lines)
        assert queued + cut(lines, "in the queue") == 1 + WAITING
        assert named + cut(lines, "consumers") == CONSUMERS
        assert (cut(lines, "in the queue") > 0) == (rows < 60)


def test_it_counts_asynchronous_jobs_where_there_are_any(broker: LiveBroker) -> None:
    found, width = broker.get("/v1/status").json(), 120
    console = Console(width=width, color_system=None)

    def head() -> str:
        with console.capture() as drawn:
            console.print(top.picture(found, [], broker.url, console, fit=False))
        return drawn.get().splitlines()[0]

    assert "asynchronous" not in head()
    found["jobs"] |= {"waiting": 12, "running": 1, "done": 4}
    assert head().rstrip().endswith("15 waiting, asynchronous: 12 waiting, 1 running")
    del found["jobs"]  # an older broker's
    assert "asynchronous" not in head()


def test_a_low_terminal_leaves_whole_panels_out(broker: LiveBroker) -> None:
    with shown(broker, 12) as terminal:
        terminal.shows("╭─ queue")
        lines = terminal.lines()
        assert lines[0].startswith("gpumanager ")
        assert panels(lines) == ["memory", "queue"]


def test_it_follows_a_resize(broker: LiveBroker) -> None:
    with shown(broker, 24) as terminal:
        terminal.shows("in the queue")
        terminal.resize(70, 120)
        eventually(lambda: not any("in the queue" in line for line in terminal.lines()), 20)
        assert panels(terminal.lines())[-1] == "lately"


@pytest.mark.parametrize("key", ["q", "Q", "\x03"])
def test_a_key_ends_it_and_the_terminal_is_as_before(broker: LiveBroker, key: str) -> None:
    with shown(broker, 24) as terminal:
        terminal.shows("queue")
        terminal.program.send("x")  # means nothing
        terminal.program.send(key)
        eventually(lambda: not terminal.program.isalive(), 20)
        assert terminal.ends() == 0


def test_the_terminal_is_given_back(broker: LiveBroker) -> None:
    shell = pexpect.spawn("/bin/sh", dimensions=(24, 100), timeout=20, encoding="utf-8")
    shell.sendline("stty -a | grep -o '.\\?icanon'; echo before-$?")
    shell.expect("before-0")
    shell.sendline(f"{sys.executable} -m gpumanager top --url {broker.url}")
    shell.expect("queue")
    shell.send("q")
    shell.sendline("stty -a | grep -q ' icanon' && stty -a | grep -q ' echo ' && echo as-$((1+1))")
    shell.expect("as-2")
    shell.close(force=True)


def test_the_newest_events_come_first_however_many_there_are(broker: LiveBroker) -> None:
    log = broker.broker.events
    for number in range(2500):
        log.emit(Pinned(consumer=f"m{number}"))
    with shown(broker, 50) as terminal:
        terminal.shows("consumer=m2499")
        marks = [line for line in terminal.lines() if "consumer=m" in line]
        assert "consumer=m2499" in marks[0]
        assert "consumer=m2498" in marks[1]
        log.emit(Pinned(consumer="m-latest"))
        terminal.shows("consumer=m-latest")
        assert "m-latest" in next(line for line in terminal.lines() if "consumer=m" in line)
        assert any("earlier" in line for line in terminal.lines())


def test_a_broker_that_goes_is_said_and_q_still_ends_it(broker: LiveBroker) -> None:
    with ScriptedConsumer(lambda peer, _: peer.send(answer(b"no"))) as other:
        command = f"{sys.executable} -m gpumanager top --interval 0.3 --url {other.url}"
        terminal = Terminal(command, 20, 80)
        terminal.shows("trying again")
        terminal.program.send("q")
        eventually(lambda: not terminal.program.isalive(), 20)
        assert terminal.ends() == 0


def status(models: int = 0) -> dict[str, Any]:
    """Of twelve consumers, the first of which has so many models, all loaded."""
    learned: dict[str, Any] = {}
    consumer = {
        "probed": True,
        "healthy": True,
        "breaker": "closed",
        "loaded": False,
        "gpu_resident_mib": 300,
        "vram_budget_mib": 3000,
        "total_requests": 3,
        "learned": learned,
    }
    entry = {"consumer": "c0", "kind": "tts", "client": "127.0.0.1", "age_ms": 1, "estimate_ms": 2}
    model = {
        "loaded": True,
        "held_mib": 90,
        "active": 1,
        "total_requests": 3,
        "pinned": True,
        "learned": {"needed": {"mib": 90, "source": "measured"}},
        "context": 4096,
    }
    names = [f"[/b]hub/{'long-' * 9}{number:03}:q4" for number in range(models)]
    entry |= {"model": names[0]} if names else {}
    found: dict[str, Any] = {
        "version": "1",
        "time": "2026-05-11T11:33:39.120Z",
        "gpu": {"total_mib": 8000, "used_mib": 3600, "free_mib": 4400, "source": "ledger"},
        "routing": {"tts": "c0"},
        "consumers": [{**consumer, "name": f"c{number}"} for number in range(CONSUMERS)],
        "scheduler": {"total_jobs": 4, "evictions": 1, "queue_depth": 1},
        "queue": [
            {**entry, "ticket": n, "state": "waiting" if n else "running", "position": n}
            for n in range(9)
        ],
    }
    its = [{**model, "name": name} for name in names]
    found["consumers"][0] |= {"models": its, "loaded": bool(its)}
    return found


EVENT = {"time": "2026-05-11T11:33:39.120Z", "event": "job", "level": "info", "a": "b" * 300}


@pytest.mark.parametrize("models", [0, 3, 25])
@pytest.mark.parametrize("width", [30, 60, 200])
@pytest.mark.parametrize("height", range(1, 60))
def test_no_size_is_overflown(height: int, width: int, models: int) -> None:
    found = status(models)
    console = Console(width=width, height=height, force_terminal=True)
    picture = top.picture(found, [EVENT] * 100, "http://127.0.0.1:8770", console, fit=True)
    assert len(console.render_lines(picture)) <= height


def test_the_queue_shows_how_urgent_a_job_is_if_that_is_not_the_usual() -> None:
    entry = {
        "ticket": 1,
        "consumer": "c0",
        "kind": "tts",
        "client": "anna",
        "state": "waiting",
        "position": 1,
        "age_ms": 1,
        "estimate_ms": 2,
    }
    console = Console(width=120)
    with console.capture() as shown:
        console.print(views.queue([{**entry, "urgency": 6}, {**entry, "urgency": 3}, entry]))
    assert [line.split()[3:5] for line in shown.get().splitlines()[1:]] == [
        ["tts", "u=6"],
        ["tts", "anna"],
        ["tts", "anna"],
    ]


@pytest.mark.parametrize(("width", "most"), [(80, 16), (120, 36)])
@pytest.mark.parametrize("height", [46, 56, 90])
def test_models_stand_below_their_consumer_and_what_is_cut_is_counted(
    height: int, width: int, most: int
) -> None:
    console = Console(width=width, height=height, force_terminal=True)
    picture = top.picture(status(25), [EVENT], "http://127.0.0.1:8770", console, fit=True)
    with console.capture() as captured:
        console.print(picture)
    lines = [Text.from_ansi(line).plain for line in captured.get().splitlines()]
    (at,) = [number for number, line in enumerate(lines) if line.startswith("│ c0 (tts)")]
    shown = [line for line in lines if line.startswith("│   [/b]")]
    assert lines[at + 1 : at + 1 + len(shown)] == shown
    assert len(shown) + cut(lines, "models") == 25
    assert "25 loaded" in lines[at]
    assert sum(line.startswith("│ c") and "healthy" in line for line in lines) == CONSUMERS
    for line in shown:
        name = line[4:].split()[0]
        assert (len(name), "…" in name) == (most, True), "its end is what tells it from others"
        assert "works, pinned" in line
        assert "4096 tokens" in line
        assert line.count(" 90 MiB ") == 2
    queued = [line for line in lines if re.match(r"│ \d+ ", line) and " tts " in line]
    assert queued
    assert all("[/b]" in line for line in queued)


def test_a_models_name_cannot_move_the_cursor() -> None:
    found = status(1)
    name = found["consumers"][0]["models"][0]["name"] = "a\x1b[2Jb\nc"
    found["queue"][0]["model"] = name
    console = Console(width=120, height=60, force_terminal=True)
    event = {**EVENT, "model": name}
    with console.capture() as captured:
        console.print(top.picture(found, [event], "http://127.0.0.1:8770", console, fit=True))
    assert "\x1b[2J" not in captured.get()
    assert "a?[2Jb?c" in captured.get()
