"""Shutting down in order: refuse, finish, flush, end."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from gpumanager.clock import Clock
from gpumanager.errors import BrokerError, ShuttingDown
from gpumanager.scheduling.interface import Scheduler
from gpumanager.telemetry.events import ConfigNotReloaded, Draining, Emit

log = logging.getLogger(__name__)

FLUSH_TIMEOUT_S = 5.0
FLUSH_POLL_S = 0.02


class Lifecycle:
    """The drain. `draining` is set from the first signal on, for all to see; `drain_timeout` gives
    the seconds that a running job has, as configured at that moment; `unfinished` counts requests
    still being answered and bytes still to be sent.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        clock: Clock,
        emit: Emit,
        *,
        drain_timeout: Callable[[], float],
        draining: threading.Event,
        unfinished: Callable[[], int],
    ) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._emit = emit
        self._drain_timeout = drain_timeout
        self._unfinished = unfinished
        self._draining = draining
        self._drained = threading.Event()
        self._signalled = False
        self._when_draining: Callable[[], object] = lambda: None
        self._when_idle: Callable[[], object] = lambda: None
        self._when_flushed: Callable[[], object] = lambda: None

    def when_draining(self, action: Callable[[], object]) -> None:
        """Have `action` called when the drain begins."""
        self._when_draining = action

    def when_idle(self, action: Callable[[], object]) -> None:
        """Have `action` called in a drain when no job runs any more."""
        self._when_idle = action

    def when_flushed(self, action: Callable[[], object]) -> None:
        """Have `action` called in a drain when the last answers have had their time."""
        self._when_flushed = action

    def drain(self) -> bool:
        """Refuse new jobs and those in the queue, let running ones finish within `drain_timeout`
        seconds, and the last answers reach their clients. True if nothing was cut off."""
        self._draining.set()
        self._when_draining()
        timeout = self._drain_timeout()
        self._emit(Draining(timeout_ms=round(timeout * 1000)))
        self._scheduler.drain()
        finished = self._scheduler.wait_idle(timeout)
        if not finished:
            self._cut_off()
        self._when_idle()
        deadline = self._clock.monotonic() + FLUSH_TIMEOUT_S
        while self._unfinished() and self._clock.monotonic() < deadline:
            self._drained.wait(FLUSH_POLL_S)
        self._when_flushed()
        self._drained.set()
        log.info("drained", extra={"finished": finished})
        return finished

    def _cut_off(self) -> None:
        for entry in self._scheduler.queue():
            name = entry.job.consumer
            error = ShuttingDown("the broker shut down before the job was done", consumer=name)
            self._scheduler.cancel(entry.ticket, error)

    def end(self) -> None:
        """Drain and end the process, as SIGTERM does. Returns at once; idempotent."""
        if not self._draining.is_set():
            self._draining.set()
            threading.Thread(target=self._drain_and_end, name="drain", daemon=True).start()

    def install_signal_handlers(self, reload: Callable[[], object]) -> None:
        """SIGTERM and SIGINT drain, then end the process with exit code 0; a second one ends
        it at once. SIGHUP calls `reload`, on a thread of its own. The main thread has to be the
        server's; in another, where Python allows no handlers, this does nothing, and ending the
        process is left to the server."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGHUP, lambda *_: self._in_background(reload))

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._drained.is_set():
            raise SystemExit(0)
        if self._signalled:
            os._exit(128 + number)
        self._signalled = True  # the drain may have begun before, without a signal
        self.end()

    def _drain_and_end(self) -> None:
        try:
            self.drain()
        finally:
            self._drained.set()
            # Only the main thread can end the server's loop: wake it with a signal of our own.
            os.kill(os.getpid(), signal.SIGTERM)

    def _in_background(self, reload: Callable[[], object]) -> None:
        def run() -> None:
            try:
                reload()
            except BrokerError as error:
                self._emit(ConfigNotReloaded(reason=error.message))
            except Exception:
                log.exception("reload failed")
                self._emit(ConfigNotReloaded(reason="the broker failed; its log has the details"))

        threading.Thread(target=run, name="reload", daemon=True).start()
