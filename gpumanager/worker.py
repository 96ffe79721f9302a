"""Threads with a name, an owner and an end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 5.0


class PeriodicWorker:
    """A daemon thread that calls `body` again and again.

    `body` returns the seconds until its next call, so that it can back off. An exception in it
    is logged, and the next call comes after `retry_s`: a worker never dies silently.
    `start` and `stop` are idempotent; a stopped worker cannot be started again.
    """

    def __init__(self, name: str, body: Callable[[], float], *, retry_s: float) -> None:
        self.name = name
        self._body = body
        self._retry_s = retry_s
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._started = False

    def start(self) -> None:
        with self._lock:
            if not self._started and not self._stop.is_set():
                self._started = True
                self._thread.start()

    def wake(self) -> None:
        """Have the next call come now."""
        self._wake.set()

    def stop(self) -> None:
        """Ask it to end; `join` waits for it."""
        self._stop.set()
        self._wake.set()

    def join(self, timeout: float = JOIN_TIMEOUT_S) -> bool:
        """True once it has ended (or never began); False after `timeout` seconds."""
        with self._lock:
            started = self._started
        if started:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                delay = self._body()
            except Exception:
                log.exception("worker failed", extra={"worker": self._thread.name})
                delay = self._retry_s
            self._wake.wait(min(delay, threading.TIMEOUT_MAX))
            self._wake.clear()
