"""What is remembered of one request from its first byte to its last."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from gpumanager.events import AnswerTruncated, Emit
from gpumanager.keys import Role

RECORD_KEY = "gpumanager.record"
"""Where the guard leaves the record in the WSGI environ."""

LOCAL_ADDRESS = "gpumanager.local_address"
"""Where the server leaves its own end's address: the client's, where that is on this machine."""

ADMITTED = "gpumanager.admitted"
"""Where the server leaves what came of asking before it took a request's body: the name and the
role of its key, or the BrokerError for which it took none."""

LONGEST_SHOWN = 256
"""Characters of a path that are kept: thousands of them stay in memory."""

_WELL_FORMED_ID = re.compile(r"[A-Za-z0-9._:+/=@-]{1,128}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(slots=True)
class RequestRecord:
    """One request. `stack` holds whatever must be undone when it is over, however it ends;
    times are in seconds, None until known. `client` is its address; `role` is the key's; without
    keys everybody is an admin. `emit` tells what happens to it. `goes_on`: its thread is still
    needed when its client has the answer, which had better not send the next request over the
    same connection."""

    request_id: str
    method: str
    path: str
    client: str
    started: float
    emit: Emit
    stack: ExitStack = field(default_factory=ExitStack)
    status: int = 0
    key: str | None = None
    role: Role = "admin"
    traceparent: str | None = None
    consumer: str | None = None
    waited_s: float | None = None
    prepared_s: float | None = None
    upstream_s: float | None = None
    run_s: float | None = None
    failure: str | None = None
    goes_on: bool = False

    @property
    def who(self) -> str:
        """Whose request it is: the name of its key where keys are in use, else its address."""
        return self.client if self.key is None else self.key

    @property
    def whose(self) -> str | None:
        """The key whose jobs this request may see whole and cancel; None: everybody's."""
        return self.key if self.role == "client" else None

    def truncated(self, reason: str) -> None:
        """Its answer broke off."""
        request_id, name = self.request_id, self.consumer
        self.emit(AnswerTruncated(consumer=name, request_id=request_id, reason=reason))

    def server_timing(self) -> str | None:
        """The `Server-Timing` of a job that was granted the GPU, None for any other request."""
        if self.waited_s is None or self.prepared_s is None:
            return None
        phases = [("queue", self.waited_s), ("evict", self.prepared_s)]
        if self.upstream_s is not None:
            phases.append(("upstream", self.upstream_s))
        return ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in phases)


def request_id(environ: Mapping[str, Any]) -> str:
    """The client's `X-Request-Id` if it is well-formed, else a new one."""
    given = environ.get("HTTP_X_REQUEST_ID", "")
    return given if _WELL_FORMED_ID.fullmatch(given) else secrets.token_hex(8)


def shown(text: str) -> str:
    """A text from a request's line, which WSGI hands on as if it were latin-1, as it may be kept
    and shown: as UTF-8, cut at `LONGEST_SHOWN` characters."""
    raw = text[: 4 * LONGEST_SHOWN].encode("latin-1", "replace")
    whole = raw.decode("utf-8", "backslashreplace")
    return whole if len(whole) <= LONGEST_SHOWN else f"{whole[: LONGEST_SHOWN - 1]}…"


def record_of(environ: Mapping[str, Any]) -> RequestRecord:
    """The record of the request that `environ` belongs to."""
    record: RequestRecord = environ[RECORD_KEY]
    return record


def traceparent(environ: Mapping[str, Any]) -> str | None:
    """The client's `traceparent` (W3C Trace Context), if it is well-formed."""
    found = environ.get("HTTP_TRACEPARENT")
    return found if found is not None and _TRACEPARENT.fullmatch(found) else None
