"""A job that ran out of memory: whether the card agrees, and what is learned from it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import yaml

from gpumanager.config import parse_config
from gpumanager.consumers.footprint import Figure
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.registry import Registry
from gpumanager.jobs.shortage import Shortage, Shortages
from gpumanager.model import GpuProcess, Holdings, Job, MemoryReading
from tests.support.clock import FakeClock

TOTAL = 12_000
DONE = {"match": {"path": "/x"}, "id": "id", "poll": "/p", "until": "done", "failure": "error"}
FAILED = {"done": True, "error": "CUDA out of memory", "prompt": "a cat"}


class Bench:
    """`voice` has a job that says that it ran out; `other` may be loaded, too. `holds` is what each
    of them holds; `desktop` what is nobody's."""

    def __init__(self, declared: int = 3000, *, measured: bool = True, **voice: Any) -> None:
        consumers = {
            "voice": {"vram_resident_mib": declared, "done": DONE, **voice},
            "other": {"vram_resident_mib": 4000},
        }
        self.config = parse_config(
            yaml.safe_dump(
                {
                    "gpu": {"total_mib": TOTAL, "reserved_mib": 200},
                    "consumers": {
                        name: {"url": "http://127.0.0.1:1", **each}
                        for name, each in consumers.items()
                    },
                }
            )
        )
        self.clock = FakeClock()
        self.registry = Registry(self.config, self.clock, lambda consumer: False)
        self.learned = Learned(consumers, lambda: 17.0)
        self.learned.publish(self.registry.learn)
        self.holds = {"voice": 0, "other": 0}
        self.desktop = 0
        self.measured = measured
        self.told: list[str] = []
        self.shortages = Shortages(
            self.registry,
            self.learned,
            self.look,
            lambda event: self.told.append(type(event).__name__),
        )
        self.registry.job_started("voice")

    def look(self) -> MemoryReading | None:
        if not self.measured:
            return None
        used = sum(self.holds.values()) + self.desktop
        reading = MemoryReading(TOTAL, used, TOTAL - used)
        foreign = (GpuProcess(9, self.desktop, "Xorg"),) if self.desktop else ()
        return replace(reading, holdings=Holdings(dict(self.holds), foreign=foreign))

    def other(self) -> None:
        """It is loaded."""
        self.registry.set_loaded("other", True)
        self.holds["other"] = 4000

    def says(self, answer: Any = FAILED, request: bytes = b"") -> Shortage | None:
        voice = self.config.consumers["voice"]
        return self.shortages.in_result(
            Job("voice", "tts"), voice, json.dumps(answer).encode(), request
        )

    @property
    def needed(self) -> Figure:
        return self.learned.needed("voice", self.config.consumers["voice"].declared)


def test_what_it_held_and_what_was_free_was_not_enough() -> None:
    bench = Bench()
    bench.other()
    bench.holds["voice"] = 1000
    shortage = bench.says()
    assert shortage is not None
    assert (shortage.room_mib, shortage.needed_mib, shortage.alone) == (8000, 3000, False)
    assert bench.shortages.failures.seen == 1
    bench.shortages.not_retried(shortage)
    assert bench.needed == Figure(8000, "out-of-memory", 17.0)


def test_a_guess_is_never_more_than_can_be_free_beside_a_desktop() -> None:
    bench = Bench(declared=10_000)
    bench.other()
    bench.desktop = 600
    shortage = bench.says()
    assert shortage is not None
    bench.shortages.not_retried(shortage)
    assert bench.needed.mib == TOTAL - 200 - 600


def test_a_guess_is_a_quarter_more_where_that_is_more_than_there_was_room_for() -> None:
    bench = Bench(declared=8000, measured=False)
    bench.other()
    shortage = bench.says()
    assert shortage is not None
    bench.shortages.not_retried(shortage)
    assert bench.needed.mib == 10_000


@pytest.mark.parametrize("measured", [True, False])
def test_nothing_is_learned_alone(measured: bool) -> None:
    bench = Bench(measured=measured)
    shortage = bench.says()
    assert shortage is not None
    assert shortage.alone
    bench.shortages.not_retried(shortage)
    assert bench.needed == Figure(3000, "declared")


def test_what_the_second_run_holds_is_what_is_needed() -> None:
    bench = Bench()
    bench.other()
    shortage = bench.says()
    assert shortage is not None
    bench.holds = {"voice": 8600, "other": 0}
    bench.shortages.healed(shortage)
    assert bench.needed == Figure(8600, "out-of-memory", 17.0)
    assert bench.shortages.failures.healed == 1
    assert bench.told == ["OutOfMemory", "OutOfMemoryHealed"]


@pytest.mark.parametrize(
    ("declared", "others", "believed"),
    [
        (3000, True, True),  # 8000 were free
        (2500, True, False),  # which is more than three times what it needs
        (2500, False, True),  # alone it costs nobody anything
        (0, True, True),  # nothing is known of what it needs
    ],
)
def test_the_card_has_to_agree(declared: int, others: bool, believed: bool) -> None:
    bench = Bench(declared)
    if others:
        bench.other()
    assert (bench.says() is not None) is believed
    assert bench.told == ["OutOfMemory" if believed else "OutOfMemoryDoubted"]
    assert bench.shortages.failures.seen == believed


