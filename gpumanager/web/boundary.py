"""The one place where errors become answers: the JSON envelope, whatever went wrong."""

from __future__ import annotations

import logging

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from gpumanager import errors
from gpumanager.web.record import record_of

log = logging.getLogger(__name__)

_REASONS = {499: "Client Closed Request"}


def json_response(body: object, status: int = 200) -> Response:
    """`body` as JSON on a line of its own."""
    return Response(errors.json_line(body), status=status, content_type="application/json")


def error_response(error: errors.BrokerError) -> Response:
    """The answer that `error` carries."""
    record = record_of(request.environ)
    record.failure = error.code
    record.consumer = error.consumer or record.consumer
    response = json_response(error.envelope(), error.status)
    if error.status in _REASONS:
        response.status = f"{error.status} {_REASONS[error.status]}"
    for name, value in error.headers():
        response.headers[name] = value
    return response


def install(app: Flask) -> None:
    """Route every error of `app` through the envelope."""
    app.register_error_handler(errors.BrokerError, error_response)
    app.register_error_handler(HTTPException, _http_exception)
    app.register_error_handler(Exception, _unexpected)


def _http_exception(error: HTTPException) -> Response:
    """Flask's and Werkzeug's own: no such route, wrong method, unreadable request."""
    if error.code == 404:
        return error_response(errors.NotFound(f"there is nothing at {request.path}"))
    if error.code == 405:
        allow = sorted(getattr(error, "valid_methods", None) or [])
        message = f"{request.method} is not allowed here; allowed: {', '.join(allow)}"
        return error_response(errors.MethodNotAllowed(message, allow=allow))
    if error.code == 413:
        return error_response(errors.PayloadTooLarge("the body is too large"))
    if error.code is not None and error.code < 500:
        return error_response(errors.BadRequest(error.description or "malformed request"))
    return _unexpected(error)


def _unexpected(error: Exception) -> Response:
    record = record_of(request.environ)
    log.error("request failed", exc_info=error, extra={"request_id": record.request_id})
    return error_response(errors.InternalError("the broker failed; its log has the details"))
