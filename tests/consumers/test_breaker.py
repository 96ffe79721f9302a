"""The breaker: opens after failures in a row, pauses longer and longer, tries once."""

from __future__ import annotations

import pytest

from gpumanager.consumers.admission import Admission
from gpumanager.consumers.breaker import FAILURES_TO_OPEN, LONGEST_PAUSE_S, Breakers
from gpumanager.errors import ConsumerUnhealthy
from gpumanager.telemetry.events import BreakerClosed, BreakerOpen, Event
from tests.support.clock import FakeClock
from tests.support.known import registry_of


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def told() -> list[Event]:
    return []


@pytest.fixture
def breakers(clock: FakeClock, told: list[Event]) -> Breakers:
    return Breakers(clock, told.append)


def trip(breakers: Breakers, name: str = "mvoice") -> None:
    for _ in range(FAILURES_TO_OPEN):
        assert breakers.begin(name) is None
        breakers.failed(name)


def test_a_few_failures_are_forgiven(breakers: Breakers) -> None:
    for _ in range(FAILURES_TO_OPEN - 1):
        breakers.failed("mvoice")
    assert breakers.refusal("mvoice") is None
    breakers.succeeded("mvoice")
    for _ in range(FAILURES_TO_OPEN - 1):
        breakers.failed("mvoice")
    assert breakers.state("mvoice") == "closed"


def test_failures_in_a_row_open_it_for_that_consumer_alone(breakers: Breakers) -> None:
    trip(breakers)
    assert breakers.state("mvoice") == "open"
    assert breakers.refusal("mvoice") == 1
    assert breakers.begin("mvoice") == 1
    assert breakers.refusal("ollama") is None


def test_after_the_pause_one_trial_goes_through(breakers: Breakers, clock: FakeClock) -> None:
    trip(breakers)
    clock.advance(1)
    assert breakers.refusal("mvoice") is None
    assert breakers.begin("mvoice") is None
    assert breakers.state("mvoice") == "trial"
    assert breakers.begin("mvoice") is not None
    assert breakers.refusal("mvoice") is not None
    breakers.succeeded("mvoice")
    assert breakers.state("mvoice") == "closed"
    assert breakers.begin("mvoice") is None


def test_a_trial_that_fails_doubles_the_pause_up_to_a_bound(
    breakers: Breakers, clock: FakeClock
) -> None:
    trip(breakers)
    pauses = []
    for _ in range(9):
        pause = breakers.refusal("mvoice")
        assert pause is not None
        pauses.append(pause)
        clock.advance(pause)
        assert breakers.begin("mvoice") is None
        breakers.failed("mvoice")
    assert pauses[:4] == [1, 2, 4, 8]
    assert pauses[-1] == LONGEST_PAUSE_S


def test_a_trial_that_says_nothing_makes_way_for_another(
    breakers: Breakers, clock: FakeClock
) -> None:
    trip(breakers)
    clock.advance(1)
    breakers.begin("mvoice")
    breakers.abandoned("mvoice")
    assert breakers.state("mvoice") == "open"
    assert breakers.begin("mvoice") is None
    breakers.abandoned("ollama")
    assert breakers.state("ollama") == "closed"


def test_opening_and_closing_are_events(breakers: Breakers, told: list[Event]) -> None:
    trip(breakers)
    breakers.succeeded("mvoice")
    breakers.succeeded("mvoice")
    assert told == [
        BreakerOpen(consumer="mvoice", failures=FAILURES_TO_OPEN, pause_ms=1000),
        BreakerClosed(consumer="mvoice"),
    ]


def test_admission_looks_at_probe_and_breaker(breakers: Breakers, clock: FakeClock) -> None:
    registry = registry_of({"mvoice": True}, clock)
    admission = Admission(registry, breakers, retry_s=5)
    admission.check("mvoice")
    trip(breakers)
    for ask in (admission.check, admission.begin):
        with pytest.raises(ConsumerUnhealthy) as refused:
            ask("mvoice")
        assert refused.value.retry_after == 1
    breakers.succeeded("mvoice")
    registry.probe_failed("mvoice", "answered 500")
    with pytest.raises(ConsumerUnhealthy, match="answered 500") as refused:
        admission.check("mvoice")
    assert refused.value.retry_after == 5


def test_it_is_known_since_when_it_is_open(breakers: Breakers, clock: FakeClock) -> None:
    assert breakers.opened_at("mvoice") is None
    trip(breakers)
    opened = clock.monotonic()
    assert breakers.opened_at("mvoice") == opened
    clock.advance(LONGEST_PAUSE_S)
    breakers.begin("mvoice")
    breakers.failed("mvoice")
    assert breakers.opened_at("mvoice") == opened
    breakers.succeeded("mvoice")
    assert breakers.opened_at("mvoice") is None


def test_it_is_known_why_it_is_open(breakers: Breakers) -> None:
    breakers.failed("mvoice", "refused the connection")
    assert breakers.reason("mvoice") == ""  # once is nothing yet
    breakers.failed("mvoice", "refused the connection")
    breakers.failed("mvoice", "no answer within 5 s")
    assert breakers.reason("mvoice") == "no answer within 5 s"
    breakers.succeeded("mvoice")
    assert breakers.reason("mvoice") == ""


def test_another_consumer_of_that_name_begins_anew(breakers: Breakers) -> None:
    trip(breakers)
    breakers.forget("mvoice")
    assert breakers.refusal("mvoice") is None
