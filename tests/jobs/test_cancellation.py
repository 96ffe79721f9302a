"""Jobs that nobody wants any more: who is told, when, and never the next job."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import yaml

from gpumanager.clock import SystemClock
from gpumanager.config import ConsumerConfig, parse_config
from gpumanager.errors import BrokerError, Cancelled, ConsumerUnreachable
from gpumanager.jobs import cancellation
from gpumanager.jobs.cancellation import Cancellation
from gpumanager.telemetry.events import CancelFailed, Event, StillBusy
from tests.support.threads import PATIENCE_S, Outcome, eventually


class FakeExchange:
    """That of a job which was sent, and whose answer has not ended yet."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.reached = True
        self.status = 200
        self.consumer_done = self.aborted = self.timed_out = self.kept = False
        self.ends = True

    def keep_for_its_end(self) -> None:
        self.kept = True

    def abort(self, error: BrokerError) -> bool:
        if self.consumer_done:
            return False
        self.did.append(f"abort {error.code}")
        self.aborted = True
        return True

    def discard(self, error: BrokerError) -> None:
        self.did.append(f"discard {error.code}")

    def drain(self) -> None:
        self.did.append("drain")
        self.consumer_done = True

    def await_its_end(self, seconds: float) -> bool:
        self.did.append("await its end" if seconds > 0 else "look for its end")
        return self.ends

    def end(self, *, timed_out: bool = False) -> None:
        self.consumer_done, self.timed_out = True, timed_out


class FakeCalls:
    def __init__(self) -> None:
        self.told = threading.Semaphore(0)
        self.answer = threading.Event()
        self.answer.set()
        self.busy_answers: list[bool | BrokerError | None] = []
        self.told_of: list[Event] = []

    def cancel(self, name: str, consumer: ConsumerConfig) -> None:
        self.told.release()
        assert self.answer.wait(PATIENCE_S)
        raise ConsumerUnreachable("answered 500")  # which is only told of

    def busy(self, name: str, consumer: ConsumerConfig) -> bool | None:
        answer = self.busy_answers.pop(0)
        if isinstance(answer, BrokerError):
            raise answer
        return answer


def make(**consumer: Any) -> tuple[Cancellation, FakeExchange, FakeCalls]:
    document = {"consumers": {"m": {"url": "http://127.0.0.1:1", **consumer}}}
    config: ConsumerConfig = parse_config(yaml.safe_dump(document)).consumers["m"]
    exchange, calls = FakeExchange(), FakeCalls()
    made = Cancellation("m", config, exchange, calls, SystemClock(), calls.told_of.append)  # type: ignore[arg-type]
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
    one, exchange, calls = make(**TOLD)
    calls.answer.clear()
    one.client_left()
    one.client_left()
    assert calls.told.acquire(timeout=PATIENCE_S)
    exchange.end()
    assert not one.settled_already()
    settling = Outcome(one.settle)
    assert not settling.done
    calls.answer.set()
    settling.result()
    assert not calls.told.acquire(blocking=False)  # once is enough


@pytest.mark.parametrize("ending", ["settle", "settled_already"])
def test_a_client_that_leaves_after_its_job_stops_nobody_elses(ending: str) -> None:
    one, exchange, calls = make(**TOLD)
    exchange.end()
    getattr(one, ending)()
    one.client_left()
    one.cancelled(Cancelled("by the operator"))
    assert not calls.told.acquire(timeout=0.05)


def test_one_that_tells_is_asked_until_it_is_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancellation, "BUSY_POLL_S", 0.001)
    says: list[bool | BrokerError | None] = [
        True,
        ConsumerUnreachable("too busy to say"),
        True,
        False,
        True,
    ]
    one, exchange, calls = make(**ASKED)
    calls.busy_answers = list(says)
    exchange.end()
    assert one.settled_already()
    one.settle()  # its answer was read to its end: there is nothing to ask
    assert calls.busy_answers == says

    one, exchange, calls = make(**ASKED)
    calls.busy_answers = list(says)
    one.client_left()
    exchange.end()
    assert not one.settled_already()
    one.settle()
    assert calls.busy_answers == [True]


def test_one_whose_process_has_ended_is_at_rest() -> None:
    one, exchange, calls = make(**ASKED)
    calls.busy_answers = [ConsumerUnreachable("refused", nothing_listens=True)]
    exchange.end(timed_out=True)
    one.settle()
    assert calls.busy_answers == []


def test_one_that_stays_busy_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancellation, "BUSY_POLL_S", 0.001)
    one, _, calls = make(**ASKED, timeouts={"total": 0.05})
    calls.busy_answers = [True] * 10_000
    one.client_left()
    settling = Outcome(one.settle)
    eventually(lambda: settling.done, 5)
    settling.result()


@pytest.mark.parametrize(
    ("consumer", "did"),
    [
        ({}, ["abort client_gone"]),
        ({"on_disconnect": "none"}, ["drain"]),
        (ASKED, ["abort client_gone"]),
        (TOLD, ["drain"]),
    ],
    ids=["native", "none", "asked", "told"],
)
def test_an_answer_that_nobody_took_to_its_end_is_seen_to(
    consumer: dict[str, Any], did: list[str]
) -> None:
    one, exchange, calls = make(**consumer)
    calls.busy_answers = [False]
    assert not one.settled_already()
    one.settle()
    assert exchange.did == did
    assert calls.told.acquire(blocking=False) == (consumer is TOLD)
    assert calls.busy_answers == ([] if consumer is ASKED else [False])


@pytest.mark.parametrize(
    ("consumer", "did"),
    [
        ({}, []),
        ({"on_disconnect": "none"}, ["await its end"]),
        (ASKED, []),
        (TOLD, ["await its end"]),
        ({**ASKED, **TOLD}, []),
    ],
    ids=["native", "none", "asked", "told", "told and asked"],
)
def test_after_a_time_out_the_consumer_is_told_and_waited_for(
    consumer: dict[str, Any], did: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancellation, "BUSY_POLL_S", 0.001)
    one, exchange, calls = make(**consumer)
    calls.busy_answers = [True, False]
    assert exchange.kept == bool(did)
    exchange.end(timed_out=True)
    assert one.settled_already() == (consumer == {})
    one.settle()
    assert exchange.did == did
    assert calls.told.acquire(blocking=False) == ("path" in str(consumer.get("on_disconnect")))
    assert calls.busy_answers == ([] if "probe" in consumer else [True, False])


def test_one_that_was_not_even_reached_is_at_rest() -> None:
    one, exchange, calls = make(**TOLD)
    exchange.reached = False
    exchange.end(timed_out=True)
    assert one.settled_already()
    one.settle()
    assert exchange.did == []
    assert not calls.told.acquire(blocking=False)


def test_one_that_was_told_is_given_time_to_end_even_if_its_own_is_up() -> None:
    one, exchange, calls = make(**TOLD, timeouts={"total": 0.001})
    threading.Event().wait(0.01)
    exchange.end(timed_out=True)
    exchange.ends = False
    one.settle()
    assert exchange.did == ["await its end"]
    failed = CancelFailed(consumer="m", reason="answered 500")
    assert calls.told_of == [failed, StillBusy(consumer="m")]


def test_without_a_thread_to_be_had_the_jobs_own_tells_the_consumer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, exchange, calls = make(**TOLD)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    one.client_left()
    assert not calls.told.acquire(blocking=False)
    exchange.end()
    assert not one.settled_already()
    one.settle()
    assert calls.told.acquire(blocking=False)
