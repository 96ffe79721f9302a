"""A job's hold on the GPU: however it goes, the GPU comes back once, and not before it is settled
what becomes of the job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import gpumanager
from gpumanager.clock import rfc3339, wall_time
from gpumanager.config import Config, parse_config
from gpumanager.consumers.admission import Admission
from gpumanager.consumers.breaker import Breakers
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.registry import Registry
from gpumanager.errors import ConsumerTimeout, ConsumerUnhealthy, ConsumerUnreachable
from gpumanager.jobs.deadlines import Deadlines
from gpumanager.jobs.hold import Hold, Means
from gpumanager.jobs.place import Places
from gpumanager.jobs.record import RequestRecord
from gpumanager.jobs.shares import Shares
from gpumanager.model import Job
from gpumanager.scheduling.factory import locked
from gpumanager.telemetry.events import Event
from tests.jobs.test_cancellation import FakeCalls, FakeExchange
from tests.support.clock import FakeClock
from tests.support.events import ignore

OVERDUE = ConsumerTimeout("no answer within 5 s", consumer="m")


class Held:
    """A hold, and what can be seen of it from outside."""

    def __init__(self, **consumer: Any) -> None:
        document = {"consumers": {"m": {"url": "http://127.0.0.1:1", **consumer}}}
        self.clock = FakeClock()
        config = parse_config(yaml.safe_dump(document))
        self.registry = Registry(config, self.clock)
        self.events: list[Event] = []
        self.breakers = Breakers(self.clock, ignore)
        self.scheduler = locked(max_queue=9, max_wait=60, clock=self.clock)
        self.after: list[str] = []
        means = Means(
            registry=self.registry,
            learned=Learned(["m"], lambda: 0.0),
            admission=Admission(self.registry, self.breakers, retry_s=5),
            breakers=self.breakers,
            calls=FakeCalls(),
            clock=self.clock,
            emit=self.events.append,
            after_job=self.after.append,
        )
        deadlines = Deadlines(self.scheduler, self.clock, 60)
        places = Places(self.registry, self.scheduler, Shares(), deadlines)
        self.record = RequestRecord("r", "POST", "/v1/tts", "127.0.0.1", 0.0, ignore)
        self.exchange: Any = FakeExchange()
        place = places.open("m")
        self.hold = Hold(means, place, self.record)
        place.take_ticket(Job("m", "tts")).wait()

    def begin(self) -> Held:
        self.hold.begin(self.exchange)
        return self

    def answered(self) -> Held:
        self.hold.succeeded(self.exchange)
        self.exchange.end()
        self.hold.answered()
        return self

    @property
    def on_the_gpu(self) -> int:
        return self.scheduler.stats().in_flight

    def is_over(self) -> dict[str, Any]:
        """The event of its end, once it has given everything back."""
        assert self.on_the_gpu == 0
        assert self.registry.get("m").active == 0
        self.registry.reshape(Config())  # nobody works with the consumer
        assert self.after == ["m"]
        (event,) = self.events
        return event.fields


def test_a_job_that_never_began_gives_up_its_place() -> None:
    job = Held()
    job.hold.end()
    job.hold.end()
    assert job.on_the_gpu == 0
    assert job.events == []
    job.registry.reshape(Config())


def test_one_that_the_breaker_refuses_has_not_begun() -> None:
    job = Held()
    for _ in range(3):
        job.breakers.failed("m")
    with pytest.raises(ConsumerUnhealthy):
        job.begin()
    assert not job.hold.begun
    job.hold.end()
    assert job.on_the_gpu == 0


def test_the_gpu_comes_back_with_the_last_of_the_answer() -> None:
    job = Held().begin()
    job.clock.advance(3)
    job.answered()
    assert job.on_the_gpu == 0
    job.hold.end()  # and once
    event = job.is_over()
    assert (event["status"], event["run_ms"], event.get("failure")) == (200, 3000, None)


def test_the_event_has_what_a_replay_needs() -> None:
    job = Held(vram_resident_mib=3000)
    job.begin().clock.advance(2)
    event = job.answered().is_over()
    assert event["arrived"] == rfc3339(wall_time(job.clock, job.clock.monotonic() - 2))
    assert (event["needed_mib"], event["urgency"], event["requester"]) == (3000, 3, "-")
    assert not {"total_mib", "model", "session"} & set(event)  # which nobody knows


def test_a_consumer_that_broke_off_gives_it_back_at_once() -> None:
    job = Held().begin()
    job.exchange.end()
    job.hold.failed(ConsumerUnreachable("broke off", consumer="m"))
    assert job.on_the_gpu == 0
    assert not job.record.goes_on
    job.hold.end()
    assert job.is_over()["failure"] == "consumer_unreachable"


def test_a_time_out_is_settled_when_the_client_has_its_answer() -> None:
    job = Held(on_disconnect="none").begin()
    job.exchange.end(timed_out=True)
    job.hold.failed(OVERDUE)
    job.hold.answered()
    assert job.on_the_gpu == 1
    assert job.record.goes_on
    assert job.exchange.did == []
    job.hold.end()
    assert job.exchange.did == ["await its end"]
    assert job.is_over()["failure"] == "consumer_timeout"


def test_an_answer_that_nobody_took_to_its_end_is_read_to_its_end() -> None:
    job = Held(on_disconnect="none").begin()
    job.hold.succeeded(job.exchange)
    job.hold.end()
    assert job.exchange.did == ["drain"]
    assert job.record.failure == "client_gone"
    assert job.is_over()["failure"] == "client_gone"


def test_the_gpu_comes_back_even_if_settling_fails(caplog: pytest.LogCaptureFixture) -> None:
    job = Held(on_disconnect="none").begin()

    def fail() -> None:
        raise RuntimeError("no")

    job.exchange.drain = fail
    job.hold.end()
    assert job.is_over()["failure"] == "client_gone"
    assert "settling a job failed" in caplog.text


@pytest.mark.parametrize("request_first", [True, False])
def test_a_job_that_is_followed_outlives_its_request(request_first: bool) -> None:
    job = Held().begin()
    job.hold.succeeded(job.exchange)
    job.exchange.end()
    job.hold.follow(lambda: None)
    steps: list[Callable[[], object]] = [
        job.hold.end,
        lambda: job.hold.followed("out_of_memory", process_gone=False),
    ]
    for step in steps if request_first else reversed(steps):
        job.hold.answered()
        step()
        assert job.on_the_gpu == (1 if step is steps[0] and request_first else 0)
    assert job.is_over()["failure"] == "out_of_memory"


def test_one_that_nobody_else_can_follow_is_followed_at_the_end_of_its_request() -> None:
    job = Held().begin()
    job.hold.succeeded(job.exchange)
    job.exchange.end()
    job.hold.follow(lambda: lambda: job.hold.followed(None, process_gone=False))
    job.hold.answered()
    assert job.record.goes_on
    assert job.on_the_gpu == 1
    job.hold.end()
    job.hold.end()
    assert job.is_over().get("failure") is None


def test_one_whose_following_could_not_even_begin_is_over_with_its_request() -> None:
    job = Held().begin()
    job.hold.succeeded(job.exchange)
    job.exchange.end()

    def fail() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        job.hold.follow(fail)
    job.hold.end()
    job.is_over()


def test_nothing_else_gives_the_gpu_back() -> None:
    """A ticket is closed by its place alone, and a place given up by who opened it: a hold, or an
    operator's call, which has no job to settle."""
    package = Path(gpumanager.__file__).parent
    files = [path for room in ("jobs", "web") for path in (package / room).rglob("*.py")]
    sources = {f"{path.parent.name}/{path.name}": path.read_text("utf-8") for path in files}
    closing = {name for name, text in sources.items() if "ticket.close" in text}
    giving_up = {name for name, text in sources.items() if "place.give_up(" in text}
    assert closing == {"jobs/place.py"}
    assert giving_up == {"jobs/hold.py", "jobs/operations.py"}
