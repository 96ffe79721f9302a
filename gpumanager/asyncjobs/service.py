"""Asynchronous jobs as the rest of the broker knows them: submit one, look at it, cancel it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO

from gpumanager.asyncjobs.callbacks import Callbacks
from gpumanager.asyncjobs.executor import Executor, Play
from gpumanager.asyncjobs.files import pieces
from gpumanager.asyncjobs.model import KEPT_STATES, AsyncJob, Ended, Submission
from gpumanager.asyncjobs.store import Store
from gpumanager.clock import Clock
from gpumanager.config import Config
from gpumanager.errors import Cancelled, JobsFull, NotFound, ShuttingDown
from gpumanager.jobs.record import RequestRecord
from gpumanager.scheduling.interface import Scheduler
from gpumanager.telemetry.events import (
    AsyncJobEnded,
    AsyncJobsResumed,
    AsyncJobsSwept,
    AsyncJobsUnavailable,
    Emit,
)
from gpumanager.worker import PeriodicWorker

log = logging.getLogger(__name__)

MOST_WAITERS = 32
"""Requests that wait for a job to change: each takes a thread for as long."""

MOST_FEEDERS = 8
"""Jobs that are on their way to the GPU at a time, for a policy to choose from."""

SWEEP_S = 60.0


class AsyncJobs:
    """Those of one broker, kept in `folder`; None: it takes none. The database is opened when the
    first job comes, or at `start`, if an earlier broker has left some; the threads begin with it.

    `play` has a job answered; it is given once, before `start`. Safe from any thread.
    """

    def __init__(
        self,
        folder: Path | None,
        config: Config,
        scheduler: Scheduler,
        clock: Clock,
        emit: Emit,
        draining: Callable[[], bool],
    ) -> None:
        self._folder = folder
        self._config = config
        self._settings = config.jobs  # a change needs a restart
        self._scheduler = scheduler
        self._clock = clock
        self._emit = emit
        self._draining = draining
        self._play: Play | None = None
        self._make_callbacks: Callable[[Store], Callbacks] | None = None
        self._callbacks: Callbacks | None = None
        self._opening = threading.Lock()
        self._closed = False
        self._store: Store | None = None
        self._executor: Executor | None = None
        self._sweeper: PeriodicWorker | None = None
        self._changes = 0
        self._change = threading.Condition()
        self._waiters = threading.BoundedSemaphore(MOST_WAITERS)
        self._listeners: list[Callable[[AsyncJob], object]] = []

    @property
    def taken(self) -> bool:
        """Whether there can be any."""
        return self._folder is not None

    def plays(self, play: Play) -> None:
        """`play` has a job answered."""
        self._play = play

    def calls_back(self, make: Callable[[Store], Callbacks]) -> None:
        """`make` gives what tells of the end of jobs that were submitted with a callback. It is
        given once, before `start`."""
        self._make_callbacks = make

    def when_ended(self, listener: Callable[[AsyncJob], object]) -> None:
        """Have `listener` told of each job that ends, on the thread that ended it: it must not
        block, nor raise."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Go on with the jobs of an earlier run, if there are any. Never raises."""
        if self._folder is not None and Store.is_there(self._folder):
            try:
                self._opened()
            except (JobsFull, ShuttingDown) as error:
                self._emit(AsyncJobsUnavailable(reason=error.message))

    def stop(self) -> None:
        """End the threads, and close the database. Idempotent."""
        with self._opening:
            self._closed = True
        with self._change:
            self._changes += 1
            self._change.notify_all()
        if self._sweeper is not None:
            self._sweeper.stop()
            self._sweeper.join()
        if self._executor is not None:
            self._executor.stop()
        if self._callbacks is not None:
            self._callbacks.stop()
        if self._store is not None:
            self._store.close()

    # -- for the routes ------------------------------------------------------------------------

    def submit(
        self, submission: Submission, body: IO[bytes] | None, length: int
    ) -> tuple[AsyncJob, bool]:
        """Keep a job, with the `length` bytes of `body`: when this returns, it is on disk. True if
        it is a new one, False if the same was submitted before, under the same key. Raises
        IdempotencyMismatch, QueueFull, JobsFull, ShuttingDown."""
        if self._draining():
            raise ShuttingDown("the broker shuts down", retry_after=5)
        store = self._opened()
        draft = store.draft()
        try:
            for piece in pieces(body, length) if body is not None else ():
                draft.write(piece)
            said = replace(submission, fingerprint=self._fingerprint(submission, draft.digest))
            job, new = store.submit(said, draft, self._now())
        except OSError as error:
            raise JobsFull(f"an asynchronous job cannot be kept: {error.strerror}") from error
        finally:
            draft.close()
        if new and self._executor is not None:
            self._executor.wake()
        return job, new

    def find(self, job_id: str, record: RequestRecord) -> AsyncJob:
        """A job that the request may see. Raises NotFound."""
        store = self._store
        job = None if store is None else store.find(job_id)
        if job is None or record.whose not in (None, job.key):
            raise NotFound(f"there is no asynchronous job {job_id[:64]} (any more)")
        return job

    def page(self, most: int, whose: str | None, before: int | None) -> list[AsyncJob]:
        """The latest jobs, the newest first: of the key `whose`, None: of all; of those that came
        before the one with the number `before`."""
        store = self._store
        return [] if store is None else store.page(most, whose, before)

    def counts(self) -> dict[str, int]:
        """How many there are in each state that the store knows; one that prepares waits yet."""
        store, found = self._store, dict.fromkeys(KEPT_STATES, 0)
        return found if store is None else found | store.counts()

    def ahead(self, job: AsyncJob, behind: AsyncJob | None = None) -> dict[str, int]:
        """How many wait on disk before one that waits, by consumer: those that are in the queue
        already are not among them. `behind`: only those that do not come before this one."""
        store, executor = self._store, self._executor
        if store is None:
            return {}
        taken = frozenset() if executor is None else executor.taken()
        return store.ahead(job, taken, behind)

    def cancel(self, job: AsyncJob) -> None:
        """Have one end, if it has not."""
        store = self._opened()
        over = store.cancel(job, self._now())
        if over is None:
            return
        if self._executor is not None:
            self._executor.cancel(job.id)
        error = Cancelled("the job was cancelled", consumer=job.consumer)
        for entry in self._scheduler.queue():
            if entry.job.request_id == job.id:  # its run has the job's id
                self._scheduler.cancel(entry.ticket, error)
        if over.over:
            self._ended(over)

    def result(self, job: AsyncJob) -> bytes | IO[bytes]:
        """The body of the result of one that is over; a file is the caller's to close. Raises
        NotFound, if it was swept meanwhile."""
        try:
            return self._opened().result(job)
        except KeyError:
            raise NotFound(f"there is no asynchronous job {job.id} any more") from None

    def begin_waiting(self) -> bool:
        """Take one of the places of those who wait; False if none is left. `end_waiting` gives it
        back."""
        return self._waiters.acquire(blocking=False)

    def end_waiting(self) -> None:
        """Give the place back."""
        self._waiters.release()

    @property
    def changes(self) -> int:
        """Rises with every change of a job."""
        return self._changes

    def await_change(self, since: int, seconds: float) -> None:
        """Return once `changes` is another than `since`, or after so many seconds."""
        with self._change:
            self._change.wait_for(lambda: self._changes != since, seconds)

    @property
    def ending(self) -> bool:
        """Whether the broker ends, so that nobody should wait any more."""
        return self._closed or self._draining()

    # -- inside --------------------------------------------------------------------------------

    def _opened(self) -> Store:
        """The store, opened. Raises JobsFull, ShuttingDown."""
        if (there := self._store) is not None:
            return there
        with self._opening:
            if self._store is not None:
                return self._store
            if self._closed:
                raise ShuttingDown("the broker shuts down", retry_after=5)
            assert self._folder is not None and self._play is not None  # noqa: S101, PT018
            store = Store(
                self._folder,
                most_bytes=self._settings.max_mib * 2**20,
                most_waiting=self._settings.max_waiting,
            )
            try:
                store.open()
                self._resume(store)
            except BaseException:
                store.close()
                raise
            self._executor = Executor(
                store,
                self._play,
                self._clock,
                feeders=_feeders(self._config),
                keep_s=self._settings.keep,
                draining=self._draining,
                ended=self._ended,
                changed=self._changed,
            )
            self._sweeper = PeriodicWorker("async-sweeper", self._sweep, retry_s=SWEEP_S)
            self._store = store
            if self._make_callbacks is not None:
                self._callbacks = self._make_callbacks(store)
                if store.next_callback() is not None:
                    self._callbacks.wake()
            self._executor.start()
            self._sweeper.start()
            return store

    def _fingerprint(self, submission: Submission, digest: str) -> str:
        """Of what was asked for: where, and with which body. On a port of a consumer's own a path
        means something else than on the broker's, which may move."""
        environ = submission.environ
        port = environ.get("SERVER_PORT", "")
        own = self._config.ports.get(int(port)) if port.isdecimal() else None
        names = ("REQUEST_METHOD", "PATH_INFO", "QUERY_STRING", "CONTENT_TYPE")
        callback = () if submission.callback is None else (submission.callback,)
        said = json.dumps([own, *(environ.get(name, "") for name in names), digest, *callback])
        return hashlib.sha256(said.encode()).hexdigest()

    def _resume(self, store: Store) -> None:
        """What becomes of the jobs of an earlier run: one that was not sent waits already; one that
        may have been is run again only if its consumer's jobs may run twice."""
        unfinished, again, lost = store.unfinished(), 0, 0
        for job in store.cancelling():
            self._over(store, job, "cancelled")
        for job in unfinished:
            consumer = self._config.consumers.get(job.consumer)
            if job.cancelling:
                self._over(store, job, "cancelled")
            elif consumer is not None and consumer.idempotent:
                store.again(job)
                again += 1
            else:
                lost += 1
                self._over(store, job, "lost")
        if unfinished or store.waiting:
            self._emit(AsyncJobsResumed(jobs=store.waiting, again=again, lost=lost))

    def _over(self, store: Store, job: AsyncJob, state: Ended) -> None:
        ended = store.ended(job, state, self._now())
        if ended is not None:
            self._ended(ended)

    def _ended(self, job: AsyncJob) -> None:
        self._emit(
            AsyncJobEnded(
                job=job.id,
                state=job.state,  # type: ignore[arg-type]  # it is over
                kind=job.kind,
                consumer=job.consumer,
                key=job.key,
                status=None if job.result is None else job.result.status,
                failure=job.failure,
                ms=round((self._now() - job.created) * 1000),
            )
        )
        self._changed()
        if job.callback is not None and self._callbacks is not None:
            self._callbacks.wake()
        for listener in self._listeners:
            listener(job)

    def _changed(self) -> None:
        with self._change:
            self._changes += 1
            self._change.notify_all()

    def _sweep(self) -> float:
        store = self._store
        if store is not None and (swept := store.sweep(self._now() - self._settings.keep)):
            self._emit(AsyncJobsSwept(jobs=swept))
        return min(SWEEP_S, max(0.1, self._settings.keep / 10))

    def _now(self) -> float:
        return self._clock.now().timestamp()


def _feeders(config: Config) -> int:
    """How many are given to the queue at a time. In strict order of arrival each of them is ahead
    of a client that comes later: one more than can run is enough for the GPU not to wait. A policy
    that lets the urgent overtake can have more to choose from."""
    if config.scheduler.policy == "fifo" and config.scheduler.kind == "locked":
        parallel = (each.parallel(MOST_FEEDERS) for each in config.consumers.values())
        return min(MOST_FEEDERS, 1 + max(parallel, default=1))
    return MOST_FEEDERS


def estimated(ahead: Mapping[str, int], run_s: Callable[[str], float | None]) -> float | None:
    """How long those ahead take, in seconds, by what jobs of their consumers took; None where that
    is not known of one of them."""
    seconds = 0.0
    for consumer, count in ahead.items():
        each = run_s(consumer)
        if each is None:
            return None
        seconds += count * each
    return seconds if math.isfinite(seconds) else None
