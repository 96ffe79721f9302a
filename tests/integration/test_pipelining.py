"""Clients that send the next request before the answer to the last one."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.support.broker import LiveBroker, config_for, live_broker
from tests.support.sockets import ScriptedConsumer
from tests.support.threads import eventually

JOB = b"POST /v1/tts HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"


@pytest.fixture
def broker(held_consumer: ScriptedConsumer) -> Iterator[LiveBroker]:
    with live_broker(config_for(held_consumer.url)) as running:
        yield running


def test_both_jobs_of_a_client_that_stays_are_run_one_after_the_other(
    broker: LiveBroker, held_consumer: ScriptedConsumer, release: threading.Event
) -> None:
    release.set()
    with broker.raw() as client:
        client.send(JOB + JOB)
        for _ in range(2):
            got = client.answer()
            assert (got.status, got.body[:14]) == (200, b'{"done": true}')
            client.buffer = client.buffer.partition(b'{"done": true}')[2]
    assert len(held_consumer.requests) == 2


@pytest.mark.parametrize("ahead", [JOB, JOB + JOB[:30], JOB + JOB])
def test_a_client_that_leaves_with_its_next_request_sent_is_noticed(
    broker: LiveBroker, held_consumer: ScriptedConsumer, release: threading.Event, ahead: bytes
) -> None:
    client = broker.raw().send(JOB + ahead)
    eventually(lambda: held_consumer.requests)
    client.sock.close()
    broker.await_idle(1)
    eventually(lambda: broker.dispatcher.active_count == 0)
    release.set()
    assert broker.post("/v1/tts").status_code == 200
    # The running one was broken off, none of the next was begun.
    assert (len(held_consumer.requests), broker.stats.total_jobs) == (2, 2)


def test_one_that_leaves_while_it_waits_loses_its_place(
    broker: LiveBroker, held_consumer: ScriptedConsumer, release: threading.Event
) -> None:
    with broker.raw() as running:
        running.send(JOB)
        eventually(lambda: held_consumer.requests)
        waiting = broker.raw().send(JOB + JOB)
        broker.await_waiting(1)
        waiting.sock.close()
        eventually(lambda: broker.stats.queue_depth == 0, 1)
        release.set()
        assert running.answer().status == 200
    broker.await_idle()
    assert broker.stats.total_jobs == 1
