"""Who may do what, and see what of whom: an `admin` everything, a `client` with its own jobs."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from gpumanager.errors import Forbidden
from gpumanager.jobs.record import RequestRecord
from gpumanager.telemetry.eventlog import Recorded
from gpumanager.telemetry.events import PRIVATE

NAMELESS = {"client": "-", "request_id": "-", "requester": "-"}
"""What another key's job shows of itself in the queue."""

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Those that change nothing."""

CHANGE_NOTHING = frozenset({"/api/show"})
"""Paths that change nothing either, although they are asked by POST: Ollama's."""


def check_role(record: RequestRecord, endpoint: str | None, for_clients: Collection[str]) -> None:
    """Refuse to a client key whatever changes something and is not one of the endpoints
    `for_clients`: a route that nobody thought of is an admin's. Raises Forbidden."""
    if record.role == "admin" or record.method in SAFE_METHODS:
        return
    if endpoint is not None and endpoint not in for_clients:
        raise Forbidden(
            f"key '{record.key}' has the role client, which may run jobs and cancel its own; "
            "this wants a key with the role admin"
        )


def check_owner(record: RequestRecord, ticket: int, key: str | None) -> None:
    """Refuse to a client key the job of another. Raises Forbidden."""
    if record.whose not in (None, key):
        raise Forbidden(
            f"ticket {ticket} is not a job of key '{record.key}', which has the role client; "
            "only a key with the role admin may cancel it"
        )


def visible(events: Iterable[Recorded], whose: str | None) -> Iterable[Recorded]:
    """The events as the key `whose` may see them: those of others without what tells who they
    are. None: everything."""
    if whose is None:
        return events
    return [
        event if event.fields.get("key") == whose else replace(event, fields=_nameless(event))
        for event in events
    ]


def _nameless(event: Recorded) -> dict[str, object]:
    return {name: value for name, value in event.fields.items() if name not in PRIVATE}
