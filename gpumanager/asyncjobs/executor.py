"""Runs the jobs that wait, a few at a time: they cost no thread until then."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import closing
from io import BytesIO
from typing import IO, Protocol

from gpumanager.asyncjobs.files import Draft
from gpumanager.asyncjobs.model import AsyncJob, Ended, Result
from gpumanager.asyncjobs.pauses import Pauses
from gpumanager.asyncjobs.run import OF_THE_JOB, SHUTTING_DOWN, UNWANTED, WAIT_AGAIN, Outcome, Run
from gpumanager.asyncjobs.store import Store
from gpumanager.clock import Clock
from gpumanager.errors import BrokerError, InternalError, JobsFull
from gpumanager.worker import JOIN_TIMEOUT_S

log = logging.getLogger(__name__)

KEEP_AGAIN_S = 5.0
"""Between two tries to keep how a job ended, while the disk is full."""

LOOK_S = 1.0
"""The longest that a feeder does not look whether it is to end."""


class Play(Protocol):
    """Has a job answered as if its client sent it now."""

    def __call__(self, job: AsyncJob, body: IO[bytes], length: int, run: Run) -> Outcome:
        """Give the body of the answer to `run.write`. Returns once all of it is there."""


class Executor:
    """`feeders` threads take the next of those that wait, by urgency, then as they came, and run
    each by `play`. `ended` is told of each that is over, `changed` of any other change;
    `keep_s`: so long is one tried that cannot be run. While `draining`, none is begun."""

    def __init__(
        self,
        store: Store,
        play: Play,
        clock: Clock,
        *,
        feeders: int,
        keep_s: float,
        draining: Callable[[], bool],
        ended: Callable[[AsyncJob], object],
        changed: Callable[[], object],
    ) -> None:
        self._store = store
        self._play = play
        self._clock = clock
        self._keep_s = keep_s
        self._draining = draining
        self._ended = ended
        self._changed = changed
        self._pauses = Pauses(clock)
        self._lock = threading.Lock()
        self._taking = threading.Condition(self._lock)
        self._runs: dict[str, Run | None] = {}
        self._to_join: str | None = None
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._feed, name=f"async-{number}", daemon=True)
            for number in range(1, feeders + 1)
        ]

    def start(self) -> None:
        """Run what waits."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Begin none any more, and wait for the threads; how a job ends that still runs is not kept
        then. Idempotent."""
        self._stopped.set()
        with self._lock:
            self._taking.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(JOIN_TIMEOUT_S)

    def wake(self) -> None:
        """Another one waits."""
        with self._lock:
            self._taking.notify()

    def cancel(self, job_id: str) -> None:
        """Nobody wants it any more: end its run, if it has one."""
        with self._lock:
            run = self._runs.get(job_id)
        if run is not None:
            run.cancelled.set()

    def taken(self) -> frozenset[str]:
        """Those that a feeder has: they are on their way to the GPU, or run."""
        with self._lock:
            return frozenset(self._runs)

    # -- the feeders ---------------------------------------------------------------------------

    def _feed(self) -> None:
        while not self._stopped.is_set():
            try:
                job = self._next()
                if job is not None:
                    self._run(job)
            except Exception:
                log.exception("an asynchronous job failed")
                self._stopped.wait(LOOK_S)

    def _next(self) -> AsyncJob | None:
        """Take the next one; None after a while without any."""
        with self._lock:
            free = self._to_join is None  # or a later one could have its place before it
            if free and not self._draining() and not self._stopped.is_set():
                consumers, jobs = self._pauses.now()
                most = len(self._runs) + len(jobs) + 1
                for job in self._store.next_ones(most, consumers):
                    if job.id not in self._runs and job.id not in jobs:
                        self._runs[job.id] = None
                        self._to_join = job.id
                        return job
            self._taking.wait(LOOK_S)
            return None

    def _is_under_way(self, job: AsyncJob) -> None:
        """It has its place in the queue, or does not want one any more."""
        with self._lock:
            if self._to_join == job.id:
                self._to_join = None
                self._taking.notify()

    def _run(self, job: AsyncJob) -> None:
        draft = self._store.result_draft(job)
        run = Run(
            job,
            lambda consumer: self._sending(job, consumer),
            lambda: self._is_under_way(job),
            draft,
        )
        with self._lock:
            self._runs[job.id] = run
        try:
            current = self._store.find(job.id)  # it may have been cancelled, before it was taken
            if current is None or current.over:
                return
            if current.cancelling:
                self._end(run, draft, "cancelled")
                return
            self._settle(run, draft, self._played(run))
        finally:
            draft.close()
            self._is_under_way(job)
            with self._lock:
                del self._runs[job.id]
            self._changed()

    def _played(self, run: Run) -> Outcome:
        try:
            body, length = self._store.body(run.job)
            with closing(BytesIO(body) if isinstance(body, bytes) else body) as source:
                return self._play(run.job, source, length, run)
        except Exception as error:
            log.exception("an asynchronous job failed", extra={"request_id": run.job.id})
            failed: BrokerError = InternalError("the broker failed; its log has the details")
            if isinstance(error, BrokerError):
                failed = error
            return Outcome(Result(failed.status), failed.code, broke_off=failed)

    def _sending(self, job: AsyncJob, consumer: str) -> bool:
        begun = self._store.sending(job, consumer, self._now())
        if begun:
            self._pauses.over(consumer, job.id)
            self._changed()
        return begun

    def _settle(self, run: Run, draft: Draft, outcome: Outcome) -> None:
        job, failure = run.job, outcome.failure
        unwanted = failure in UNWANTED or (run.cancelled.is_set() and failure is not None)
        if not run.sent and failure in WAIT_AGAIN and not unwanted:
            if self._stopped.is_set() or failure == SHUTTING_DOWN:
                return  # the next broker has it
            if self._now() - job.created < self._keep_s:
                of_it = failure in OF_THE_JOB
                self._pauses.note(job.consumer, job.id if of_it else None, outcome.retry_after)
                return
        if run.sent and failure == SHUTTING_DOWN:
            return  # cut off: the next broker says what becomes of it
        if run.followed and failure is None:
            while not run.ended.wait(LOOK_S):
                if self._stopped.is_set():
                    return
            if self._stopped.is_set():
                return  # it goes on at its consumer, and nobody follows it any more
            failure = run.failure
            unwanted = run.cancelled.is_set()  # its consumer was told to stop it
        if unwanted:
            self._end(run, draft, "cancelled")
        elif outcome.broke_off is not None:
            self._fail(run, draft, outcome.broke_off)
        elif run.unkept is not None:
            self._fail(run, draft, JobsFull("the answer could not be kept: the disk is full"))
        else:
            state: Ended = "failed" if failure or outcome.answer.status >= 400 else "done"
            self._end(run, draft, state, failure=failure, answer=outcome.answer)

    def _fail(self, run: Run, draft: Draft, error: BrokerError) -> None:
        draft.drop()
        said = self._store.short(error.payload())
        headers = (("Content-Type", "application/json"), ("Content-Length", str(said.size)))
        answer = Result(error.status, "", headers)
        self._end(run, said, "failed", failure=error.code, answer=answer)

    def _end(
        self,
        run: Run,
        body: Draft,
        state: Ended,
        *,
        failure: str | None = None,
        answer: Result | None = None,
    ) -> None:
        """Keep how it ended: as long as the disk is full, try again."""
        if answer is None:
            body.drop()
        while True:
            try:
                over = self._store.ended(
                    run.job,
                    state,
                    self._now(),
                    failure=failure,
                    result=answer,
                    body=None if answer is None else body,
                )
                break
            except JobsFull as error:
                log.warning(
                    "the end of an asynchronous job is not kept yet",
                    extra={"job": run.job.id, "reason": error.message},
                )
                if self._stopped.wait(KEEP_AGAIN_S):
                    return
        if over is not None:
            self._ended(over)

    def _now(self) -> float:
        return self._clock.now().timestamp()
