"""How much of the queue one requester may have, so that nobody fills it alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial

from gpumanager.errors import QueueFull
from gpumanager.model import Job


class Shares:
    """Counts the jobs that each requester has in the queue, running ones included. `of_keys` are
    the bounds of the API keys that have one of their own, by name; `most` is that of everybody
    else, None for no bound. Safe from any thread."""

    def __init__(self, of_keys: Mapping[str, int] | None = None, most: int | None = None) -> None:
        self._of_keys = of_keys or {}
        self._most = most
        self._lock = threading.Lock()
        self._queued: dict[str, int] = {}

    def enter(self, job: Job) -> Callable[[], None] | None:
        """Count a job of its requester's. Returns what is to be called once when it is out of the
        queue, and off the GPU; None if nothing bounds them. Raises QueueFull over the bound."""
        bound = self._most if job.key is None else self._of_keys.get(job.key, self._most)
        if bound is None:
            return None
        requester = job.requester
        with self._lock:
            queued = self._queued.get(requester, 0)
            if queued < bound:
                self._queued[requester] = queued + 1
                return partial(self._leave, requester)
        whose = f"key '{job.key}'" if job.key is not None else f"the client at {requester}"
        raise QueueFull(
            f"{queued} jobs of {whose} are in the queue, and it may have no more", retry_after=1
        )

    def _leave(self, requester: str) -> None:
        with self._lock:
            left = self._queued[requester] - 1
            if left:
                self._queued[requester] = left
            else:
                del self._queued[requester]  # there are more addresses than memory
