"""The broker's own errors. Each carries its HTTP answer; `web.boundary` is the one place
that turns them into a response, so nothing else in the package writes a status code."""

from __future__ import annotations

import json
import math
from typing import ClassVar


def json_line(body: object) -> bytes:
    """`body` as compact JSON with a final newline, as the original façade wrote it. Half of a
    surrogate pair, which JSON can hold and UTF-8 cannot, stays escaped."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace") + b"\n"


class BrokerError(Exception):
    """An error the broker answers itself (a consumer's own 4xx and 5xx pass through verbatim).

    `status` is the HTTP status, `code` the machine-readable word in the envelope, and
    `retryable` says whether the same request may succeed later. `retry_after` is in seconds.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = True

    def __init__(
        self,
        message: str,
        *,
        consumer: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.consumer = consumer
        self.retry_after = retry_after

    def envelope(self) -> dict[str, object]:
        """The JSON body: `error`, `message`, `consumer` where there is one, `retryable`."""
        body: dict[str, object] = {"error": self.code, "message": self.message}
        if self.consumer is not None:
            body["consumer"] = self.consumer
        body["retryable"] = self.retryable
        return body

    def payload(self) -> bytes:
        """The envelope as it is sent: compact JSON with a final newline."""
        return json_line(self.envelope())

    def headers(self) -> list[tuple[str, str]]:
        """Headers of the answer beside `Content-Type`: `Retry-After` in whole seconds, ≥ 1."""
        if self.retry_after is None:
            return []
        return [("Retry-After", str(max(1, math.ceil(self.retry_after))))]


class InternalError(BrokerError):
    """The broker failed; the trace is in the log under the request id."""


class SchedulerError(BrokerError):
    """The scheduler failed while it had a job."""

    code = "scheduler_error"


class BadRequest(BrokerError):
    """Malformed request."""

    status, code, retryable = 400, "bad_request", False


class Unauthorized(BrokerError):
    """Keys are configured, and the request has none of them. `page`: a browser is to ask for one,
    as a password; of several schemes it would know the first only."""

    status, code, retryable = 401, "unauthorized", False

    def __init__(self, message: str, *, page: bool = False) -> None:
        super().__init__(message)
        self.scheme = "Basic" if page else "Bearer"

    def headers(self) -> list[tuple[str, str]]:
        return [*super().headers(), ("WWW-Authenticate", f'{self.scheme} realm="gpumanager"')]


class Forbidden(BrokerError):
    """The request comes from a page of another site, is for a Host that is not served, or wants
    another role than its key has."""

    status, code, retryable = 403, "forbidden", False


class NotFound(BrokerError):
    """No such route."""

    status, code, retryable = 404, "not_found", False


class ModelNotFound(BrokerError):
    """No consumer of the request's kind has the model that it names; names the nearest."""

    status, code, retryable = 404, "model_not_found", False


class NoAudioProxy(BrokerError):
    """Rendered audio was asked for, but the config names no `audio_proxy`."""

    status, code, retryable = 404, "no_audio_proxy", False


class MethodNotAllowed(BrokerError):
    """The route exists, the method does not. `allow` lists what does."""

    status, code, retryable = 405, "method_not_allowed", False

    def __init__(self, message: str, *, allow: list[str]) -> None:
        super().__init__(message)
        self.allow = sorted(allow)

    def headers(self) -> list[tuple[str, str]]:
        return [*super().headers(), ("Allow", ", ".join(self.allow))]


class RequestTimeout(BrokerError):
    """The request came too slowly: its head, or its body."""

    status, code = 408, "request_timeout"


class PayloadTooLarge(BrokerError):
    """The body is larger than `max_body_mib`."""

    status, code, retryable = 413, "payload_too_large", False


class RangeNotSatisfiable(BrokerError):
    """The range that was asked for lies outside of the result of an asynchronous job."""

    status, code, retryable = 416, "range_not_satisfiable", False


class IdempotencyMismatch(BrokerError):
    """Another request was submitted under the same `Idempotency-Key`."""

    status, code, retryable = 422, "idempotency_mismatch", False


class HeadersTooLarge(BrokerError):
    """The request's head is larger than `max_header_kib`."""

    status, code, retryable = 431, "headers_too_large", False


class NoConsumer(BrokerError):
    """Nothing is routed for the kind, or the routed consumer has no path for it."""

    status, code, retryable = 501, "no_consumer", False


class ConsumerUnreachable(BrokerError):
    """The consumer could not be reached, or failed before it answered.

    `nothing_listens`: the connection was refused, which proves that its process is gone.
    """

    status, code = 502, "consumer_unreachable"

    def __init__(
        self, message: str, *, consumer: str | None = None, nothing_listens: bool = False
    ) -> None:
        super().__init__(message, consumer=consumer)
        self.nothing_listens = nothing_listens


class ConsumerUnhealthy(BrokerError):
    """The consumer's last probe failed: its job is refused without waiting in the queue."""

    status, code = 503, "consumer_unreachable"


class ConsumerTimeout(BrokerError):
    """The consumer took longer than one of its `timeouts`."""

    status, code = 504, "consumer_timeout"


class QueueFull(BrokerError):
    """`scheduler.max_queue` requests wait already, or its requester has as many in the queue as it
    may have."""

    status, code = 503, "queue_full"


class QueueTimeout(BrokerError):
    """The request waited as long as `scheduler.max_wait` or its client allows without its turn
    coming, or its turn is not expected in that time.

    `estimate_s`: in so many seconds it was expected, where that is why it was refused.
    """

    status, code = 503, "queue_timeout"

    def __init__(
        self,
        message: str,
        *,
        consumer: str | None = None,
        retry_after: float | None = None,
        estimate_s: float | None = None,
    ) -> None:
        super().__init__(message, consumer=consumer, retry_after=retry_after)
        self.estimate_s = estimate_s

    def envelope(self) -> dict[str, object]:
        estimate_s = self.estimate_s
        said = {} if estimate_s is None else {"estimate_s": round(estimate_s, 1)}
        return {**super().envelope(), **said}


class InsufficientVram(BrokerError):
    """The consumer's model cannot be made to fit; names who holds the memory and the MiB short."""

    status, code = 503, "insufficient_vram"


class ShuttingDown(BrokerError):
    """The broker drains: it takes no new jobs."""

    status, code = 503, "shutting_down"


class Cancelled(BrokerError):
    """An operator took the job out of the queue, or stopped it."""

    status, code, retryable = 503, "cancelled", False


class JobLost(BrokerError):
    """The broker ended while an asynchronous job ran: whether its consumer finished it, nobody
    knows, and it may not be run twice."""

    status, code, retryable = 502, "job_lost", False


class JobsFull(BrokerError):
    """An asynchronous job, or its result, cannot be kept: the disk is full, or `jobs.max_mib` are
    spent."""

    status, code = 507, "jobs_full"


class ClientGone(BrokerError):
    """The client disconnected. Nobody reads this answer; the log shows 499, as nginx does."""

    status, code, retryable = 499, "client_gone", False


class TruncatedAnswer(Exception):
    """The consumer's answer broke off after its head had been handed on: no envelope is
    possible any more, and what was relayed must not look complete."""

    def __init__(self, error: BrokerError) -> None:
        super().__init__(error.message)
        self.error = error
