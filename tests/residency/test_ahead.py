"""What is prepared of the next swap, and when: a real queue, real files, a clock in the test's
hands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpumanager.config import parse_config
from gpumanager.consumers.registry import Registry
from gpumanager.errors import BrokerError, ConsumerUnreachable
from gpumanager.host import pagecache
from gpumanager.host.pagecache import CHUNK
from gpumanager.model import Job, QueueEntry, StoppedBy, Turn
from gpumanager.residency.ahead import AHEAD_S, CHECK_S, INTERVAL_S, LONGEST_INTERVAL_S, LookAhead
from gpumanager.scheduling.factory import locked
from gpumanager.scheduling.interface import Ticket
from gpumanager.telemetry.events import Event, Prefetched
from tests.support.clock import FakeClock
from tests.support.pages import PAGE, cached_bytes, cached_pages, drop, on_disk

PLENTY = 64 * CHUNK


class Ticking(FakeClock):
    """Goes on by itself, so that each look at it is a look at the queue; then does something."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0
        self.meanwhile: Callable[[int], object] = lambda looks: None

    def monotonic(self) -> float:
        self.looks += 1
        self.meanwhile(self.looks)
        self.advance(CHECK_S)
        return self.seconds


class Scene:
    """`busy` works, `next` waits, with these settings."""

    def __init__(self, available: int = PLENTY, **settings: Any) -> None:
        self.clock, self.own_clock = FakeClock(), Ticking()
        base = {"url": "http://127.0.0.1:1", "unload": "/u", "load": "/l"}
        config = {"consumers": {"busy": base, "next": {**base, **settings}}}
        self.registry = Registry(
            parse_config(yaml.safe_dump(config)), self.clock, lambda consumer: False
        )
        self.registry.set_loaded("busy", True)
        self.queue = locked(max_queue=9, max_wait=60, clock=self.clock)
        self.told: list[Event] = []
        self.started: list[tuple[str, StoppedBy]] = []
        self.failing: BrokerError | None = None
        self.tickets: dict[str, Ticket] = {}
        self.ahead = LookAhead(
            self.registry,
            self.queue,
            self,
            self.own_clock,
            self.told.append,
            lambda: available,
        )

    def comes(self, name: str, model: str | None = None) -> None:
        self.tickets[name] = self.queue.enqueue(Job(name, "llm", model=model))

    def ends(self, name: str) -> None:
        self.tickets.pop(name).close()

    def bring_back(self, name: str, stopped_by: StoppedBy) -> bool:
        self.started.append((name, stopped_by))
        if self.failing is not None:
            raise self.failing
        return False


def scene(*queue: str, **settings: Any) -> Scene:
    made = Scene(**settings)
    for name in queue:
        made.comes(name)
    return made


