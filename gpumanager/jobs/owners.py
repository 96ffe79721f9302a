"""Whose the jobs are that go on at a consumer after its answer, so that nobody stops another's."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from gpumanager.errors import Forbidden
from gpumanager.jobs.record import RequestRecord


class Owners:
    """By the ids that the consumers gave them; for as long as they go on. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys: dict[tuple[str, str], str | None] = {}

    def began(self, consumer: str, job: str, key: str | None) -> None:
        """A job of this key goes on; None: there are no keys."""
        with self._lock:
            self._keys[consumer, job] = key

    def ended(self, consumer: str, job: str) -> None:
        """It is over. Idempotent."""
        with self._lock:
            self._keys.pop((consumer, job), None)

    def check(self, record: RequestRecord, consumer: str, jobs: Iterable[str] | None) -> None:
        """Whether a request may stop `jobs` of a consumer; None: whatever it works on. A key with
        the role client may stop its own only. Raises Forbidden."""
        if record.whose is None:
            return
        with self._lock:
            going_on = {job: key for (name, job), key in self._keys.items() if name == consumer}
        wanted = going_on if jobs is None else {job: going_on.get(job) for job in jobs}
        if not wanted:
            raise Forbidden(f"{consumer} works on no job of key '{record.key}'", consumer=consumer)
        for job, key in wanted.items():
            if key != record.whose:
                shown = f"job {job[:64]}" if jobs is not None else f"what {consumer} works on"
                raise Forbidden(
                    f"{shown} is not a job of key '{record.key}' that goes on; only a key with the "
                    "role admin may stop those of others",
                    consumer=consumer,
                )
