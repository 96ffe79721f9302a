"""The record of a request, in its WSGI environ; and what is read of the environ for it."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

from gpumanager.jobs.record import RequestRecord

RECORD_KEY = "gpumanager.record"
"""Where the guard leaves the record in the WSGI environ."""

LOCAL_ADDRESS = "gpumanager.local_address"
"""Where the server leaves its own end's address: the client's, where that is on this machine."""

COURSE = "gpumanager.course"
"""Where who runs a request for a client that does not wait leaves who wants to know how far it is
(`jobs.record.Course`)."""

ADMITTED = "gpumanager.admitted"
"""Where the server leaves what came of asking before it took a request's body: the name and the
role of its key, or the BrokerError for which it took none."""

LONGEST_SHOWN = 256
"""Characters of a path that are kept: thousands of them stay in memory."""

_SESSION = re.compile(r"[!-~]{1,128}")
_WELL_FORMED_ID = re.compile(r"[A-Za-z0-9._:+/=@-]{1,128}")
TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
"""A `traceparent` that is well-formed (W3C Trace Context)."""


def request_id(environ: Mapping[str, Any]) -> str:
    """The client's `X-Request-Id` if it is well-formed, else a new one."""
    given = environ.get("HTTP_X_REQUEST_ID", "")
    return given if _WELL_FORMED_ID.fullmatch(given) else secrets.token_hex(8)


def session_of(environ: Mapping[str, Any]) -> str | None:
    """The client's `X-Session-Id`; None where there is none, or it is not well-formed: 1 to 128
    printable ASCII characters without a space."""
    given = environ.get("HTTP_X_SESSION_ID")
    return given if given is not None and _SESSION.fullmatch(given) else None


def shown(text: str) -> str:
    """A text from a request's line, which WSGI hands on as if it were latin-1, as it may be kept
    and shown: as UTF-8, cut at `LONGEST_SHOWN` characters."""
    raw = text[: 4 * LONGEST_SHOWN].encode("latin-1", "replace")
    whole = raw.decode("utf-8", "backslashreplace")
    return whole if len(whole) <= LONGEST_SHOWN else f"{whole[: LONGEST_SHOWN - 1]}…"


record_of: Callable[[Mapping[str, Any]], RequestRecord] = itemgetter(RECORD_KEY)
"""The record of the request that an environ belongs to."""


def asks_websocket(environ: Mapping[str, Any]) -> bool:
    """Whether a request would rather speak WebSocket (RFC 6455, 4.2.1) from its answer on."""
    return (
        environ.get("REQUEST_METHOD") == "GET"
        and environ.get("SERVER_PROTOCOL", "HTTP/1.1") == "HTTP/1.1"
        and environ.get("CONTENT_LENGTH") in (None, "", "0")
        and _names(environ.get("HTTP_UPGRADE", ""), "websocket")
        and _names(environ.get("HTTP_CONNECTION", ""), "upgrade")
    )


def _names(header: str, token: str) -> bool:
    return token in (each.strip(" \t").lower() for each in header.split(","))