def test_one_that_works_on_another_card_ran_out_of_that_one() -> None:
    bench = Bench()
    bench.other()
    for _ in range(3):
        bench.learned.held("voice", 0)
        bench.learned.ran("voice", 1.0)
    assert bench.says() is None
    bench.desktop = 5500  # but here is no room for what it declares
    assert bench.says() is not None


@pytest.mark.parametrize(
    "answer",
    [
        {"done": True, "error": None, "prompt": "CUDA out of memory"},
        {"done": True, "prompt": "CUDA out of memory"},
        {"done": True, "error": "interrupted"},
        [],
        "CUDA out of memory",
    ],
)
def test_only_the_failure_of_a_followed_job_is_looked_at(answer: Any) -> None:
    bench = Bench()
    assert bench.says(answer) is None
    voice = bench.config.consumers["voice"]
    assert bench.shortages.in_result(Job("voice", "tts"), voice, b"CUDA out of memory", b"") is None


def test_the_clients_own_words_do_not_count() -> None:
    assert Bench().says(request=b'{"name": "CUDA out of memory"}') is None


def test_a_model_that_nothing_is_known_of_is_believed() -> None:
    """That the other models of its consumer need little says nothing of it."""
    bench = Bench(
        declared=0,
        probe={"path": "/ps", "items": "models"},
        unload={"path": "/unload", "for_each": "items"},
    )
    bench.holds["voice"] = 700
    bench.other()
    for _ in range(5):
        bench.learned.held("voice", 700)
        bench.learned.ran("voice", 1.0)
    voice = bench.config.consumers["voice"]
    said = json.dumps(FAILED).encode()
    assert bench.shortages.in_result(Job("voice", "tts", model="big"), voice, said, b"") is not None
    assert bench.shortages.in_result(Job("voice", "tts"), voice, said, b"") is None


def test_a_guess_of_what_it_needs_is_no_ground_to_doubt_it() -> None:
    """It was raised once, to what there was room for then, and never measured."""
    bench = Bench(
        declared=0,
        probe={"path": "/ps", "items": "models"},
        unload={"path": "/unload", "for_each": "items"},
    )
    bench.other()
    bench.learned.ran_out("voice/big", 1100)
    voice = bench.config.consumers["voice"]
    said = json.dumps(FAILED).encode()
    assert bench.shortages.in_result(Job("voice", "tts", model="big"), voice, said, b"") is not None


# -- models --------------------------------------------------------------------------------------

APART: dict[str, Any] = {
    "probe": {"path": "/ps", "items": "models"},
    "unload": {"path": "/u", "for_each": "items", "json": {"model": "{item}"}},
}


def with_models(**held: int) -> Bench:
    """`voice` tells its models apart, and has loaded these; a job with the last one runs."""
    bench = Bench(**APART)
    for model in held:
        bench.registry.job_started("voice", model)
        bench.holds["voice"] = sum(list(held.values())[: list(held).index(model) + 1])
        bench.registry.measured("voice", bench.holds["voice"], 0)
        if model != list(held)[-1]:
            bench.registry.job_finished("voice", model=model)
    return bench


def said_of(bench: Bench, model: str) -> Shortage:
    consumer = bench.config.consumers["voice"]
    job = Job("voice", "tts", model=model)
    shortage = bench.shortages.in_result(job, consumer, json.dumps(FAILED).encode(), b"")
    assert shortage is not None
    return shortage


def test_what_its_other_models_hold_was_no_room_for_it() -> None:
    bench = with_models(large=6000, small=500)
    bench.learned.held("voice/small", 2500)
    bench.learned.ran("voice/small", 1.0)
    shortage = said_of(bench, "small")
    assert shortage.resident == "voice/small"
    assert (shortage.room_mib, shortage.needed_mib) == (500 + TOTAL - 6500, 2500)
    assert not shortage.alone  # its consumer's other model is there


def test_what_is_learned_of_it_is_its_models() -> None:
    bench = with_models(large=6000, small=500)
    bench.learned.held("voice/small", 2500)
    bench.learned.ran("voice/small", 1.0)
    shortage = said_of(bench, "small")
    bench.shortages.not_retried(shortage)
    assert bench.registry.now.needed("voice/small").source == "out-of-memory"
    assert bench.registry.now.needed("voice/small").mib == 6000
    assert bench.learned.figures("voice").raised is None
    assert bench.learned.figures("voice/large").raised is None


def test_what_the_second_run_of_a_model_holds_is_its_share() -> None:
    bench = with_models(large=6000, small=500)
    shortage = said_of(bench, "small")
    bench.holds["voice"] = 6000 + 2600
    bench.registry.measured("voice", bench.holds["voice"], 0)
    bench.shortages.healed(shortage)
    raised = bench.learned.figures("voice/small").raised
    assert raised is not None
    assert raised.mib == 2600
