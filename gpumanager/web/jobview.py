"""What a client is told of an asynchronous job."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from gpumanager.asyncjobs.model import AsyncJob
from gpumanager.asyncjobs.service import AsyncJobs, estimated
from gpumanager.clock import rfc3339
from gpumanager.model import QueueEntry
from gpumanager.scheduling.interface import Scheduler


class JobView:
    """Draws jobs up for JSON. `run_s` says how long jobs of a consumer usually take, None where
    that is not known. Safe from any thread."""

    def __init__(
        self, jobs: AsyncJobs, scheduler: Scheduler, run_s: Callable[[str], float | None]
    ) -> None:
        self._jobs = jobs
        self._scheduler = scheduler
        self._run_s = run_s

    def shown(self, job: AsyncJob) -> dict[str, Any]:
        """One job."""
        return self.all_shown([job])[0]

    def all_shown(self, jobs: list[AsyncJob]) -> list[dict[str, Any]]:
        """Several, as of one look at the queue."""
        if all(job.over for job in jobs):
            return [self._one(job, []) for job in jobs]
        queue = list(self._scheduler.queue())
        return [self._one(job, queue) for job in jobs]

    def _one(self, job: AsyncJob, queue: list[QueueEntry]) -> dict[str, Any]:
        state, position, estimate = str(job.state), None, None
        if not job.over:
            state, position, estimate = self._ahead(job, queue)
        return {
            "id": job.id,
            "state": state,
            "kind": job.kind,
            "consumer": job.consumer,
            "position": position,
            "estimate_s": None if estimate is None else round(estimate, 1),
            "created": _time(job.created),
            "started": _time(job.started),
            "ended": _time(job.ended),
            "status": None if job.result is None else job.result.status,
            "urgency": job.urgency,
            **({} if job.failure is None else {"failure": job.failure}),
        }

    def _ahead(
        self, job: AsyncJob, queue: list[QueueEntry]
    ) -> tuple[str, int | None, float | None]:
        """The state of one that is not over; its place among those that wait, counted from 1, 0 if
        it has had its turn; and in how many seconds that is expected, None where that is not
        known."""
        if job.state == "running":
            return "running", 0, 0.0
        own = next((each for each in queue if each.job.request_id == job.id), None)
        if own is not None and own.state == "running":
            return "preparing", 0, 0.0
        if own is not None:
            return "waiting", own.position, own.turn.wait_s
        ahead = self._jobs.ahead(job)
        waiting = sum(each.state == "waiting" for each in queue)
        position = waiting + sum(ahead.values()) + 1
        theirs = estimated(ahead, self._run_s)
        if theirs is None:
            return "waiting", position, None
        return "waiting", position, theirs + sum(each.turn.left_s for each in queue)


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else rfc3339(datetime.fromtimestamp(seconds, UTC))
