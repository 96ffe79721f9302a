"""Dispatch: jobs and mounts go straight to what answers them, everything else to Flask.

Flask's own dispatch (contexts, signals, routing, request objects) is a good part of what the broker
adds to a job, and a job needs none of it. What it does need, the same checks and the same error
answers, is called here as Flask would call it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from gpumanager.errors import BrokerError
from gpumanager.web.boundary import error_response, unexpected

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

View = Callable[["WSGIEnvironment"], "WSGIApplication"]


class Dispatch:
    """WSGI. `find` gives the view of a request that is not Flask's, None for any other; `check` is
    asked before one is called, and raises BrokerError."""

    def __init__(
        self,
        app: WSGIApplication,
        find: Callable[[WSGIEnvironment], View | None],
        check: Callable[[WSGIEnvironment], object],
    ) -> None:
        self._app = app
        self._find = find
        self._check = check

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        view = self._find(environ)
        if view is None:
            return self._app(environ, start_response)
        try:
            self._check(environ)
            answer = view(environ)
        except BrokerError as error:
            answer = error_response(error, environ)
        except Exception as error:  # noqa: BLE001  # logged, and answered with a 500
            answer = unexpected(error, environ)
        return answer(environ, start_response)
