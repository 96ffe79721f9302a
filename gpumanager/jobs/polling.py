"""Jobs that are answered at once and worked on afterwards: the GPU stays held until the consumer
says that the job is over (its `done` rule), though its client has long had its answer."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable
from functools import partial
from typing import Protocol

from gpumanager.clock import Clock
from gpumanager.config import ConsumerConfig, Done, Lost, expressions
from gpumanager.errors import BrokerError, ConsumerUnreachable
from gpumanager.scheduling.interface import Ticket
from gpumanager.telemetry.events import CancelFailed, Emit, StillBusy

log = logging.getLogger(__name__)

LARGEST_ANSWER_BYTES = 1024 * 1024
"""An answer that only says that a job was taken is small. A larger one is handed on as it comes."""

CANCEL_SETTLE_S = 30.0
"""What a cancelled job is given to end, from being told to."""

FIRST_LOOK_S = 0.02
POLL_SHARE = 0.1
"""A job is looked after again when a tenth more of its time has passed, at most its `every`."""

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""What may go into a path as it is; ids seen in the field are UUIDs and numbers."""


class FollowsJobs(Protocol):
    """The calls about one asynchronous job. They raise BrokerError on failure."""

    def job_result(
        self, name: str, consumer: ConsumerConfig, done: Done, job_id: str
    ) -> bytes | None:
        """What the consumer says of the job, once it is over; None before."""

    def job_listed(self, name: str, consumer: ConsumerConfig, lost: Lost, job_id: str) -> bool:
        """Whether it still has the job in work."""

    def cancel_job(self, name: str, consumer: ConsumerConfig, done: Done, job_id: str) -> None:
        """Make the calls that stop it."""


def job_id(done: Done, answer: bytes) -> str | None:
    """The job's id in the answer to it; None if there is none, so that nothing was begun."""
    try:
        found = expressions.search(done.id, json.loads(answer))
    except (ValueError, RecursionError):
        return None
    if isinstance(found, int) and not isinstance(found, bool):
        found = str(found)
    return found if isinstance(found, str) and _ID.fullmatch(found) else None


def failure_of(consumer: ConsumerConfig, said: bytes | None) -> str | None:
    """How a job that is over has failed, by what its consumer said of it: `job_failed`, `unknown`
    if it said nothing; None if it went well, or nobody can tell."""
    if said is None or consumer.done is None:
        return "unknown"
    try:
        answer = json.loads(said)
    except (ValueError, RecursionError):
        return None
    return "job_failed" if consumer.done.find_failure(answer) else None


class Completions:
    """Follows asynchronous jobs to their end, each on a thread of its own, named after the
    ticket. `stop` ends the threads; the jobs go on."""

    def __init__(self, calls: FollowsJobs, clock: Clock, emit: Emit) -> None:
        self._calls = calls
        self._clock = clock
        self._emit = emit
        self._stopped = threading.Event()

    def follow(
        self,
        name: str,
        consumer: ConsumerConfig,
        job_id: str,
        ticket: Ticket,
        ended: Callable[[bytes | None, bool], object],
    ) -> Callable[[], None] | None:
        """Return at once; call `ended` when the job is over: with what the consumer said of it,
        None where that is not known, and True if its process is gone.

        None, unless there was no thread to be had; then what is returned does it, until the job
        is over, on the thread that calls it.
        """
        assert consumer.done is not None  # noqa: S101  # the caller found the id with it
        following = _Following(
            self._calls,
            self._clock,
            self._emit,
            self._stopped,
            name,
            consumer,
            consumer.done,
            job_id,
            ended,
        )
        limit = consumer.done.timeout or consumer.timeouts.total
        ticket.when_cancelled(lambda _: following.cancel())
        run = partial(following.run, limit)
        thread = threading.Thread(target=run, name=f"done-{name}-{ticket.number}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            log.warning("no thread", extra={"wanted": thread.name, "reason": str(error)})
            return run
        return None

    def stop(self) -> None:
        """Stop following: the threads end within one poll. Idempotent."""
        self._stopped.set()


class _Following:
    def __init__(
        self,
        calls: FollowsJobs,
        clock: Clock,
        emit: Emit,
        stopped: threading.Event,
        name: str,
        consumer: ConsumerConfig,
        done: Done,
        job_id: str,
        ended: Callable[[bytes | None, bool], object],
    ) -> None:
        self._calls = calls
        self._clock = clock
        self._emit = emit
        self._stopped = stopped
        self._name = name
        self._consumer = consumer
        self._done = done
        self._job_id = job_id
        self._ended = ended
        self._cancelled = threading.Event()
        self._unlisted = 0
        self._said: bytes | None = None

    def cancel(self) -> None:
        self._cancelled.set()

    def run(self, limit: float) -> None:
        gone = False
        try:
            gone = self._until_over(self._clock.monotonic() + limit)
        finally:
            self._ended(self._said, gone)

    def _until_over(self, deadline: float) -> bool:
        """Return when the job is over; True if its consumer's process is gone."""
        told = False
        began = self._clock.monotonic()
        while not self._stopped.is_set():
            if self._cancelled.is_set() and not told:
                told = True
                deadline = min(deadline, self._clock.monotonic() + CANCEL_SETTLE_S)
                self._tell()
            try:
                if self._is_over():
                    return False
            except ConsumerUnreachable as error:
                if error.nothing_listens:
                    return True
            except BrokerError:
                pass  # too busy to say, which is an answer
            if self._clock.monotonic() >= deadline:
                self._emit(StillBusy(consumer=self._name, job=self._job_id))
                if not told:
                    self._tell()
                return False
            # Soon again at first, so that a short job does not hold the GPU for long after its end.
            elapsed = self._clock.monotonic() - began
            delay = min(self._done.poll.every, max(FIRST_LOOK_S, POLL_SHARE * elapsed))
            # Once cancelled there is nothing more to be woken for.
            (self._stopped if told else self._cancelled).wait(delay)
        return False

    def _is_over(self) -> bool:
        self._said = self._calls.job_result(self._name, self._consumer, self._done, self._job_id)
        if self._said is not None:
            return True
        if self._done.lost is None:
            return False
        # Between the two looks it may have ended, so that it is in neither: look once more.
        listed = self._calls.job_listed(self._name, self._consumer, self._done.lost, self._job_id)
        self._unlisted = 0 if listed else self._unlisted + 1
        return self._unlisted >= 2

    def _tell(self) -> None:
        try:
            self._calls.cancel_job(self._name, self._consumer, self._done, self._job_id)
        except BrokerError as error:
            reason = error.message
            self._emit(CancelFailed(consumer=self._name, job=self._job_id, reason=reason))
