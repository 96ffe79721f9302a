"""One job's hold on the GPU, and the one place that gives it back.

    waiting ---begin---> running ---follow---> followed
       |                    |                     |
      end         answered, failed, end     end of the following
       |                    |                     |
       +------------------> over <----------------+

A job is only over once it is settled what becomes of it at its consumer (`Cancellation.settle`):
the answer was read to its end, or the consumer was told to stop, or is at rest by its own word, or
its time was up. Where that takes a while, the client has its answer first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from gpumanager.clock import Clock, rfc3339, wall_time
from gpumanager.consumers.admission import Admission
from gpumanager.consumers.breaker import Breakers
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.registry import Registry
from gpumanager.errors import BrokerError, ConsumerTimeout, ConsumerUnreachable
from gpumanager.jobs.cancellation import Cancellation, StopsJobs
from gpumanager.jobs.place import Place
from gpumanager.jobs.record import RequestRecord
from gpumanager.model import ConsumerState, Job
from gpumanager.telemetry.events import Emit, JobEnded
from gpumanager.upstream.exchange import Exchange

log = logging.getLogger(__name__)

CONSUMERS_FAULTS = (ConsumerUnreachable, ConsumerTimeout)


@dataclass(frozen=True, slots=True)
class Means:
    """What a hold works with. `after_job` is told of every consumer that had a job."""

    registry: Registry
    learned: Learned
    admission: Admission
    breakers: Breakers
    calls: StopsJobs
    clock: Clock
    emit: Emit
    after_job: Callable[[str], object]


class _State(Enum):
    WAITING = auto()
    RUNNING = auto()
    FOLLOWED = auto()
    OVER = auto()


class Hold:
    """Of one job of one request. Once it runs, `cancellation` is what becomes of the call that is
    being made, if nobody wants it any more. `end` has to be called when the request is over,
    however it ended, and `close` after that.

    Its methods are for the request's own thread, but for `begin`, which is also for the one that
    hands the GPU over, while the request's own waits for that.
    """

    cancellation: Cancellation

    def __init__(self, means: Means, place: Place, record: RequestRecord) -> None:
        self._means = means
        self._place = place
        self._record = record
        self._name = place.name
        self._state = _State.WAITING
        self._began = 0.0
        self._before: ConsumerState | None = None
        self._exchanges: list[Exchange] = []
        self._follow_here: Callable[[], None] | None = None
        self._status: int | None = None
        self._failure: str | None = None
        self._loaded_nothing = False
        self._process_gone = False

    # -- its course ------------------------------------------------------------------------

    @property
    def begun(self) -> bool:
        """True once it runs."""
        return self._state is not _State.WAITING

    def begin(self, exchange: Exchange) -> None:
        """The GPU was granted: the job is about to be sent with `exchange`. Raises
        ConsumerUnhealthy, if the breaker has opened."""
        means = self._means
        means.admission.begin(self._name)
        self._began = means.clock.monotonic()
        self._before = means.registry.job_started(self._name, self._job.model)
        self._state = _State.RUNNING
        self._calls_with(exchange)

    def begin_again(self, exchange: Exchange) -> None:
        """The same job is about to be sent a second time; the first answer was read to its end."""
        self._calls_with(exchange)

    @property
    def was_loaded(self) -> bool:
        """Whether its consumer was, as far as was known when it began."""
        return self._before is not None and self._before.has_loaded(self._model)

    @property
    def seconds(self) -> float:
        """Seconds since the job began, on the monotonic clock."""
        return self._means.clock.monotonic() - self._began

    def succeeded(self, exchange: Exchange) -> None:
        """The head of an answer is there."""
        assert self._before is not None  # noqa: S101  # it has begun
        self._means.breakers.succeeded(self._name)
        # A job that failed over there, out of memory perhaps, may have loaded nothing. Where the
        # card is measured, taking it for not loaded costs an eviction at worst.
        measured = self._means.registry.now.gpu.reading is not None
        failed = exchange.status >= 500 and measured
        self._loaded_nothing = failed and not self._before.has_loaded(self._model)
        self._status = exchange.status

    def failed(self, error: BaseException) -> None:
        """The call came to nothing, or its answer broke off."""
        if self._state is not _State.RUNNING:
            return
        if self._failure is None:
            self._failure = error.code if isinstance(error, BrokerError) else "internal_error"
            if self._status is None:
                self._loaded_nothing = not self.cancellation.exchange.reached
            gone = isinstance(error, ConsumerUnreachable) and error.nothing_listens
            self._process_gone = self._process_gone or gone
            if isinstance(error, CONSUMERS_FAULTS):
                self._means.breakers.failed(self._name, error.message)
            else:
                self._means.breakers.abandoned(self._name)
        self.answered()

    def answered(self) -> None:
        """Nothing more comes from the consumer. The GPU is given back at once, if nothing is to be
        waited for; else when the request is over, and its client has the answer."""
        if self._state is not _State.RUNNING:
            return
        if self.cancellation.settled_already():
            self._give_back()
        elif self.cancellation.exchange.consumer_done:
            self._record.goes_on = True

    def follow(self, begin: Callable[[], Callable[[], None] | None]) -> None:
        """The consumer has only taken the job, and works on it from now on. `begin` has somebody
        else follow it, who calls `followed` at its end; or it returns what is to be called for
        that when the request is over, and does it itself."""
        self._state = _State.FOLLOWED
        try:
            self._follow_here = begin()
            self._record.goes_on = self._follow_here is not None
        except BaseException:
            self._state = _State.RUNNING
            raise

    def followed(self, failure: str | None, *, process_gone: bool) -> None:
        """It has ended, or its consumer's process has. From any thread."""
        self._failure = failure
        self._process_gone = process_gone
        self._give_back()

    def end(self) -> None:
        """The request is over. Idempotent, never raises."""
        if self._state is _State.WAITING:
            self._state = _State.OVER
            self._place.give_up()
        elif self._state is _State.RUNNING:
            if not self.cancellation.exchange.consumer_done and self._failure is None:
                gone = self._place.client_left()
                self._record.failure = gone.code
                self.failed(gone)
            self._settle_and_give_back()
        elif self._follow_here is not None:
            follow, self._follow_here = self._follow_here, None
            follow()

    def close(self) -> None:
        """Close its connections. Idempotent."""
        for exchange in self._exchanges:
            exchange.close()

    # -- inside ----------------------------------------------------------------------------

    def _calls_with(self, exchange: Exchange) -> None:
        means, config = self._means, self._place.config
        self.cancellation = Cancellation(
            self._name, config, exchange, means.calls, means.clock, means.emit
        )
        self._exchanges.append(exchange)

    def _settle_and_give_back(self) -> None:
        if self._state is not _State.RUNNING:
            return
        try:
            self.cancellation.settle()
        except Exception:
            log.exception("settling a job failed", extra={"consumer": self._name})
        finally:
            self._give_back()

    def _give_back(self) -> None:
        if self._state is _State.OVER:
            return
        self._state = _State.OVER
        means, before, seconds = self._means, self._before, self.seconds
        assert before is not None  # noqa: S101  # it has begun
        self._record.run_s = seconds
        worked = self._failure is None and self._status is not None and self._status < 400
        try:
            # First what the next job's eviction looks at, then the GPU.
            means.registry.job_finished(
                self._name,
                worked=worked,
                unloaded=before if self._loaded_nothing else None,
                process_gone=self._process_gone,
                model=self._job.model,
                context=self._job.context,
                called=self._job.called,
            )
        finally:
            self._place.give_up()
        job, cold = self._job, not before.has_loaded(self._model)
        context = job.context or means.registry.get(self._name).model(job.model or "").context
        for name in dict.fromkeys((self._name, job.resident)):
            if worked:
                means.learned.ran(name, seconds, cold=cold, context=context)
            else:
                means.learned.failed(name)
        self._note(seconds, cold)
        means.after_job(self._name)

    @property
    def _job(self) -> Job:
        ticket = self._place.ticket
        assert ticket is not None  # noqa: S101  # it has begun
        return ticket.job

    @property
    def _model(self) -> str | None:
        """The job's model, if its consumer tells its models apart."""
        return self._place.config.apart(self._job.model)

    def _note(self, seconds: float, cold: bool) -> None:
        ticket, job = self._place.ticket, self._job
        assert ticket is not None  # noqa: S101  # it has begun
        now = self._means.registry.now
        came = self._began - ticket.prepared_s - ticket.waited_s
        total_mib = now.config.gpu.total_mib
        if now.gpu.reading is not None:
            total_mib = now.gpu.reading.total_mib
        self._means.emit(
            JobEnded(
                consumer=job.consumer,
                model=job.model,
                kind=job.kind,
                ticket=ticket.number,
                arrived=rfc3339(wall_time(self._means.clock, came)),
                urgency=job.urgency,
                requester=job.requester,
                session=job.session,
                client=job.client,
                address=self._record.client,
                request_id=job.request_id,
                key=self._record.key,
                traceparent=self._record.traceparent,
                status=self._status,
                failure=self._failure,
                wait_ms=round(ticket.waited_s * 1000, 1),
                prepare_ms=round(ticket.prepared_s * 1000, 1),
                run_ms=round(seconds * 1000, 1),
                cold=cold or None,
                needed_mib=now.of(job).needed(job.resident).mib,
                total_mib=total_mib or None,
            )
        )
