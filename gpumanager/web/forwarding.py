"""Requests that are no GPU work: forwarded at once, outside the lock."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

from flask import Response

from gpumanager.errors import ClientGone, QueueFull, ShuttingDown
from gpumanager.jobs.client import ClientWatch
from gpumanager.jobs.runner import Answer
from gpumanager.upstream.exchange import Exchange
from gpumanager.upstream.proxy import Inbound, Proxy
from gpumanager.upstream.watcher import Watcher
from gpumanager.web.inbound import inbound_of
from gpumanager.web.record import record_of
from gpumanager.web.relay import RelayedResponse

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment


class Forwarder:
    """Forwards to consumers, at most `most` requests at once, and `most_each` to one consumer: each
    holds one of the server's threads, of which the jobs need theirs. Safe from any thread."""

    def __init__(self, proxy: Proxy, watcher: Watcher, *, most: int, most_each: int) -> None:
        self._proxy = proxy
        self._watcher = watcher
        self._most = most
        self._most_each = most_each
        self._lock = threading.Lock()
        self._under_way: Counter[str] = Counter()
        self._open: dict[Exchange, str] = {}

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
        self._enter(name)
        record.stack.callback(self._leave, name)
        exchange = self._proxy.prepare(name, inbound or inbound_of(environ), path, endless=endless)
        record.stack.callback(exchange.close)
        self._open[exchange] = name
        record.stack.callback(self._open.pop, exchange)
        client = ClientWatch(record, self._watcher)
        record.stack.callback(client.stop)
        client.when_gone(lambda: exchange.abort(ClientGone("the client left")))
        exchange.send()
        return RelayedResponse(Answer(exchange, on_end=lambda: None))

    def cut_off(self) -> None:
        """Break off what is under way: a page's stream never ends by itself."""
        for exchange, name in self._open.copy().items():
            exchange.abort(ShuttingDown("the broker shut down", consumer=name))

    def _enter(self, name: str) -> None:
        with self._lock:
            if self._under_way.total() >= self._most:
                full = f"{self._most} requests"
            elif self._under_way[name] >= self._most_each:
                full = f"{self._most_each} requests to {name}"
            else:
                self._under_way[name] += 1
                return
        message = f"{full} outside the queue are under way"
        raise QueueFull(message, consumer=name, retry_after=1)

    def _leave(self, name: str) -> None:
        with self._lock:
            self._under_way[name] -= 1
