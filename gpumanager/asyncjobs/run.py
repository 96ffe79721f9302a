"""One run of an asynchronous job: how far it is, and whether it is still wanted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from gpumanager.asyncjobs.files import Draft
from gpumanager.asyncjobs.model import AsyncJob, Result
from gpumanager.errors import BrokerError, Cancelled

WAIT_AGAIN = frozenset(
    {
        "consumer_unreachable",
        "insufficient_vram",
        "jobs_full",
        "queue_full",
        "queue_timeout",
        "scheduler_error",
        "shutting_down",
    }
)
"""Codes of the broker's errors for which a job that was not sent waits again: no client is there to
try again."""

OF_THE_JOB = frozenset({"insufficient_vram"})
"""Those that say nothing of other jobs for the same consumer."""

UNWANTED = frozenset({"cancelled", "client_gone"})

SHUTTING_DOWN = "shutting_down"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to: its answer; the code of the broker's error, if the answer is that; how
    many seconds it says to wait before another try; and what broke it off in its middle."""

    answer: Result
    failure: str | None = None
    retry_after: float | None = None
    broke_off: BrokerError | None = None


class Run:
    """`jobs.record.Course` of one job. `keep` has the store note that it may be sent, and returns
    False if it must not be. `sent`: it may have been. `closed`: the broker ends, and does not wait
    for it. Safe from any thread."""

    def __init__(
        self,
        job: AsyncJob,
        keep: Callable[[str], bool],
        joined: Callable[[], object],
        draft: Draft,
    ) -> None:
        self.job = job
        self._joined = joined
        self.urgency = job.urgency
        self.sent = False
        self.followed = False
        self.failure: str | None = None
        self.cancelled = threading.Event()
        self.ended = threading.Event()
        self._keep = keep
        self._draft = draft
        self.unkept: OSError | BrokerError | None = None

    # -- the course of its job ---------------------------------------------------------------

    def joined(self) -> None:
        """As `Course.joined`."""
        self._joined()

    def sending(self, consumer: str) -> None:
        """As `Course.sending`; of a second try, too."""
        if self.cancelled.is_set() or not (self.sent or self._keep(consumer)):
            raise Cancelled("the job was cancelled", consumer=consumer)
        self.sent = True

    def goes_on(self) -> None:
        """As `Course.goes_on`."""
        self.followed = True

    def over(self, failure: str | None) -> None:
        """As `Course.over`."""
        self.failure = failure
        self.ended.set()

    def gone(self) -> bool:
        """Whether nobody wants it any more: as a client would have left."""
        return self.cancelled.is_set()

    # -- its answer ----------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Keep a piece of the answer's body. Where the disk is full, the rest is read all the same:
        the consumer is to finish its job in peace."""
        if self.unkept is not None:
            return
        try:
            self._draft.write(data)
        except (OSError, BrokerError) as error:
            self.unkept = error
            self._draft.drop()
