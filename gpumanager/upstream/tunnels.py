"""All WebSockets that go through the broker: how many there may be, whose they are, their end."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Collection
from dataclasses import dataclass

from gpumanager.clock import Clock
from gpumanager.config import Config
from gpumanager.errors import QueueFull, ShuttingDown
from gpumanager.model import Traffic
from gpumanager.telemetry.events import Emit, WebsocketEnded
from gpumanager.upstream.relaying import Relaying
from gpumanager.upstream.tunnel import GOODBYE_S, Connection

log = logging.getLogger(__name__)

SHUTTING_DOWN = "the broker shuts down"


@dataclass(frozen=True, slots=True)
class Whose:
    """Who asked for a WebSocket, as the event of its end tells."""

    client: str
    address: str
    key: str | None
    request_id: str


class Tunnel:
    """One place among the WebSockets. Whoever reserved it gives it the consumer's connection
    (`reach`), then the client's (`open`), or gives it back (`drop`). For any thread."""

    def __init__(self, tunnels: Tunnels, consumer: str, whose: Whose) -> None:
        self._tunnels = tunnels
        self.consumer = consumer
        self.whose = whose
        self.upstream: Connection | None = None
        self.condemned: str | None = None
        self.traffic = Traffic()
        self.began = 0.0

    def reach(self, sock: socket.socket, behind: bytes) -> None:
        """The consumer has switched. `behind` is what it said since."""
        sock.setblocking(False)
        self._tunnels.reached(self, (sock, behind))

    def open(self, sock: socket.socket, behind: bytes) -> None:
        """The client knows that the consumer has switched. `behind` is what it said since. From
        here on both connections are relayed, or closed."""
        sock.setblocking(False)
        self._tunnels.opened(self, (sock, behind))

    def drop(self) -> None:
        """It comes to nothing. Idempotent, and without effect once it is open."""
        self._tunnels.dropped(self)

    def count(self, name: str, size: int) -> None:
        """`size` bytes came from `client` or `consumer`."""
        for traffic in (self.traffic, self._tunnels.traffic[self.consumer]):
            if name == "client":
                traffic.from_client += size
            else:
                traffic.from_consumer += size

    def ended(self, reason: str) -> None:
        """It is over."""
        self._tunnels.ended(self, reason)


class Tunnels:
    """At most `max_websockets` at a time. Safe from any thread."""

    def __init__(self, config: Config, clock: Clock, emit: Emit) -> None:
        self._config = config
        self._clock = clock
        self._emit = emit
        self._changed = threading.Condition()
        self._reserved: set[Tunnel] = set()
        self._open: set[Tunnel] = set()
        self._relaying: Relaying | None = None
        self._ending = self._stopped = False
        self.traffic: dict[str, Traffic] = {}

    def __len__(self) -> int:
        """How many places are taken."""
        return len(self._reserved) + len(self._open)

    def reserve(self, consumer: str, whose: Whose) -> Tunnel:
        """A place for one more. Raises QueueFull if there is none, ShuttingDown."""
        most = self._config.max_websockets
        with self._changed:
            if self._ending:
                raise ShuttingDown("the broker shuts down", consumer=consumer, retry_after=1)
            if len(self) >= most:
                message = f"{most} WebSockets are open; max_websockets allows no more"
                raise QueueFull(message, consumer=consumer, retry_after=1)
            tunnel = Tunnel(self, consumer, whose)
            self._reserved.add(tunnel)
            self.traffic.setdefault(consumer, Traffic())
            return tunnel

    def part(self, consumers: Collection[str], reason: str) -> None:
        """End those of these consumers, with a close frame to both sides. Returns at once."""
        with self._changed:
            for tunnel in self._reserved:
                if tunnel.consumer in consumers:
                    tunnel.condemned = reason  # its client may think already that it is open
            for tunnel in self._open:
                if tunnel.consumer in consumers and self._relaying is not None:
                    self._relaying.part(tunnel, reason)

    def drain(self) -> bool:
        """Open no more, and end all. True once none is left; False if one takes longer than it has
        for that, which `stop` will cut off."""
        with self._changed:
            self._ending = True
        self.part(tuple(self.traffic), SHUTTING_DOWN)
        with self._changed:
            return self._changed.wait_for(lambda: not len(self), GOODBYE_S + 1)

    def stop(self) -> None:
        """Cut off what is left, and end the thread. Idempotent."""
        with self._changed:
            self._ending = self._stopped = True
            for tunnel in tuple(self._reserved):
                self._drop(tunnel)
            relaying = self._relaying
        if relaying is not None:
            relaying.stop(SHUTTING_DOWN)

    # -- what a tunnel calls ---------------------------------------------------------------

    def reached(self, tunnel: Tunnel, upstream: Connection) -> None:
        """Keep the consumer's connection; close it if the place is not its own any more."""
        with self._changed:
            if tunnel in self._reserved:
                tunnel.upstream = upstream
            else:
                upstream[0].close()

    def opened(self, tunnel: Tunnel, client: Connection) -> None:
        """Have it relayed; close the client's connection if nobody may or can any more."""
        with self._changed:
            upstream = tunnel.upstream
            relaying = self._thread() if tunnel in self._reserved else None
            if upstream is None or relaying is None:
                self._drop(tunnel)
                client[0].close()
                return
            self._reserved.discard(tunnel)
            self._open.add(tunnel)
            tunnel.upstream = None
            tunnel.began = self._clock.monotonic()
            traffic = self.traffic[tunnel.consumer]
            traffic.now += 1
            traffic.opened += 1
            relaying.begin(tunnel, client, upstream)
            if tunnel.condemned is not None:
                relaying.part(tunnel, tunnel.condemned)

    def dropped(self, tunnel: Tunnel) -> None:
        """Give its place back, unless it is open."""
        with self._changed:
            self._drop(tunnel)

    def ended(self, tunnel: Tunnel, reason: str) -> None:
        """Give its place back, and tell of it."""
        with self._changed:
            self._open.discard(tunnel)
            self.traffic[tunnel.consumer].now -= 1
            self._changed.notify_all()
        whose = tunnel.whose
        self._emit(
            WebsocketEnded(
                consumer=tunnel.consumer,
                client=whose.client,
                address=whose.address,
                key=whose.key,
                request_id=whose.request_id,
                ms=round((self._clock.monotonic() - tunnel.began) * 1000),
                client_bytes=tunnel.traffic.from_client,
                consumer_bytes=tunnel.traffic.from_consumer,
                reason=reason,
            )
        )

    def _drop(self, tunnel: Tunnel) -> None:
        self._reserved.discard(tunnel)
        self._changed.notify_all()
        upstream, tunnel.upstream = tunnel.upstream, None
        if upstream is not None:
            upstream[0].close()

    def _thread(self) -> Relaying | None:
        if self._relaying is None and not self._stopped:
            try:
                self._relaying = Relaying(self._clock)
            except (OSError, RuntimeError) as error:
                log.warning("no thread for WebSockets", extra={"reason": str(error)})
        return None if self._stopped else self._relaying
