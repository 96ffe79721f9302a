"""Forwarding a client's request to a consumer. Knows nothing of scheduling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

from gpumanager.clock import Clock
from gpumanager.config import Config, ConsumerConfig
from gpumanager.upstream.exchange import Exchange, Outbound
from gpumanager.upstream.headers import end_to_end
from gpumanager.upstream.watcher import Watcher

SMALL_BODY_BYTES = 256 * 1024
"""A body up to this size is read into memory, so that it can be sent in one go."""

_NOT_FORWARDED = frozenset({"host", "content-length", "expect", "x-request-id"})


@dataclass(frozen=True, slots=True)
class Inbound:
    """A client's request, as far as the proxy needs it. `body` holds `length` bytes; `length`
    is None where the request has no body at all."""

    method: str
    query: str
    headers: list[tuple[str, str]]
    body: IO[bytes] | None
    length: int | None
    request_id: str


class Proxy:
    """Opens exchanges with the configured consumers. Safe from any thread."""

    def __init__(self, config: Config, watcher: Watcher, clock: Clock) -> None:
        self._config = config
        self._watcher = watcher
        self._clock = clock

    def prepare(
        self,
        consumer: str,
        inbound: Inbound,
        path: str,
        method: str | None = None,
        settings: ConsumerConfig | None = None,
        *,
        endless: bool = False,
        upgrade: str | None = None,
    ) -> Exchange:
        """An exchange that forwards `inbound` to `path` of the consumer, not yet sent.

        `path` is sent to the letter behind the consumer's base path, then the client's query;
        `method` None keeps the client's. `settings` are the consumer's, as of when a job was
        admitted; None: those in force. `endless`: no limit on the whole, but on each part.
        `upgrade` is the protocol to ask for instead of HTTP.
        """
        settings = self._config.consumers[consumer] if settings is None else settings
        target = settings.base_path + path
        if inbound.query:
            target += ("&" if "?" in target else "?") + inbound.query
        method = method or inbound.method
        length = inbound.length
        if length is None and method in {"POST", "PUT", "PATCH"}:
            length = 0
        body: bytes | IO[bytes] | None = inbound.body
        if inbound.body is not None and length is not None and length <= SMALL_BODY_BYTES:
            body = inbound.body.read(length)
        outbound = Outbound(
            method=method,
            base_url=settings.base_url,
            target=target,
            headers=[
                *end_to_end(inbound.headers, without=_NOT_FORWARDED),
                ("X-Request-Id", inbound.request_id),
            ],
            body=body or None,
            length=length,
            ca_file=settings.ca_file,
            upgrade=upgrade,
        )
        timeouts = settings.timeouts.without_end() if endless else settings.timeouts
        return Exchange(consumer, outbound, timeouts, self._watcher, self._clock)


def inbound_headers(environ: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The client's headers from a WSGI environ. Repeated ones were joined by the server."""
    headers = [
        (key[5:].replace("_", "-").title(), value)
        for key, value in environ.items()
        if key.startswith("HTTP_")
    ]
    if environ.get("CONTENT_TYPE"):
        headers.append(("Content-Type", environ["CONTENT_TYPE"]))
    return headers
