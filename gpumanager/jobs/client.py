"""The client of a request, which may leave at any time."""

from __future__ import annotations

import threading
from collections.abc import Callable

from gpumanager.jobs.record import RequestRecord
from gpumanager.upstream.watcher import Watcher


class ClientWatch:
    """Notices that the client left, and does what fits the stage the request has reached."""

    def __init__(self, record: RequestRecord, watcher: Watcher) -> None:
        self._lock = threading.Lock()
        self._gone = False
        self._action: Callable[[], object] | None = None
        self._stop = None if record.gone is None else watcher.watch(record.gone, self._left)

    def when_gone(self, action: Callable[[], object] | None) -> None:
        """From now on do `action` when the client leaves: at once, if it has left already."""
        with self._lock:
            self._action = action
            gone = self._gone
        if gone and action is not None:
            action()

    def stop(self) -> None:
        """Stop looking whether the client has left. Idempotent."""
        if self._stop is not None:
            self._stop()

    def _left(self) -> None:
        with self._lock:
            self._gone = True
            action = self._action
        if action is not None:
            action()
