"""The one place where errors become answers: the JSON envelope, whatever went wrong."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from gpumanager import errors
from gpumanager.web.protocols import protocol_of
from gpumanager.web.record import record_of

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

log = logging.getLogger(__name__)

_REASONS = {499: "Client Closed Request"}


def json_response(body: object, status: int = 200) -> Response:
    """`body` as JSON on a line of its own."""
    return Response(errors.json_line(body), status=status, content_type="application/json")


def error_response(error: errors.BrokerError, environ: WSGIEnvironment) -> Response:
    """The answer that `error` carries, to the request that `environ` belongs to."""
    record = record_of(environ)
    record.failure = error.code
    record.consumer = error.consumer or record.consumer
    protocol = protocol_of(environ["PATH_INFO"])
    response = json_response(protocol.body(error), error.status)
    if error.status in _REASONS:
        response.status = f"{error.status} {_REASONS[error.status]}"
    for name, value in protocol.headers(error):
        response.headers[name] = value
    return response


def install(app: Flask) -> None:
    """Route every error of `app` through the envelope."""
    app.register_error_handler(
        errors.BrokerError, lambda error: error_response(error, request.environ)
    )
    app.register_error_handler(HTTPException, _http_exception)
    app.register_error_handler(Exception, lambda error: unexpected(error, request.environ))


def _http_exception(error: HTTPException) -> Response:
    """Flask's and Werkzeug's own: no such route, wrong method, unreadable request."""
    if error.code == 404:
        found: errors.BrokerError = errors.NotFound(
            f"there is nothing at {record_of(request.environ).path}"
        )
    elif error.code == 405:
        allow = sorted(getattr(error, "valid_methods", None) or [])
        message = f"{request.method} is not allowed here; allowed: {', '.join(allow)}"
        found = errors.MethodNotAllowed(message, allow=allow)
    elif error.code == 413:
        found = errors.PayloadTooLarge("the body is too large")
    elif error.code is not None and error.code < 500:
        found = errors.BadRequest(error.description or "malformed request")
    else:
        return unexpected(error, request.environ)
    return error_response(found, request.environ)


def unexpected(error: Exception, environ: WSGIEnvironment) -> Response:
    """The answer to a fault of the broker's own, which goes into the log."""
    record = record_of(environ)
    log.error("request failed", exc_info=error, extra={"request_id": record.request_id})
    failed = errors.InternalError("the broker failed; its log has the details")
    return error_response(failed, environ)
