"""Requests whose clients do not wait: `Prefer: respond-async` (RFC 7240) makes an asynchronous job
of GPU work, which is answered at once with 202 and the place where its result will be."""

from __future__ import annotations

import re
from typing import IO, TYPE_CHECKING

from flask import Response

from gpumanager.asyncjobs.model import LATER, AsyncJob, Submission
from gpumanager.asyncjobs.service import AsyncJobs
from gpumanager.asyncjobs.targets import Targets
from gpumanager.config import Config
from gpumanager.errors import BadRequest, json_line
from gpumanager.jobs.record import RequestRecord
from gpumanager.web.jobview import JobView
from gpumanager.web.priority import urgency_of
from gpumanager.web.record import COURSE, record_of

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

PATH = "/v1/jobs"

_KEPT = frozenset(
    {
        "CONTENT_LENGTH",
        "CONTENT_TYPE",
        "PATH_INFO",
        "QUERY_STRING",
        "REMOTE_ADDR",
        "REMOTE_HOST",
        "REQUEST_METHOD",
        "REQUEST_URI",
        "SCRIPT_NAME",
        "SERVER_NAME",
        "SERVER_PORT",
        "SERVER_PROTOCOL",
        "wsgi.url_scheme",
    }
)
"""What is kept of a request's environ, beside its headers."""

_IDEMPOTENCY_KEY = re.compile(r"[ -~]{1,255}")


class Deferring:
    """Makes asynchronous jobs of requests. `targets` is whom a client may have told that its job is
    over. Safe from any thread."""

    def __init__(self, jobs: AsyncJobs, view: JobView, config: Config, targets: Targets) -> None:
        self._jobs = jobs
        self._targets = targets
        self._view = view
        self._config = config

    def wanted(self, environ: WSGIEnvironment) -> bool:
        """Whether the client does not want to wait for the answer to its GPU work."""
        prefer = environ.get("HTTP_PREFER")
        return (
            prefer is not None
            and "respond-async" in _preferences(prefer)
            and self._jobs.taken
            and COURSE not in environ
        )

    def accept(
        self, environ: WSGIEnvironment, kind: str, consumer: str, model: str | None = None
    ) -> Response:
        """Keep the request for later, and answer it. `kind` and `consumer` are those of the job as
        things stand; `model` is what it calls its model, where that is known. Raises
        IdempotencyMismatch, QueueFull, JobsFull, ShuttingDown, and BadRequest for a malformed
        `Idempotency-Key` or an `X-Callback-Url` that may not be called."""
        record = record_of(environ)
        record.consumer = consumer
        submission = Submission(
            kind=kind,
            consumer=consumer,
            urgency=self._urgency(environ, record, kind, consumer),
            requester=record.who,
            key=record.key,
            role=record.role,
            environ=_kept(environ),
            idempotency_key=_idempotency_key(environ),
            callback=self._callback(environ),
            model=model,
        )
        length = environ.get("CONTENT_LENGTH")
        body: IO[bytes] | None = environ["wsgi.input"] if length else None
        job, _ = self._jobs.submit(submission, body, int(length) if length else 0)
        return self._answer(environ, job)

    def _callback(self, environ: WSGIEnvironment) -> str | None:
        url: str | None = environ.get("HTTP_X_CALLBACK_URL")
        if url is None:
            return None
        if not self._targets:
            raise BadRequest("X-Callback-Url: this broker calls nobody (jobs.callbacks is empty)")
        try:
            self._targets.target(url)
        except ValueError as error:
            raise BadRequest(f"X-Callback-Url: {error}") from None
        return url

    def _urgency(
        self, environ: WSGIEnvironment, record: RequestRecord, kind: str, consumer: str
    ) -> int:
        """As its `Priority` says; else less urgent than that of one with a client that waits."""
        said = environ.get("HTTP_PRIORITY")
        wanted = None if said is None else urgency_of(said)
        if wanted is None:
            settings = self._config.consumers.get(consumer)
            usual = record.urgency_or(self._config.urgency_of(kind, settings))
            wanted = max(LATER, usual)
        return max(record.most_urgent, wanted)

    def _answer(self, environ: WSGIEnvironment, job: AsyncJob) -> Response:
        answer = Response(
            json_line(self._view.shown(job)), status=202, content_type="application/json"
        )
        answer.autocorrect_location_header = False
        answer.headers["Location"] = self._location(environ, job)
        answer.headers["Preference-Applied"] = "respond-async"
        return answer

    def _location(self, environ: WSGIEnvironment, job: AsyncJob) -> str:
        """On a port of a consumer's own the job is not to be found: there all paths are its own."""
        path, port = f"{PATH}/{job.id}", environ.get("SERVER_PORT", "")
        if not port.isdecimal() or int(port) not in self._config.ports:
            return path
        host = environ.get("HTTP_HOST", "").rpartition(":")[0] or self._config.host
        scheme = environ.get("wsgi.url_scheme", "http")
        return f"{scheme}://{host}:{self._config.port}{path}"


def _preferences(header: str) -> list[str]:
    """The names of the preferences in a `Prefer` header, in lower case."""
    parts = (each.partition(";")[0].partition("=")[0] for each in header.split(","))
    return [each.strip().lower() for each in parts]


def _kept(environ: WSGIEnvironment) -> dict[str, str]:
    """What is needed of the request to run it later. How long a client waits is nothing to one that
    does not."""
    kept = {
        name: value
        for name, value in environ.items()
        if isinstance(value, str) and (name in _KEPT or name.startswith("HTTP_"))
    }
    kept.pop("HTTP_X_CALLBACK_URL", None)  # the broker's own
    left = [
        each.strip()
        for each in kept.pop("HTTP_PREFER", "").split(",")
        if not {"respond-async", "wait"} & set(_preferences(each))
    ]
    if any(left):
        kept["HTTP_PREFER"] = ", ".join(left)
    return kept


def _idempotency_key(environ: WSGIEnvironment) -> str | None:
    given: str | None = environ.get("HTTP_IDEMPOTENCY_KEY")
    if given is not None and not _IDEMPOTENCY_KEY.fullmatch(given):
        raise BadRequest("Idempotency-Key must be 1 to 255 printable ASCII characters")
    return given
