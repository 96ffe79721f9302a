"""One job from the queue to the consumer and back: the only place where the scheduler, the
registry and the proxy meet."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from gpumanager.config import ConsumerConfig
from gpumanager.errors import BrokerError, SchedulerError
from gpumanager.jobs.client import ClientWatch
from gpumanager.jobs.hold import CONSUMERS_FAULTS, Hold, Means
from gpumanager.jobs.owners import Owners
from gpumanager.jobs.place import Place, Places
from gpumanager.jobs.polling import LARGEST_ANSWER_BYTES, Completions, failure_of, job_id
from gpumanager.jobs.record import Course, RequestRecord
from gpumanager.jobs.routing import Choice
from gpumanager.jobs.shortage import LARGEST_REQUEST_BYTES, Shortages
from gpumanager.model import Job
from gpumanager.scheduling.interface import Ticket
from gpumanager.upstream.exchange import Exchange
from gpumanager.upstream.watcher import Watcher

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """A consumer's answer whose head is there. Who hands it on calls `on_end` as soon as the
    consumer is done, unless it is already, or its answer broke off, and `on_break` before that with
    the reason if it did."""

    exchange: Exchange
    on_end: Callable[[], None]
    on_break: Callable[[BrokerError], None] = lambda error: None  # noqa: ARG005


class JobRunner:
    """Runs a prepared exchange under the scheduler."""

    def __init__(
        self,
        means: Means,
        places: Places,
        completions: Completions,
        watcher: Watcher,
        shortages: Shortages,
        owners: Owners,
        *,
        look: Callable[[], object],
    ) -> None:
        self._means = means
        self._places = places
        self._breakers = means.breakers
        self._completions = completions
        self._watcher = watcher
        self._shortages = shortages
        self._owners = owners
        self._look = look

    def run(
        self,
        record: RequestRecord,
        choose: Callable[[], Choice],
        prepare: Callable[[Choice, ConsumerConfig], Exchange],
        max_wait: float | None = None,
    ) -> Answer:
        """Wait for the GPU, send, and return as soon as the answer's head is there.

        `choose` says which consumer gets it; `prepare` makes the exchange with that one;
        `max_wait` is the longest the client itself will wait in the queue, in seconds. Raises a
        BrokerError if it does not come to that. The hold sees to it that the GPU is given back, at
        the latest when the request is over.
        """
        choice, place = self._places.chosen(choose)
        hold = Hold(self._means, place, record)
        record.stack.callback(hold.close)
        record.stack.callback(hold.end)
        record.consumer = name = place.name
        consumer = place.config
        try:
            exchange = prepare(choice, consumer)
            client = ClientWatch(record, self._watcher)
            record.stack.callback(client.stop)
            job = Job(
                name,
                choice.kind,
                record.who,
                record.request_id,
                max_wait,
                key=record.key,
                settings=consumer,
                model=choice.model,
                context=choice.context,
                called=choice.called,
                # Whom the broker has stopped, it has to start first.
                makes_room=choice.makes_room
                or self._means.registry.get(name).stopped_by is not None,
                urgency=record.urgency_or(
                    self._means.registry.now.config.urgency_of(choice.kind, consumer)
                ),
                requester=record.who,
                session=record.session,
            )
            ticket = self._wait(place, hold, job, exchange, client, record)
        except BaseException:
            hold.end()
            raise
        followed = self._may_be_followed(consumer, exchange)

        def send(exchange: Exchange) -> None:
            if record.course is not None:
                record.course.sending(name)
            if followed:
                client.when_gone(None)  # it goes on in any case, so its id has to be known
            else:
                client.when_gone(hold.cancellation.client_left)
                ticket.when_cancelled(hold.cancellation.cancelled)
            exchange.send()

        try:
            send(exchange)
            shortage = self._shortages.in_answer(ticket.job, consumer, exchange)
            if shortage is not None:
                client.when_gone(lambda: ticket.cancel(place.client_left()))
                again = exchange.again() if consumer.out_of_memory.retry else None
                if again is None:
                    self._shortages.not_retried(shortage)
                elif ticket.relieve():  # the same request once more, all others having made room
                    exchange = again
                    hold.begin_again(exchange)
                    send(exchange)
                    second = self._shortages.in_answer(ticket.job, consumer, exchange)
                    if second is None and exchange.status < 500:
                        self._shortages.healed(shortage)
            if exchange.status < 400 and not followed:
                self._see_what_it_holds(ticket.job, hold)
            job_id = self._taken(consumer, exchange) if followed else None
        except BaseException as error:
            hold.failed(error)
            raise
        finally:
            record.upstream_s = hold.seconds
        hold.succeeded(exchange)
        if job_id is not None:
            request = exchange.request_text(LARGEST_REQUEST_BYTES)
            self._owners.began(name, job_id, record.key)
            self._follow(name, consumer, job_id, request, ticket, hold, record.course)
        hold.answered()  # before the answer is even begun, if all of it is there
        return Answer(exchange, hold.answered, hold.failed)

    def _wait(
        self,
        place: Place,
        hold: Hold,
        job: Job,
        exchange: Exchange,
        client: ClientWatch,
        record: RequestRecord,
    ) -> Ticket:
        """Return when the job has begun: it may be sent."""

        def begin_early() -> bool:
            try:
                hold.begin(exchange)
            except BrokerError:
                return False  # the job's own thread will be told the same
            exchange.send_ahead()
            return True

        try:
            try:
                # Who wants to know when it is sent keeps that on disk, which nobody else waits for.
                if record.course is None:
                    ticket = place.wait_turn(job, client, begin_early)
                else:
                    ticket = place.wait_turn(job, client, joined=record.course.joined)
            finally:
                if place.ticket is not None:
                    record.waited_s = place.ticket.waited_s
            record.prepared_s = ticket.prepared_s
        except BrokerError as error:
            if isinstance(error, CONSUMERS_FAULTS):
                self._breakers.failed(job.consumer, error.message)  # it did not load
            raise
        except Exception as error:
            log.exception("scheduler failed", extra={"request_id": record.request_id})
            raise SchedulerError("the scheduler failed", consumer=job.consumer) from error
        if not hold.begun:
            hold.begin(exchange)
        return ticket

    # -- asynchronous jobs -----------------------------------------------------------------

    def _may_be_followed(self, consumer: ConsumerConfig, exchange: Exchange) -> bool:
        """Whether the consumer only takes such a job, and works on it after its answer."""
        done = consumer.done
        return done is not None and done.matches(*exchange.request_line(consumer.base_path))

    def _taken(self, consumer: ConsumerConfig, exchange: Exchange) -> str | None:
        """The id of the job, if the consumer has taken it."""
        if consumer.done is None or exchange.status >= 300:
            return None
        answer = exchange.read_ahead(LARGEST_ANSWER_BYTES)
        return None if answer is None else job_id(consumer.done, answer)

    def _follow(
        self,
        name: str,
        consumer: ConsumerConfig,
        job: str,
        request: bytes,
        ticket: Ticket,
        hold: Hold,
        course: Course | None,
    ) -> None:
        def ended(said: bytes | None, process_gone: bool) -> None:
            self._owners.ended(name, job)
            failure = None
            try:
                self._see_what_it_holds(ticket.job, hold)
                shortage = self._shortages.in_result(ticket.job, consumer, said or b"", request)
                if shortage is not None:
                    failure = "out_of_memory"
                    self._shortages.not_retried(shortage)  # its answer has gone out
            finally:
                hold.followed(failure, process_gone=process_gone)
                if course is not None:
                    course.over(failure or failure_of(consumer, said))

        if course is not None:
            course.goes_on()
        hold.follow(lambda: self._completions.follow(name, consumer, job, ticket, ended))

    def _see_what_it_holds(self, job: Job, hold: Hold) -> None:
        """Short jobs slip through between two samples of the card: where little is known of the
        consumer yet, or it was loaded just now, look while it surely holds its model."""
        reading = self._means.registry.now.gpu.reading
        if reading is None or reading.measured_mib(job.consumer) is None:
            return
        if not hold.was_loaded or not self._means.learned.knows_enough(job.resident):
            self._look()
