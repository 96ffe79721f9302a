"""Jobs that nobody wants any more: who is told, when, and never the next job."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import yaml

from gpumanager.clock import SystemClock
from gpumanager.config import ConsumerConfig, parse_config
from gpumanager.errors import BrokerError, Cancelled, ConsumerUnreachable
from gpumanager.web import departure
from gpumanager.web.departure import Departure
from tests.support.threads import PATIENCE_S, Outcome, eventually


class FakeExchange:
    def __init__(self) -> None:
        self.did: list[str] = []
        self.aborted = False

    def abort(self, error: BrokerError) -> bool:
        self.did.append(f"abort {error.code}")
        self.aborted = True
        return True

    def discard(self, error: BrokerError) -> None:
        self.did.append(f"discard {error.code}")


class FakeCalls:
    def __init__(self) -> None:
        self.told = threading.Semaphore(0)
        self.answer = threading.Event()
        self.answer.set()
        self.busy_answers: list[bool | BrokerError | None] = []

    def cancel(self, name: str) -> None:
        self.told.release()
        assert self.answer.wait(PATIENCE_S)
        raise ConsumerUnreachable("answered 500")  # which is only told of

    def busy(self, name: str) -> bool | None:
        answer = self.busy_answers.pop(0)
        if isinstance(answer, BrokerError):
            raise answer
        return answer


def make(**consumer: Any) -> tuple[Departure, FakeExchange, FakeCalls]:
    document = {"consumers": {"m": {"url": "http://127.0.0.1:1", **consumer}}}
    config: ConsumerConfig = parse_config(yaml.safe_dump(document)).consumers["m"]
    exchange, calls = FakeExchange(), FakeCalls()
    made = Departure("m", config, exchange, calls, SystemClock())  # type: ignore[arg-type]
    return made, exchange, calls


ASKED = {"on_disconnect": "none", "probe": {"path": "/p", "busy": "busy"}}
TOLD = {"on_disconnect": {"path": "/interrupt"}}


@pytest.mark.parametrize(
    ("consumer", "finishes", "left", "cancelled"),
    [
        ({}, False, ["abort client_gone"], ["abort cancelled"]),
        ({"on_disconnect": "none"}, True, [], ["discard cancelled"]),
        (ASKED, False, ["abort client_gone"], ["abort cancelled"]),
        (TOLD, True, [], ["discard cancelled"]),
    ],
    ids=["native", "none", "asked", "told"],
)
def test_what_is_done_about_the_connection(
    consumer: dict[str, Any], finishes: bool, left: list[str], cancelled: list[str]
) -> None:
    one, exchange, _ = make(**consumer)
    assert one.finish_answer is finishes
    one.client_left()
    assert exchange.did == left
    one, exchange, _ = make(**consumer)
    one.cancelled(Cancelled("by the operator"))
    assert exchange.did == cancelled


def test_the_gpu_waits_for_the_call_that_stops_the_job() -> None:
    one, _, calls = make(**TOLD)
    calls.answer.clear()
    one.client_left()
    one.client_left()
    assert calls.told.acquire(timeout=PATIENCE_S)
    settling = Outcome(one.settle)
    assert not settling.done
    calls.answer.set()
    settling.result()
    assert not calls.told.acquire(blocking=False)  # once is enough


def test_a_client_that_leaves_after_its_job_stops_nobody_elses() -> None:
    one, _, calls = make(**TOLD)
    one.settle()
    one.client_left()
    one.cancelled(Cancelled("by the operator"))
    assert not calls.told.acquire(timeout=0.05)


def test_one_that_tells_is_asked_until_it_is_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(departure, "BUSY_POLL_S", 0.001)
    one, _, calls = make(**ASKED)
    calls.busy_answers = [True, ConsumerUnreachable("too busy to say"), True, False, True]
    one.settle()  # its answer was read to its end: there is nothing to ask
    assert len(calls.busy_answers) == 5
    one.client_left()
    one.settle()
    assert calls.busy_answers == [True]


def test_one_that_stays_busy_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(departure, "BUSY_POLL_S", 0.001)
    one, _, calls = make(**ASKED, timeouts={"total": 0.05})
    calls.busy_answers = [True] * 10_000
    one.client_left()
    settling = Outcome(one.settle)
    eventually(lambda: settling.done, 5)
    settling.result()
