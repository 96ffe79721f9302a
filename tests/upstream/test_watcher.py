"""One sweep looks after everything that waits."""

from __future__ import annotations

import logging

import pytest

from gpumanager.upstream.watcher import Watcher


def test_an_action_is_called_once_when_its_condition_comes_true() -> None:
    watcher, due, calls = Watcher(), [False], []
    watcher.watch(lambda: due[0], lambda: calls.append("left"))
    watcher.sweep()
    assert calls == []
    due[0] = True
    watcher.sweep()
    watcher.sweep()
    assert calls == ["left"]
    assert len(watcher) == 0


def test_what_was_stopped_is_not_called() -> None:
    watcher, calls = Watcher(), []
    stop = watcher.watch(lambda: True, lambda: calls.append("left"))
    stop()
    stop()
    watcher.sweep()
    assert calls == []
    assert len(watcher) == 0


def test_one_that_fails_does_not_keep_the_others_from_being_seen(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watcher, calls = Watcher(), []
    watcher.watch(lambda: 1 // 0 == 0, lambda: None)
    watcher.watch(lambda: True, lambda: 1 // 0)
    watcher.watch(lambda: True, lambda: calls.append("left"))
    with caplog.at_level(logging.ERROR):
        watcher.sweep()
    assert calls == ["left"]
    assert len(watcher) == 0
    assert [record.message for record in caplog.records] == ["watch failed", "watch failed"]


def test_an_action_may_watch_something_else() -> None:
    watcher, calls = Watcher(), []
    watcher.watch(lambda: True, lambda: watcher.watch(lambda: True, lambda: calls.append("second")))
    watcher.sweep()
    watcher.sweep()
    assert calls == ["second"]
