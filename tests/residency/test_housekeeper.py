"""Quiet times: who is unloaded for being idle, and who is loaded again."""

from __future__ import annotations

from typing import Any

import yaml

from gpumanager.config import parse_config
from gpumanager.consumers.registry import Registry
from gpumanager.errors import BrokerError, ConsumerUnreachable, InsufficientVram
from gpumanager.gpu.accounting import Balance
from gpumanager.model import Job
from gpumanager.residency.housekeeper import Housekeeper
from gpumanager.scheduling.factory import locked
from gpumanager.scheduling.interface import PlannedVictim, Preview, Release, Ticket
from gpumanager.scheduling.policy import Prospect
from gpumanager.scheduling.sharing import ALONE, Sharing
from gpumanager.telemetry.events import Event, HousekeepingFailed
from tests.support.clock import FakeClock


class House:
    """A housekeeper over a real line; what it moves is only noted."""

    evictions = 0

    def __init__(self, consumers: dict[str, dict[str, Any]], **top: Any) -> None:
        self.clock = FakeClock()
        self.told: list[Event] = []
        filled = {
            name: {"url": "http://127.0.0.1:1", "unload": "/u", "load": "/l", **settings}
            for name, settings in consumers.items()
        }
        config = parse_config(yaml.safe_dump({"consumers": filled, **top}))
        self.registry = Registry(config, self.clock, lambda consumer: False)
        self.line = locked(max_queue=9, max_wait=60, clock=self.clock, room=self)
        self.keeper = Housekeeper(self.registry, self.line, self, self.clock, self.told.append)
        self.did: list[str] = []
        self.failing: BrokerError | None = None
        self.victims: tuple[str, ...] = ()

    def prospect(self, job: Job) -> Prospect:
        return Prospect()

    def sharing(self, job: Job) -> Sharing:
        return ALONE

    def make_room(self, ticket: Ticket) -> None:
        self._act("room for", ticket.job.consumer)
        self.registry.set_loaded(ticket.job.consumer, True)

    def ready(self, job: Job) -> bool:
        return False

    def relieve(self, ticket: Ticket) -> bool:
        raise NotImplementedError

    def unload(self, name: str, ticket: Ticket, *, patient: bool = True) -> Release:
        assert not patient
        assert self.line.stats().in_flight == 1
        self._act("unload", name)
        self.registry.set_loaded(name, False)
        return Release("released")

    def load(self, name: str, ticket: Ticket) -> None:
        assert self.line.stats().in_flight == 1
        self._act("load", name)

    def preview(self, job: Job) -> Preview:
        victims = tuple(PlannedVictim(name, 1, None, 1.0) for name in self.victims)
        return Preview(job.consumer, not victims, victims, 0, 1, 0, Balance("unknown"), False)

    def _act(self, what: str, name: str) -> None:
        self.did.append(f"{what} {name}")
        if self.failing is not None:
            raise self.failing

    def used(self, name: str) -> None:
        self.registry.job_started(name)
        self.registry.job_finished(name)

    def pass_time(self, seconds: float) -> list[str]:
        """What it did in that time, looking each second."""
        self.did.clear()
        for _ in range(int(seconds)):
            self.clock.advance(1)
            assert self.keeper.tidy() > 0
        assert self.line.stats().in_flight == 0
        return self.did


IDLE = {"tts": {"idle_unload": "60s"}, "llm": {}}


def test_nothing_to_do_needs_no_housekeeper() -> None:
    assert not House({"tts": {}}).keeper.needed
    assert House(IDLE).keeper.needed
    assert House({"tts": {}}, default_resident=["tts"]).keeper.needed


def test_who_had_no_job_for_long_is_unloaded_once() -> None:
    house = House(IDLE)
    house.used("tts")
    house.used("llm")
    assert house.pass_time(59) == []
    assert house.pass_time(120) == ["unload tts"]


def test_who_was_pinned_by_an_operator_is_not_unloaded_until_unpinned() -> None:
    house = House({"a": {"idle_unload": "5m"}})
    house.registry.set_loaded("a", True)
    house.registry.pin("a", True)
    for _ in range(3):
        house.keeper.tidy()
        house.clock.advance(301)
    assert house.did == []
    house.registry.pin("a", False)
    house.keeper.tidy()
    house.clock.advance(301)
    house.keeper.tidy()
    assert house.did == ["unload a"]


