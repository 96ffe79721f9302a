"""Threads whose outcome a test can ask for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

PATIENCE_S = 10.0
"""Longest a test waits for something that should come at once."""


class Outcome(Generic[T]):
    """Runs `call` in a thread; `result` waits for it, and raises what it raised."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._value: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="test-call", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:  # handed to the test
            self._error = error

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self, timeout: float = PATIENCE_S) -> T:
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError("the call did not return")
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # set unless the call raised


def eventually(condition: Callable[[], object], timeout: float = PATIENCE_S) -> None:
    """Return once `condition` holds; for what another process or thread will make true."""
    pause = threading.Event()
    waited = 0.0
    while not condition():
        if waited >= timeout:
            raise TimeoutError("the condition did not come true")
        pause.wait(0.01)
        waited += 0.01
