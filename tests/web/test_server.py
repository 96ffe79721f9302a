"""What is changed about waitress: its threads, and how it sends."""

from __future__ import annotations

import threading

import pytest

from gpumanager.config import parse_config
from gpumanager.config.schema import MOST_TOLD
from gpumanager.web.server import FIRST_THREADS, GrowingDispatcher, _most_at_once
from tests.support.broker import config_for, live_broker
from tests.support.sockets import ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S, eventually


class Task:
    """Runs until it is let go."""

    def __init__(self, go_on: threading.Event) -> None:
        self._go_on = go_on
        self.began = threading.Event()

    def service(self) -> None:
        self.began.set()
        self._go_on.wait(PATIENCE_S)

    def cancel(self) -> None:
        pass


def test_threads_come_when_they_are_needed_and_no_more_than_there_may_be() -> None:
    dispatcher = GrowingDispatcher()
    dispatcher.set_thread_count(20)
    go_on = threading.Event()
    try:
        assert len(dispatcher.threads) == FIRST_THREADS
        tasks = [Task(go_on) for _ in range(25)]
        for task in tasks[:20]:
            dispatcher.add_task(task)
        for task in tasks[:20]:
            assert task.began.wait(PATIENCE_S)
        for task in tasks[20:]:
            dispatcher.add_task(task)
        assert len(dispatcher.threads) == 20
        go_on.set()
        for task in tasks[20:]:
            assert task.began.wait(PATIENCE_S)
    finally:
        go_on.set()
        dispatcher.shutdown()
    assert not dispatcher.threads


def test_a_thread_that_cannot_start_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dispatcher = GrowingDispatcher()
    dispatcher.set_thread_count(20)
    go_on = threading.Event()
    try:
        eventually(lambda: dispatcher.active_count == 0)
        tasks = [Task(go_on) for _ in range(FIRST_THREADS + 2)]
        for task in tasks[:FIRST_THREADS]:
            dispatcher.add_task(task)
        for task in tasks[:FIRST_THREADS]:
            assert task.began.wait(PATIENCE_S)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            dispatcher.add_task(tasks[FIRST_THREADS])
        assert "no thread" in caplog.text
        assert len(dispatcher.threads) == FIRST_THREADS
        dispatcher.add_task(tasks[FIRST_THREADS + 1])  # with two to do, there is one to be had
        assert tasks[FIRST_THREADS].began.wait(PATIENCE_S)
        go_on.set()
        assert tasks[FIRST_THREADS + 1].began.wait(PATIENCE_S)
    finally:
        go_on.set()
        dispatcher.shutdown()
    assert not dispatcher.threads


def refuse(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_tasks_one_after_the_other_need_no_more_threads() -> None:
    dispatcher = GrowingDispatcher()
    dispatcher.set_thread_count(20)
    done = threading.Event()
    done.set()
    try:
        for _ in range(100):
            eventually(lambda: dispatcher.active_count == 0)
            task = Task(done)
            dispatcher.add_task(task)
            assert task.began.wait(PATIENCE_S)
        assert len(dispatcher.threads) == FIRST_THREADS
    finally:
        dispatcher.shutdown()


def test_a_small_answer_comes_in_one_piece() -> None:
    with (
        ScriptedConsumer(lambda peer, _: peer.send(answer(b"x" * 300))) as consumer,
        live_broker(config_for(consumer.url)) as broker,
        broker.raw() as raw,
    ):
        raw.request("POST", "/v1/tts", b"{}")
        piece = raw.sock.recv(65536)
        assert piece.endswith(b"\r\n\r\n" + b"x" * 300)


def test_there_are_threads_for_all_jobs_that_a_server_may_say_it_works_on_at_once() -> None:
    consumer = {"max_parallel": "auto", "slots": {"path": "/x", "count": "n"}, "health": "/h"}
    auto = parse_config(config_for("http://127.0.0.1:1", consumer=consumer))
    assert _most_at_once(auto) == MOST_TOLD
    assert _most_at_once(parse_config(config_for("http://127.0.0.1:1"))) == 1