def test_every_job_puts_it_off() -> None:
    house = House(IDLE)
    house.used("tts")
    house.pass_time(50)
    house.used("tts")
    assert house.pass_time(50) == []
    assert house.pass_time(20) == ["unload tts"]


def test_who_was_loaded_without_a_job_counts_from_when_it_was_seen() -> None:
    house = House(IDLE)
    house.pass_time(300)
    house.registry.set_loaded("tts", True)
    assert house.pass_time(59) == []
    assert house.pass_time(5) == ["unload tts"]


def test_a_running_job_is_no_idleness() -> None:
    house = House(IDLE)
    house.registry.job_started("tts")
    assert house.pass_time(100) == []


def test_while_anybody_is_in_line_nothing_is_tidied() -> None:
    house = House(IDLE)
    house.used("tts")
    house.line.enqueue(Job("llm", "llm"))
    house.clock.advance(1000)
    house.keeper.tidy()
    assert house.did == []


def test_who_was_used_before_the_turn_came_is_not_idle() -> None:
    house = House(IDLE)
    house.used("tts")
    assert house.pass_time(59) == []
    line, wait = house.line, []

    class Late:
        """The line, in which a job of the consumer comes first after all."""

        def enqueue(self, job: Job) -> Ticket:
            wait.append(job.kind)
            house.used("tts")
            return line.enqueue(job)

        def __getattr__(self, name: str) -> Any:
            return getattr(line, name)

    scheduler, house.keeper._scheduler = house.keeper._scheduler, Late()
    house.clock.advance(2)
    house.keeper.tidy()
    house.keeper._scheduler = scheduler
    assert (wait, house.did) == (["idle-unload"], [])
    assert house.pass_time(59) == []


def test_a_reload_before_its_turn_counts() -> None:
    """What is not to be unloaded for being idle any more stays loaded."""
    house = House(IDLE)
    house.used("tts")
    assert house.pass_time(59) == []
    line, enqueue = house.line, house.line.enqueue

    def late(job: Job) -> Ticket:
        config = house.registry.now.config
        kept = config.consumers["tts"].model_copy(update={"idle_unload": None})
        consumers = {**config.consumers, "tts": kept}
        house.registry.reshape(config.model_copy(update={"consumers": consumers}))
        return enqueue(job)

    line.enqueue = late  # type: ignore[method-assign,assignment]
    house.clock.advance(2)
    house.keeper.tidy()
    assert house.registry.now.consumers["tts"].idle_unload is None  # its turn came
    assert house.did == []


def test_an_unload_that_fails_is_told_and_put_off() -> None:
    house = House(IDLE)
    house.used("tts")
    house.failing = ConsumerUnreachable("tts could not be unloaded")
    assert house.pass_time(100) == ["unload tts"]
    assert house.told[0] == HousekeepingFailed(
        consumer="tts", kind="idle-unload", reason="tts could not be unloaded"
    )


def test_who_is_to_be_resident_is_loaded_again_after_quiet() -> None:
    house = House({"tts": {}, "llm": {}}, default_resident=["tts"], restore_after=30)
    house.used("llm")
    assert house.pass_time(29) == []
    assert house.pass_time(30) == ["room for tts", "load tts"]


def test_a_restore_that_fails_is_tried_once_in_each_quiet_time() -> None:
    house = House({"tts": {}, "llm": {}}, default_resident=["tts"], restore_after=30)
    house.failing = InsufficientVram("tts needs 3000 MiB")
    assert house.pass_time(300) == ["room for tts"]
    (failed,) = house.told
    assert isinstance(failed, HousekeepingFailed)
    assert (failed.kind, failed.consumer) == ("restore", "tts")
    house.used("llm")
    assert house.pass_time(300) == ["room for tts"]


def test_nobody_who_is_to_be_resident_goes_for_another() -> None:
    house = House({"tts": {}, "llm": {}}, default_resident=["tts", "llm"], restore_after=30)
    house.registry.set_loaded("llm", True)
    house.victims = ("llm",)
    assert house.pass_time(300) == []


def test_who_does_not_answer_is_not_restored() -> None:
    house = House({"tts": {}}, default_resident=["tts"], restore_after=30)
    house.registry.probe_failed("tts", "refused")
    assert house.pass_time(100) == []


def test_a_broker_that_shuts_down_tidies_no_more() -> None:
    house = House(IDLE)
    house.used("tts")
    house.line.drain()
    assert house.pass_time(100) == []
