"""Requests that are no GPU work: forwarded at once, outside the lock."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from flask import Response

from gpumanager.errors import ClientGone, QueueFull
from gpumanager.jobs.client import ClientWatch
from gpumanager.jobs.runner import Answer
from gpumanager.upstream.proxy import Inbound, Proxy
from gpumanager.upstream.watcher import Watcher
from gpumanager.web.inbound import inbound_of
from gpumanager.web.record import record_of
from gpumanager.web.relay import RelayedResponse

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment


class Forwarder:
    """Forwards to a consumer, at most `most` requests at once: each holds one of the server's
    threads, of which the jobs need theirs. Safe from any thread."""

    def __init__(self, proxy: Proxy, watcher: Watcher, *, most: int) -> None:
        self._proxy = proxy
        self._watcher = watcher
        self._most = most
        self._places = threading.BoundedSemaphore(most)

    def __call__(
        self,
        environ: WSGIEnvironment,
        name: str,
        path: str,
        inbound: Inbound | None = None,
        *,
        endless: bool = False,
    ) -> Response:
        """The consumer's answer to the request at `path`, which is sent to the letter; `endless`:
        it may take as long as it likes, if only bytes come. Raises
        QueueFull if too many are under way, and what sending raises."""
        record = record_of(environ)
        record.consumer = name
        if not self._places.acquire(blocking=False):
            raise QueueFull(
                f"{self._most} requests outside the queue are under way",
                consumer=name,
                retry_after=1,
            )
        record.stack.callback(self._places.release)
        exchange = self._proxy.prepare(name, inbound or inbound_of(environ), path, endless=endless)
        record.stack.callback(exchange.close)
        client = ClientWatch(record, self._watcher)
        record.stack.callback(client.stop)
        client.when_gone(lambda: exchange.abort(ClientGone("the client left")))
        exchange.send()
        return RelayedResponse(Answer(exchange, on_end=lambda: None))
