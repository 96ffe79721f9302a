"""The way in: jobs go straight to what runs them, everything else to Flask.

Flask's dispatch (contexts, signals, routing, request objects) is a good part of what the broker
adds to a job, and a job needs none of it. What it does need, the same checks and the same error
answers, is called here as Flask would call it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from flask import Response

from gpumanager.errors import BrokerError
from gpumanager.web.boundary import error_response, unexpected

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

JobView = Callable[["WSGIEnvironment"], Response]


class Entrance:
    """WSGI. `jobs` gives the view of each path that takes jobs by POST; `check` is asked before
    one is called, and raises BrokerError."""

    def __init__(
        self,
        app: WSGIApplication,
        jobs: Mapping[str, JobView],
        check: Callable[[WSGIEnvironment], object],
    ) -> None:
        self._app = app
        self._jobs = jobs
        self._check = check

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        job = self._jobs.get(environ["PATH_INFO"])
        if job is None or environ["REQUEST_METHOD"] != "POST":
            return self._app(environ, start_response)
        try:
            self._check(environ)
            answer = job(environ)
        except BrokerError as error:
            answer = error_response(error, environ)
        except Exception as error:  # noqa: BLE001  # logged, and answered with a 500
            answer = unexpected(error, environ)
        return answer(environ, start_response)
