"""Jobs that go on after their answer: followed to their end, whatever the consumer says or not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from gpumanager.clock import SystemClock
from gpumanager.config import ConsumerConfig, Done, Lost, parse_config
from gpumanager.errors import BrokerError, Cancelled, ConsumerTimeout, ConsumerUnreachable
from gpumanager.jobs import polling
from gpumanager.jobs.polling import Completions, job_id
from gpumanager.telemetry.events import CancelFailed, Event, StillBusy
from tests.support.threads import PATIENCE_S

DONE = {
    "match": {"path": "/prompt"},
    "id": "prompt_id",
    "poll": {"path": "/history/{id}", "every": 0.01},
    "until": "length(@) > `0`",
    "lost": {"path": "/queue", "listed": "ids"},
    "cancel": {"path": "/cancel"},
}
BUSY = ConsumerTimeout("no answer within 3 s")
GONE = ConsumerUnreachable("refused", nothing_listens=True)


class FakeCalls:
    """`says` is what each look at the job gives, the last one again and again."""

    def __init__(self, *says: bytes | BrokerError | None) -> None:
        self.says = list(says)
        self.listed: list[bool] = [True]
        self.cancelled = threading.Event()
        self.on_cancel: Callable[[], None] = lambda: None

    def job_result(
        self, name: str, consumer: ConsumerConfig, done: Done, job_id: str
    ) -> bytes | None:
        said = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        if isinstance(said, BrokerError):
            raise said
        return said

    def job_listed(self, name: str, consumer: ConsumerConfig, lost: Lost, job_id: str) -> bool:
        return self.listed.pop(0) if len(self.listed) > 1 else self.listed[0]

    def cancel_job(self, name: str, consumer: ConsumerConfig, done: Done, job_id: str) -> None:
        self.cancelled.set()
        self.on_cancel()


class FakeTicket:
    number = 7

    def __init__(self) -> None:
        self.action: Callable[[BrokerError], object] = lambda error: None

    def when_cancelled(self, action: Callable[[BrokerError], object]) -> None:
        self.action = action


class Followed:
    """One job that is being followed."""

    def __init__(self, calls: FakeCalls, **done: Any) -> None:
        consumer = {"url": "http://127.0.0.1:1", "done": {**DONE, **done}}
        config = parse_config(yaml.safe_dump({"consumers": {"it": consumer}}))
        self.consumer: ConsumerConfig = config.consumers["it"]
        self.ticket = FakeTicket()
        self.over = threading.Event()
        self.outcome: tuple[bytes | None, bool] | None = None
        self.told: list[Event] = []
        self.completions = Completions(calls, SystemClock(), self.told.append)
        self.completions.follow("it", self.consumer, "j1", self.ticket, self._ended)  # type: ignore[arg-type]

    def _ended(self, said: bytes | None, gone: bool) -> None:
        self.outcome = (said, gone)
        self.over.set()

    def wait(self) -> tuple[bytes | None, bool] | None:
        assert self.over.wait(PATIENCE_S)
        return self.outcome


def test_it_ends_when_the_consumer_says_so() -> None:
    assert Followed(FakeCalls(None, None, BUSY, b"{1}")).wait() == (b"{1}", False)


def test_one_look_at_which_it_is_nowhere_is_not_enough() -> None:
    calls = FakeCalls(None, None, None, b"done")
    calls.listed = [True, False, True, True]
    assert Followed(calls).wait() == (b"done", False)


def test_it_ends_when_it_was_nowhere_twice() -> None:
    calls = FakeCalls(None)
    calls.listed = [True, False, False]
    assert Followed(calls).wait() == (None, False)


def test_without_a_list_only_the_time_ends_what_never_says_so() -> None:
    calls = FakeCalls(None)
    followed = Followed(calls, lost=None, timeout=0.1)
    assert followed.wait() == (None, False)
    assert followed.told == [StillBusy(consumer="it", job="j1")]
    assert calls.cancelled.is_set()


def test_a_consumer_whose_process_is_gone_has_ended_all_its_jobs() -> None:
    assert Followed(FakeCalls(None, GONE)).wait() == (None, True)


def test_a_cancelled_job_is_stopped_and_waited_for() -> None:
    calls = FakeCalls(None)
    followed = Followed(calls, poll={"path": "/h", "every": 60})

    def ends() -> None:
        calls.says = [b"interrupted"]

    calls.on_cancel = ends
    followed.ticket.action(Cancelled("the operator cancelled the job"))
    assert followed.wait() == (b"interrupted", False)  # long before the next look was due


def test_one_that_cannot_be_cancelled_is_waited_for_only_so_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(polling, "CANCEL_SETTLE_S", 0.1)
    calls = FakeCalls(None)

    def fail() -> None:
        raise ConsumerUnreachable("it answered 500")

    calls.on_cancel = fail
    followed = Followed(calls)
    followed.ticket.action(Cancelled("the operator cancelled the job"))
    assert followed.wait() == (None, False)
    failed = CancelFailed(consumer="it", job="j1", reason="it answered 500")
    assert followed.told == [failed, StillBusy(consumer="it", job="j1")]


def test_a_broker_that_ends_follows_no_more() -> None:
    followed = Followed(FakeCalls(None))
    followed.completions.stop()
    assert followed.wait() == (None, False)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (b'{"prompt_id": "6f962d0e-40d9"}', "6f962d0e-40d9"),
        (b'{"prompt_id": 41}', "41"),
        (b'{"prompt_id": "../../free"}', None),
        (b'{"prompt_id": ""}', None),
        (b'{"prompt_id": true}', None),
        (b'{"error": "no prompt"}', None),
        (b"not json", None),
        (b"[" * 100_000, None),
    ],
)
def test_an_id_is_a_plain_word(answer: bytes, found: str | None) -> None:
    assert job_id(Done.model_validate(DONE), answer) == found
