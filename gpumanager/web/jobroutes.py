"""The routes of asynchronous jobs: look, wait, fetch the result, cancel."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import IO

from flask import Flask, Response, request
from werkzeug.exceptions import RequestedRangeNotSatisfiable

from gpumanager import errors
from gpumanager.asyncjobs.files import PIECE_BYTES
from gpumanager.asyncjobs.model import AsyncJob
from gpumanager.asyncjobs.service import AsyncJobs
from gpumanager.web.boundary import error_response, json_response
from gpumanager.web.deferring import PATH
from gpumanager.web.jobview import JobView
from gpumanager.web.record import record_of

CANCEL = "cancel_job"
"""The endpoint that changes something, and is open to keys with the role client."""

HARMLESS = (
    ("Content-Security-Policy", "sandbox; default-src 'none'; style-src 'unsafe-inline'"),
    ("X-Content-Type-Options", "nosniff"),
)
"""What a result says beside its consumer's own headers. A link to it opens in the broker's origin,
where the dashboard has its key: a page or a drawing in it must not run scripts there. Clients other
than browsers are not concerned; `frame-ancestors` and the like of the consumer's hold as well."""

LONGEST_WAIT_S = 60
RETRY_S = 2.0
LONGEST_RETRY_S = 60.0
MOST_JOBS = 1000
USUAL_JOBS = 100
BEAT_S = 15.0
"""A stream of states says something at least so often, so that a client that left is noticed."""

LOOK_S = 1.0
"""How often it looks at a place in the queue, which changes without a word."""


def install(app: Flask, jobs: AsyncJobs, view: JobView) -> None:
    """Add them."""

    @app.get(PATH)
    def list_jobs() -> Response:
        most = _number("limit", USUAL_JOBS, MOST_JOBS)
        before = _number("before", 2**53, 2**53)
        page = jobs.page(most, record_of(request.environ).whose, before)
        told = {"jobs": view.all_shown(page)}
        if len(page) == most and page:
            return json_response({**told, "before": page[-1].number})
        return json_response(told)

    @app.get(f"{PATH}/<job_id>")
    def show_job(job_id: str) -> Response:
        job = jobs.find(job_id, record_of(request.environ))
        if "text/event-stream" in request.headers.get("Accept", ""):
            return _stream(jobs, view, job)
        job = _awaited(jobs, job)
        answer = json_response(view.shown(job))
        answer.headers["Vary"] = "Accept"
        return answer

    @app.get(f"{PATH}/<job_id>/result")
    def fetch_result(job_id: str) -> Response:
        job = _awaited(jobs, jobs.find(job_id, record_of(request.environ)))
        if not job.over:
            return _not_yet(view, job)
        if job.state == "lost":
            raise errors.JobLost(
                "the broker ended while the job ran; its consumer may have finished it",
                consumer=job.consumer,
            )
        if job.result is None:
            raise errors.Cancelled("the job was cancelled", consumer=job.consumer)
        return _result(jobs, job)

    @app.delete(f"{PATH}/<job_id>", endpoint=CANCEL)
    def cancel_job(job_id: str) -> Response:
        record = record_of(request.environ)
        jobs.cancel(jobs.find(job_id, record))
        return json_response(view.shown(jobs.find(job_id, record)))


def _number(name: str, default: int, most: int) -> int:
    """A number in the query. Raises BadRequest for anything else."""
    given = request.args.get(name)
    if given is None:
        return default
    if not re.fullmatch(r"[0-9]{1,16}", given) or int(given) > most:
        raise errors.BadRequest(f"{name} must be a number from 0 to {most}")
    return int(given)


def _awaited(jobs: AsyncJobs, job: AsyncJob) -> AsyncJob:
    """The job, once it is over, or after as many seconds as `wait` in the query says. At once, if
    too many requests wait already."""
    seconds = _number("wait", 0, LONGEST_WAIT_S)
    if not seconds or job.over or not jobs.begin_waiting():
        return job
    try:
        until = time.monotonic() + seconds
        gone = request.environ.get("waitress.client_disconnected", lambda: False)
        while not job.over and (left := until - time.monotonic()) > 0:
            since = jobs.changes
            job = jobs.find(job.id, record_of(request.environ))
            if job.over or jobs.ending or gone():
                break
            jobs.await_change(since, min(left, LOOK_S))
        return job
    finally:
        jobs.end_waiting()


def _not_yet(view: JobView, job: AsyncJob) -> Response:
    shown = view.shown(job)
    answer = json_response(shown, 202)
    expected = shown["estimate_s"] or RETRY_S
    answer.headers["Retry-After"] = str(round(min(LONGEST_RETRY_S, max(RETRY_S, expected))))
    return answer


def _stream(jobs: AsyncJobs, view: JobView, job: AsyncJob) -> Response:
    """The job's states as server-sent events, until it is over."""
    if not jobs.begin_waiting():
        raise errors.QueueFull("too many requests wait for asynchronous jobs", retry_after=RETRY_S)
    record = record_of(request.environ)
    record.stack.callback(jobs.end_waiting)

    def events() -> Iterator[bytes]:
        now, told, said = job, b"", time.monotonic()
        while True:
            since = jobs.changes
            text = json.dumps(view.shown(now)).encode()
            if text != told:
                yield b"event: state\ndata: " + text + b"\n\n"
                told, said = text, time.monotonic()
            elif time.monotonic() - said >= BEAT_S:
                yield b": \n\n"
                said = time.monotonic()
            if now.over or jobs.ending:
                return
            jobs.await_change(since, LOOK_S)
            try:
                now = jobs.find(job.id, record)
            except errors.NotFound:
                return

    answer = Response(events(), content_type="text/event-stream")
    answer.headers["Cache-Control"] = "no-store"
    answer.headers["Vary"] = "Accept"
    return answer


def _result(jobs: AsyncJobs, job: AsyncJob) -> Response:
    """The answer as the client would have had it, or a range of it."""
    assert job.result is not None  # noqa: S101  # asked before
    kept, size = jobs.result(job), job.result.size
    answer: Response
    if isinstance(kept, bytes):
        answer = Response(kept)
    else:
        record_of(request.environ).stack.callback(kept.close)
        answer = Response(_File(kept, size), direct_passthrough=True)
    answer.status = f"{job.result.status} {job.result.reason}".rstrip()
    answer.autocorrect_location_header = False
    answer.headers.clear()
    for name, value in job.result.headers:
        if name.lower() != "content-length":
            answer.headers.add(name, value)
    for name, value in HARMLESS:
        answer.headers.add(name, value)
    if job.result.status in (204, 304):
        return answer
    answer.content_length = size
    if job.result.status == 200:
        try:
            answer.make_conditional(request.environ, accept_ranges=True, complete_length=size)
        except RequestedRangeNotSatisfiable:
            error = errors.RangeNotSatisfiable(f"the result has {size} bytes")
            refused = error_response(error, request.environ)
            refused.headers["Content-Range"] = f"bytes */{size}"
            return refused
    return answer


class _File:
    """A result's file, for the server to iterate over; it can be asked for a part of it."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._size = size

    def __iter__(self) -> _File:
        return self

    def __next__(self) -> bytes:
        data = self._file.read(min(PIECE_BYTES, self._size - self._file.tell()))
        if not data:
            raise StopIteration
        return data

    def seekable(self) -> bool:
        """For a range: it need not be read from its beginning."""
        return True

    def seek(self, position: int) -> int:
        """Go there."""
        return self._file.seek(position)

    def tell(self) -> int:
        """Where it is."""
        return self._file.tell()
