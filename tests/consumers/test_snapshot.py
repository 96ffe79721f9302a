"""What readers see of the registry while others write: one moment, whole, and never changed."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from gpumanager.config import Config
from gpumanager.consumers.footprint import RAISED_FOR_S
from gpumanager.consumers.learning import NOTHING, Learned
from gpumanager.consumers.registry import Registry
from gpumanager.consumers.snapshot import Snapshot
from gpumanager.model import Declared, GpuState, MemoryReading
from tests.support.clock import FakeClock
from tests.support.known import config_of, registry_of
from tests.support.threads import Outcome

ROUNDS = 400


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Written:
    """Four writers, each of which always changes two things together."""

    def __init__(self) -> None:
        self.registry = registry_of({"moving": False, "working": True}, FakeClock())
        self.learned = Learned(["working"])
        self.learned.publish(self.registry.learn)
        self.config = self.registry.now.config

    def reload(self, turn: int) -> None:
        """The config, and the state of a consumer that is another one with each."""
        self.registry.reshape(self.config.model_copy(update={"max_body_mib": turn}), ["moving"])

    def work(self, turn: int) -> None:
        """Whether it works, and how often it began or ended."""
        if turn % 2:
            self.registry.job_started("working")
        else:
            self.registry.job_finished("working")

    def measure(self, turn: int) -> None:
        """The reading, and when it was taken."""
        self.registry.set_gpu(GpuState(MemoryReading(turn, 0, turn), float(turn)))

    def learn(self, turn: int) -> None:
        """How long an unload took, and what was kept after it."""
        self.learned.unloaded("working", float(turn), turn)

    def halves(self, seen: Snapshot) -> list[str]:
        """What does not belong together."""
        working, figures, gpu = seen.states["working"], seen.figures("working"), seen.gpu
        version = seen.states["moving"].residency_version
        whole = {
            "config": version == (0 if seen.config is self.config else seen.config.max_body_mib),
            "state": working.active == working.residency_version % 2,
            "card": gpu.reading is None or gpu.reading.total_mib == gpu.sampled_at,
            "learned": figures == NOTHING or figures.unloads[-1] == figures.residue_mib,
        }
        return [part for part, is_whole in whole.items() if not is_whole]


@pytest.mark.usefixtures("hasty")
def test_readers_see_only_whole_snapshots() -> None:
    written = Written()
    writers: list[Callable[[int], None]] = [
        written.reload,
        written.work,
        written.measure,
        written.learn,
    ]
    start = threading.Barrier(len(writers) + 2)
    writing = threading.Event()
    writing.set()

    def write(change: Callable[[int], None]) -> None:
        start.wait(10)
        for turn in range(1, ROUNDS + 1):
            change(turn)

    def read() -> tuple[list[list[str]], bool]:
        found, first = [], written.registry.now
        last = first
        start.wait(10)
        while writing.is_set():
            seen = written.registry.now
            found += [written.halves(seen)]
            # One that was taken before is as it was.
            found += [written.halves(last)]
            last = seen
        last = written.registry.now
        found += [written.halves(last), written.halves(first)]
        return [each for each in found if each], last is not first

    readers = [Outcome(read) for _ in range(2)]
    for each in [Outcome(partial(write, change)) for change in writers]:
        each.result()
    writing.clear()
    for reader in readers:
        halves, has_seen_another = reader.result()
        assert halves == []
        assert has_seen_another
    last = written.registry.now
    assert last.config.max_body_mib == last.states["moving"].residency_version == ROUNDS
    assert last.states["working"].total_requests == ROUNDS / 2
    assert last.gpu.sampled_at == last.figures("working").residue_mib == ROUNDS


def test_who_enters_is_given_the_snapshot_in_which_nobody_removes_the_consumer() -> None:
    registry = registry_of({"a": True, "b": True}, FakeClock())
    first = registry.now
    with registry.using("a") as seen:
        assert seen is first
        registry.reshape(config_of({"a": True}))
        assert seen.consumers.keys() == {"a", "b"}
        assert registry.now.consumers.keys() == {"a"}


def test_what_happens_to_one_that_was_just_removed_is_passed_over() -> None:
    """As a sample of the card, or a probe, that began before the reload."""
    registry = Registry(Config(), FakeClock())
    registry.confirm("gone")
    assert registry.probe_failed("gone", "refused") is False
    assert registry.now.states == {}


def test_what_is_learned_is_published_and_stays_in_the_snapshots_of_before() -> None:
    registry, learned = registry_of({"tts": True}, FakeClock()), Learned(["tts"])
    learned.publish(registry.learn)
    before = registry.now
    learned.ran("tts", 2.0)
    assert before.figures("tts").run_s is None
    assert registry.now.figures("tts").run_s == learned.figures("tts").run_s
    after = registry.now
    learned.failed("tts")  # of which nothing was seen: no news
    assert registry.now is after
    assert registry.now.figures("nobody") == NOTHING


def test_a_figure_that_has_counted_for_long_enough_is_published_as_forgotten() -> None:
    now = 0.0
    registry = registry_of({"tts": True}, FakeClock())
    learned = Learned(["tts"], lambda: now)
    learned.publish(registry.learn)
    learned.ran_out("tts", 5000)
    assert registry.now.needed("tts").mib == 5000
    now = RAISED_FOR_S - 1
    learned.forget_the_old()
    assert registry.now.needed("tts").mib == 5000
    now = RAISED_FOR_S
    learned.forget_the_old()
    assert registry.now.needed("tts").mib == 0
    assert learned.needed("tts", Declared(7)).mib == 7
