"""Dispatch: jobs go straight to what runs them, everything else to Flask.

Flask's own dispatch (contexts, signals, routing, request objects) is a good part of what the broker
adds to a job, and a job needs none of it. What it does need, the same checks and the same error
answers, is called here as Flask would call it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from gpumanager.errors import BrokerError, MethodNotAllowed
from gpumanager.web.boundary import error_response, unexpected
from gpumanager.web.ways import JobView

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


class Dispatch:
    """WSGI. `find` gives the view of a path that takes jobs, by POST only, None for any other;
    `check` is asked before one is called, and raises BrokerError."""

    def __init__(
        self,
        app: WSGIApplication,
        find: Callable[[str], JobView | None],
        check: Callable[[WSGIEnvironment], object],
    ) -> None:
        self._app = app
        self._find = find
        self._check = check

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        job = self._find(environ["PATH_INFO"])
        if job is None:
            return self._app(environ, start_response)
        try:
            self._check(environ)
            if environ["REQUEST_METHOD"] != "POST":
                message = f"{environ['REQUEST_METHOD']} is not allowed here; allowed: POST"
                raise MethodNotAllowed(message, allow=["POST"])
            answer = job(environ)
        except BrokerError as error:
            answer = error_response(error, environ)
        except Exception as error:  # noqa: BLE001  # logged, and answered with a 500
            answer = unexpected(error, environ)
        return answer(environ, start_response)
