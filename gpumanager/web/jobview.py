"""What a client is told of an asynchronous job."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from gpumanager.asyncjobs.model import AsyncJob, Callback, Result
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

    def all_shown(self, jobs: Sequence[AsyncJob]) -> list[dict[str, Any]]:
        """Several, as of one look at the queue."""
        if all(job.over for job in jobs):
            return [_shown(job, str(job.state)) for job in jobs]
        queue = list(self._scheduler.queue())
        entries = {entry.job.request_id: entry for entry in queue}
        ahead = self._ahead(jobs, queue, entries)
        return [self._one(job, entries.get(job.id), ahead.get(job.id)) for job in jobs]

    def _one(
        self, job: AsyncJob, own: QueueEntry | None, ahead: tuple[int, float | None] | None
    ) -> dict[str, Any]:
        """`own` is its entry in the queue, if it is there; `ahead`: see `_ahead`."""
        model = job.model if own is None or own.job.model is None else own.job.model
        if job.over:
            return _shown(job, str(job.state), model)
        if job.state == "running":
            return _shown(job, "running", model, 0, 0.0)
        if own is not None and own.state == "running":
            return _shown(job, "preparing", model, 0, 0.0)
        if own is not None:
            return _shown(job, "waiting", model, own.position, own.turn.wait_s)
        return _shown(job, "waiting", model, *(ahead or (None, None)))

    def _ahead(
        self, jobs: Sequence[AsyncJob], queue: list[QueueEntry], entries: Mapping[str, QueueEntry]
    ) -> dict[str, tuple[int, float | None]]:
        """Of those that wait on disk: the place among all that wait, counted from 1, and in how
        many seconds their turn is expected, None where that is not known. Those that wait before
        them are counted once, however many are shown."""
        on_disk = [job for job in jobs if job.state == "waiting" and job.id not in entries]
        waiting = sum(each.state == "waiting" for each in queue)
        queued = sum(each.turn.left_s for each in queue)
        found: dict[str, tuple[int, float | None]] = {}
        counts: Counter[str] = Counter()
        before: AsyncJob | None = None
        for job in sorted(on_disk, key=lambda each: (each.urgency, each.number)):
            counts.update(self._jobs.ahead(job, before))
            theirs = estimated(counts, self._run_s)
            place = waiting + counts.total() + 1
            found[job.id] = place, None if theirs is None else theirs + queued
            before = job
        return found


def _shown(
    job: AsyncJob,
    state: str,
    model: str | None = None,
    position: int | None = None,
    estimate: float | None = None,
) -> dict[str, Any]:
    result = job.result
    return {
        "id": job.id,
        "state": state,
        "kind": job.kind,
        "consumer": job.consumer,
        "model": model or job.model,
        "requester": job.requester,
        "position": position,
        "estimate_s": None if estimate is None else round(estimate, 1),
        "created": _time(job.created),
        "started": _time(job.started),
        "ended": _time(job.ended),
        "status": None if result is None else result.status,
        "content_type": None if result is None else _content_type(result),
        "bytes": None if result is None else result.size,
        "urgency": job.urgency,
        **({} if job.failure is None else {"failure": job.failure}),
        **({} if job.callback is None else {"callback": _called(job, job.callback)}),
    }


def _content_type(result: Result) -> str | None:
    return next((value for name, value in result.headers if name.lower() == "content-type"), None)


def _called(job: AsyncJob, callback: Callback) -> dict[str, Any]:
    due = callback.due if callback.attempts else job.ended
    return {
        "url": callback.url,
        "state": callback.state,
        "attempts": callback.attempts,
        "next": _time(due) if callback.state == "pending" else None,
        **({} if callback.failure is None else {"failure": callback.failure}),
    }


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else rfc3339(datetime.fromtimestamp(seconds, UTC))
