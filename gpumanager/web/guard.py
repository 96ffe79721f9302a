"""The outermost WSGI layer: whatever happens inside, what a request holds is given back once.

Neither a generator's `finally` (skipped for HEAD), nor `teardown_request` (before the stream is
sent), nor a response's `close` (skipped when the server rejects a header) can be relied on; one
wrapper around everything can.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from gpumanager.clock import Clock
from gpumanager.errors import ClientGone, InternalError
from gpumanager.jobs.record import Course, RequestRecord
from gpumanager.telemetry.events import Emit, Refused
from gpumanager.web.priority import urgency_of
from gpumanager.web.record import (
    COURSE,
    LONGEST_SHOWN,
    RECORD_KEY,
    TRACEPARENT,
    request_id,
    session_of,
    shown,
)
from gpumanager.web.server import CLIENT_LEFT, close_after_answer, unsent_bytes

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

access_log = logging.getLogger("gpumanager.access")
log = logging.getLogger(__name__)


_POLLED = frozenset(
    (method, path)
    for method in ("GET", "HEAD")
    for path in (
        "/healthz",
        "/metrics",
        "/v1/status",
        "/v1/queue",
        "/v1/jobs",
        "/v1/events",
        "/v1/history",
    )
)
"""What open pages, probes and Prometheus ask for again and again: it must not drown the jobs in the
log."""


class Guard:
    """Wraps the application: request id, exactly-once clean-up, last-resort errors, access log,
    and an event for each request that came to nothing."""

    def __init__(self, app: WSGIApplication, clock: Clock, emit: Emit) -> None:
        self._emit = emit
        self._app = app
        self._clock = clock
        self._lock = threading.Lock()
        self._open = 0
        self._unsent: Callable[[], int] | None = None

    def unfinished(self) -> int:
        """Requests still being answered, plus bytes of answers not yet sent; 0 when idle."""
        unsent = self._unsent
        return self._open + (0 if unsent is None else unsent())

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        course: Course | None = environ.get(COURSE)
        urgency = None if (said := environ.get("HTTP_PRIORITY")) is None else urgency_of(said)
        trace = TRACEPARENT.fullmatch(environ.get("HTTP_TRACEPARENT", ""))
        record = RequestRecord(
            request_id=request_id(environ),
            method=environ["REQUEST_METHOD"][:LONGEST_SHOWN],
            path=path if path.isascii() and len(path) <= LONGEST_SHOWN else shown(path),
            client=environ.get("REMOTE_ADDR", "-"),
            started=self._clock.monotonic(),
            emit=self._emit,
            traceparent=trace and trace[0],
            urgency=urgency if course is None else course.urgency,
            session=session_of(environ),
            gone=environ.get("waitress.client_disconnected"),
            course=course,
        )
        environ[RECORD_KEY] = record
        with self._lock:
            self._open += 1
            if self._unsent is None and course is None:
                self._unsent = unsent_bytes(environ)
        guarded = _Guarded(record, environ, start_response, self._over)
        try:
            guarded.body = self._app(environ, guarded.start)
        except CLIENT_LEFT:  # before the head of the answer could be sent
            record.status, record.failure = ClientGone.status, ClientGone.code
            guarded.close()
            raise
        except Exception:
            log.exception("request failed", extra={"request_id": record.request_id})
            error = InternalError("the broker failed; its log has the details")
            payload = error.payload()
            headers = [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(payload))),
            ]
            guarded.close()
            guarded.start(f"{error.status} Internal Server Error", headers, sys.exc_info())
            return [payload]
        except BaseException:
            guarded.close()
            raise
        return guarded

    def _over(self, record: RequestRecord) -> None:
        """Its application is through with the request: give back what it holds, and tell of it."""
        with self._lock:
            self._open -= 1
        try:
            record.stack.close()
        except Exception:
            log.exception("clean-up failed", extra={"request_id": record.request_id})
        seconds = {
            "ms": self._clock.monotonic() - record.started,
            "wait_ms": record.waited_s,
            "evict_ms": record.prepared_s,
            "run_ms": record.run_s,
        }
        ms = {name: round(s * 1000, 1) for name, s in seconds.items() if s is not None}
        fields = {
            "method": record.method,
            "path": record.path,
            "status": record.status,
            "ms": ms["ms"],
            "client": record.client,
            "request_id": record.request_id,
            "key": record.key,
            "consumer": record.consumer,
            **ms,
            "failure": record.failure,
        }
        told = {name: value for name, value in fields.items() if value is not None}
        polled = (record.method, record.path) in _POLLED and record.status < 400
        access_log.log(logging.DEBUG if polled else logging.INFO, "request", extra=told)
        if record.failure is not None and record.run_s is None:
            self._emit(
                Refused(
                    code=record.failure,
                    status=record.status,
                    consumer=record.consumer,
                    client=record.who,
                    address=record.client,
                    key=record.key,
                    path=record.path,
                    request_id=record.request_id,
                    wait_ms=ms.get("wait_ms"),
                )
            )


class _Guarded:
    """One request on its way through the application, and the body of its answer, whose `close`
    also ends the request, once."""

    __slots__ = ("_environ", "_over", "_record", "_start_response", "body")

    def __init__(
        self,
        record: RequestRecord,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        over: Callable[[RequestRecord], object],
    ) -> None:
        self._record = record
        self._environ = environ
        self._start_response = start_response
        self._over: Callable[[RequestRecord], object] | None = over
        self.body: Iterable[bytes] = ()

    def start(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
    ) -> Callable[[bytes], object]:
        """The application's `start_response`."""
        record = self._record
        record.status = int(status[:3])
        if record.goes_on:
            close_after_answer(self._environ)
        ours = [("X-Request-Id", record.request_id)]
        if timing := record.server_timing():
            ours.append(("Server-Timing", timing))
        kept = [header for header in headers if header[0].lower() != "x-request-id"]
        return self._start_response(status, kept + ours, exc_info)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.body)

    def close(self) -> None:
        """End the request: undo what its layers left in the stack, once, and log it."""
        over, self._over = self._over, None
        if over is None:
            return
        try:
            close = getattr(self.body, "close", None)
            if close is not None:
                close()
        finally:
            over(self._record)
