"""Running a kept request: it goes the very way that it would have gone as it came, and its answer
to the store instead of a socket."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

from gpumanager.asyncjobs.model import AsyncJob, Result
from gpumanager.asyncjobs.run import Outcome, Run
from gpumanager.errors import TruncatedAnswer
from gpumanager.web.record import ADMITTED, COURSE, record_of

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

Headers = list[tuple[str, str]]

_OF_THE_RUN = frozenset({"x-request-id"})
"""Headers of the answer that belong to the request that fetches it."""


class Replay:
    """`asyncjobs.executor.Play`, by the whole WSGI application, the guard around it included."""

    def __init__(self, app: WSGIApplication) -> None:
        self._app = app

    def __call__(self, job: AsyncJob, body: IO[bytes], length: int, run: Run) -> Outcome:
        """Have it answered. The request has the job's id; its key and role are those that it was
        submitted with."""

        def gone() -> bool:  # no bound method: that of waitress leads to its connection
            return run.gone()

        environ: dict[str, Any] = {
            **job.environ,
            "HTTP_X_REQUEST_ID": job.id,
            ADMITTED: (job.key, job.role),
            COURSE: run,
            "waitress.client_disconnected": gone,
            "wsgi.input": body,
            "wsgi.errors": sys.stderr,
            "wsgi.version": (1, 0),
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        if "CONTENT_LENGTH" in job.environ:
            environ["CONTENT_LENGTH"] = str(length)
        heads: list[tuple[str, Headers]] = []

        def start(
            status: str,
            headers: Headers,
            exc_info: Any = None,  # noqa: ARG001  # WSGI's
            /,
        ) -> Callable[[bytes], object]:
            heads.append((status, headers))
            return run.write

        broke_off = None
        answer = self._app(environ, start)
        try:
            for piece in answer:
                run.write(piece)
        except TruncatedAnswer as error:
            broke_off = error.error
        finally:
            close = getattr(answer, "close", None)
            if close is not None:
                close()
        status, headers = heads[-1]
        kept = [(name, value) for name, value in headers if name.lower() not in _OF_THE_RUN]
        code, _, reason = status.partition(" ")
        failure = record_of(environ).failure if broke_off is None else broke_off.code
        return Outcome(
            Result(int(code), reason, tuple(kept)),
            failure,
            _retry_after(headers) if failure is not None else None,
            broke_off,
        )


def _retry_after(headers: Headers) -> float | None:
    return next(
        (
            float(value)
            for name, value in headers
            if name.lower() == "retry-after" and value.isdecimal()
        ),
        None,
    )