@pytest.fixture(autouse=True)
def keep_the_tests_own_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its looks are taken on the thread of all tests."""
    monkeypatch.setattr(pagecache, "idle_io", lambda: None)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return on_disk(tmp_path / "weights", 4 * CHUNK)


def test_the_next_ones_files_are_read_while_another_job_runs(weights: Path) -> None:
    it = scene("busy", "next", prefetch=[str(weights)])
    assert it.ahead.look() == INTERVAL_S
    assert read_mib(it) == [16]
    assert cached_bytes(weights) == 4 * CHUNK


def has_its_turn(it: Scene) -> None:
    """All of it between two looks."""
    it.clock.advance(1)
    it.registry.job_started("next")
    it.registry.job_finished("next")
    it.ends("next")
    it.registry.set_loaded("next", False)


def test_once_for_each_swap(weights: Path) -> None:
    it = scene("busy", "next", prefetch=str(weights))
    it.ahead.look()
    drop(weights)
    it.ahead.look()
    assert (read_mib(it), cached_pages(weights)) == ([16], 0)
    it.ends("busy")
    has_its_turn(it)
    it.comes("busy")
    it.comes("next")
    it.ahead.look()
    assert read_mib(it) == [16, 16]


@pytest.mark.parametrize("queue", [(), ("busy",), ("next",), ("busy", "busy"), ("next", "next")])
def test_nothing_is_read_where_no_swap_is_next(weights: Path, queue: tuple[str, ...]) -> None:
    it = scene(*queue, prefetch=str(weights))
    if queue == ("next", "next"):
        it.registry.set_loaded("next", True)
    it.ahead.look()
    assert cached_pages(weights) == 0
    assert it.told == []


def test_nor_for_one_that_is_loaded_or_is_being_loaded(weights: Path) -> None:
    it = scene("busy", "next", prefetch=str(weights))
    with it.registry.busy("next"):
        it.ahead.look()
    it.registry.set_loaded("next", True)
    it.ahead.look()
    assert cached_pages(weights) == 0


def test_nor_without_a_word_of_the_config(weights: Path) -> None:
    it = scene("busy", "next")
    it.ahead.look()
    assert (it.ahead.needed, it.told) == (False, [])
    assert scene(prefetch=str(weights)).ahead.needed
    assert scene(start_ahead=True, evict=[{"unit": "next.service"}]).ahead.needed


def test_no_more_than_half_of_the_memory_that_is_available(weights: Path) -> None:
    it = scene("busy", "next", prefetch=str(weights), available=5 * CHUNK)
    it.ahead.look()
    assert cached_bytes(weights) == 2.5 * CHUNK
    assert len(read_mib(it)) == 1


@pytest.mark.parametrize("how", ["its turn", "it left", "the end"])
def test_it_stops_as_soon_as_it_is_not_the_next_any_more(weights: Path, how: str) -> None:
    it = scene("busy", "next", prefetch=str(weights))

    def meanwhile(looks: int) -> None:
        if looks == 5:  # before the second chunk
            if how == "the end":
                it.ahead.stop()
            else:
                it.ends("busy" if how == "its turn" else "next")

    it.own_clock.meanwhile = meanwhile
    it.ahead.look()
    assert 0 < cached_pages(weights) * PAGE < 4 * CHUNK
    it.ahead.look()
    assert len(it.told) == 1


def test_a_file_that_cannot_be_read_does_not_keep_the_others(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken").touch()
    read = pagecache.read_ahead

    def failing(file: str, most: int, go_on: Callable[[], bool]) -> int:
        if file.endswith("broken"):
            raise OSError(5, "Input/output error")
        return read(file, most, go_on)

    monkeypatch.setattr(pagecache, "read_ahead", failing)
    it = scene("busy", "next", prefetch=[str(tmp_path / "broken"), str(weights)])
    it.ahead.look()
    assert read_mib(it) == [16]


def test_whose_turn_is_far_off_is_not_prepared_yet(weights: Path) -> None:
    it = scene("busy", "next", prefetch=str(weights))
    turn_s = AHEAD_S + 3

    class Estimating:
        upcoming, stats = it.queue.upcoming, it.queue.stats

        def queue(self) -> list[QueueEntry]:
            running, waiting = it.queue.queue()
            turn = Turn(wait_s=turn_s)
            return [running, QueueEntry(2, waiting.job, "waiting", waiting.since, 1, turn)]

    scheduler: Any = Estimating()
    ahead = LookAhead(it.registry, scheduler, it, it.clock, it.told.append, lambda: PLENTY)
    assert ahead.look() == 3
    turn_s = AHEAD_S + 1000
    assert ahead.look() == LONGEST_INTERVAL_S
    assert cached_pages(weights) == 0
    turn_s = AHEAD_S
    assert ahead.look() == INTERVAL_S
    assert read_mib(it) == [16]


def test_a_model_has_files_of_its_own(weights: Path, tmp_path: Path) -> None:
    other = on_disk(tmp_path / "other", CHUNK)
    models = [{"name": "big", "prefetch": str(weights)}, "small"]
    for model, read in (("big", 16), ("small", 4), (None, 4)):
        drop(weights)
        drop(other)
        it = scene("busy", models=models, prefetch=str(other))
        it.comes("next", model)
        it.ahead.look()
        assert read_mib(it) == [read]
    assert scene(models=models).ahead.needed
    assert not scene(models=["small"]).ahead.needed


# -- the process ---------------------------------------------------------------------------------

UNIT = {"start_ahead": True, "evict": [{"unit": "next.service"}]}


def test_one_that_was_stopped_is_started_once_for_each_time() -> None:
    it = scene("busy", "next", **UNIT)
    it.ahead.look()
    assert it.started == []  # nobody has stopped it
    for stopped in (StoppedBy("unit"), StoppedBy("unit")):
        it.registry.mark_stopped("next", stopped)
        for _ in range(2):  # another one comes first for a moment
            it.ahead.look()
            it.ends("busy")
            it.ahead.look()
            it.ends("next")
            it.comes("busy")
            it.comes("next")
        assert it.started[-1][1] is stopped
    assert [name for name, _ in it.started] == ["next", "next"]
    assert [each.name for each in it.told] == ["started_ahead", "started_ahead"]


def test_a_start_that_fails_is_not_repeated_and_changes_nothing(weights: Path) -> None:
    it = scene("busy", "next", prefetch=str(weights), **UNIT)
    it.registry.mark_stopped("next", StoppedBy("unit"))
    it.failing = ConsumerUnreachable("next: no such unit", consumer="next")
    it.ahead.look()
    it.ends("next")
    it.ahead.look()
    it.comes("next")
    it.ahead.look()
    assert len(it.started) == 1
    assert read_mib(it) == [16]
    assert it.registry.get("next").stopped_by is not None  # its turn starts it


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("signal", UNIT),  # to start it twice would make two of it
        ("checkpoint", UNIT),  # it would take the card's memory
        ("unit", {**UNIT, "start_ahead": False}),
    ],
)
def test_who_is_left_alone(method: str, settings: dict[str, Any]) -> None:
    it = scene("busy", "next", **settings)
    it.registry.mark_stopped("next", StoppedBy(method))
    it.ahead.look()
    assert it.started == []


def test_a_process_that_takes_no_memory_when_it_starts_is_not_taken_for_loaded() -> None:
    """Else no room would be made for its model, and its load call would not be made."""
    for settings, loaded in ((UNIT, False), ({**UNIT, "start_ahead": False}, True)):
        base = {"url": "http://127.0.0.1:1", "unload": "/u", "load": "/l", **settings}
        registry = Registry(
            parse_config(yaml.safe_dump({"consumers": {"next": base}})), FakeClock()
        )
        registry.mark_stopped("next", StoppedBy("unit"))
        registry.mark_started("next", resumed=False)
        assert registry.get("next").loaded is loaded


def read_mib(it: Scene) -> list[int]:
    return [each.read_mib for each in it.told if isinstance(each, Prefetched)]
