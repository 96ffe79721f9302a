"""Fixtures that several of these tests share."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.support.sockets import Connection, Received, ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S


@pytest.fixture
def release() -> threading.Event:
    """Set it, and the held consumer answers."""
    return threading.Event()


@pytest.fixture
def held_consumer(release: threading.Event) -> Iterator[ScriptedConsumer]:
    """A consumer whose every job waits for `release`."""

    def hold(connection: Connection, _: Received) -> None:
        release.wait(PATIENCE_S)
        connection.send(answer(b'{"done": true}'))

    with ScriptedConsumer(hold) as running:
        yield running
        release.set()
