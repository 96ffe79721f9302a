"""WebSockets: a request that asks to switch is sent on to the consumer; if that switches, both
connections are taken out of HTTP and given to `upstream.tunnels`."""

from __future__ import annotations

import http
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, cast

from flask import Response

from gpumanager.errors import ClientGone, ShuttingDown
from gpumanager.jobs.client import ClientWatch
from gpumanager.jobs.runner import Answer
from gpumanager.upstream.proxy import Inbound, Proxy
from gpumanager.upstream.tunnels import Tunnels, Whose
from gpumanager.upstream.watcher import Watcher
from gpumanager.web.answering import Switch
from gpumanager.web.record import asks_websocket, record_of
from gpumanager.web.relay import RelayedResponse
from gpumanager.web.server import can_switch

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

PROTOCOL = "websocket"


class WebSockets:
    """Answers requests that ask for a WebSocket, outside the lock. `draining`: no more are
    opened."""

    def __init__(
        self, proxy: Proxy, tunnels: Tunnels, watcher: Watcher, draining: Callable[[], bool]
    ) -> None:
        self._proxy = proxy
        self._tunnels = tunnels
        self._watcher = watcher
        self._draining = draining

    @staticmethod
    def wanted(environ: WSGIEnvironment) -> bool:
        """Whether a request is to be given to `answer`. An upgrade to anything else is none: its
        header is dropped, as RFC 9110 (7.8) has it."""
        return asks_websocket(environ) and can_switch(environ)

    def answer(
        self, environ: WSGIEnvironment, consumer: str, path: str, inbound: Inbound
    ) -> Response:
        """What the consumer answers at `path`, which is sent to the letter: 101 and all that comes
        after it, or anything else.

        Raises QueueFull beyond `max_websockets`, ShuttingDown, BadRequest, ConsumerUnreachable,
        ConsumerTimeout.
        """
        record = record_of(environ)
        record.consumer = consumer
        if self._draining():
            raise ShuttingDown("the broker shuts down", consumer=consumer, retry_after=1)
        whose = Whose(record.who, record.client, record.key, record.request_id)
        tunnel = self._tunnels.reserve(consumer, whose)
        switch = Switch(PROTOCOL, tunnel.open, tunnel.drop)
        record.stack.callback(switch.end_of_request)
        exchange = self._proxy.prepare(consumer, inbound, path, upgrade=PROTOCOL)
        record.stack.callback(exchange.close)
        client = ClientWatch(record, self._watcher)
        record.stack.callback(client.stop)
        gone = ClientGone("the client left", consumer=consumer)
        client.when_gone(lambda: exchange.abort(gone))
        exchange.send()
        if exchange.status != http.HTTPStatus.SWITCHING_PROTOCOLS:
            tunnel.drop()
            return RelayedResponse(Answer(exchange, on_end=lambda: None))
        tunnel.reach(*exchange.hand_over())
        return _Switched(exchange.reason, exchange.headers, switch)


class _Switched(Response):
    """The answer 101, after which the connection is no longer the server's."""

    def __init__(self, reason: str, headers: list[tuple[str, str]], switch: Switch) -> None:
        super().__init__(status=http.HTTPStatus.SWITCHING_PROTOCOLS)
        self._line = f"101 {reason or 'Switching Protocols'}"
        self._headers = headers
        self._switch = switch

    def __call__(
        self,
        environ: WSGIEnvironment,  # noqa: ARG002  # a Response's signature
        start_response: StartResponse,
    ) -> Iterable[bytes]:
        start_response(self._line, self._headers)
        return self._body()

    def _body(self) -> Iterator[bytes]:
        # Our own server knows what to do with it; no other one is asked.
        yield cast(bytes, self._switch)
