"""Everything that knows about waitress.

`waitress-serve` imports the application before it reads its own settings, whose defaults are
class attributes: what is set on them during that import holds unless its command line says
otherwise. `gpumanager serve` goes the same way, so that there is one set of defaults.
"""

from __future__ import annotations

import errno
import logging
import resource
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import waitress
import waitress.server
from waitress.adjustments import Adjustments
from waitress.channel import ClientDisconnected
from waitress.server import BaseWSGIServer
from waitress.task import ThreadedTaskDispatcher

from gpumanager.asyncjobs.service import MOST_WAITERS
from gpumanager.config import Config
from gpumanager.config.schema import MOST_TOLD
from gpumanager.web.connection import Connection

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

log = logging.getLogger(__name__)

CONTROL_THREADS = 32
"""Threads that are never all taken by waiting jobs, audio and mounts: status, health, refusals."""

AUDIO_THREADS = 32
"""Fetches of rendered audio that may be under way at once."""

MOUNT_THREADS = 64
"""Calls below a mount or on a port of a consumer's, and Ollama's own, that are no GPU work."""

MOUNT_THREADS_EACH = 32
"""Of these, those to one consumer: its pages may each wait for an event for as long as they are
open, and must not keep those of others waiting."""

FIRST_THREADS = 8
"""Started at once; the others when all of these are taken."""

SPARE_CONNECTIONS = 512
"""Connections beyond one for each thread: idle kept-alive ones, and clients to be refused."""

SPARE_DESCRIPTORS = 256


CLIENT_LEFT = ClientDisconnected
"""What is raised out of a WSGI `write` for a client that is gone; the server expects it back."""


class GrowingDispatcher(ThreadedTaskDispatcher):
    """Waitress's threads, started when they are first needed instead of all at the start: most
    boxes never use the three hundred that a full line would take, and each costs memory."""

    def __init__(self) -> None:
        super().__init__()
        self._most = 0

    def set_thread_count(self, count: int) -> None:
        """How many there may be; 0 ends them all."""
        self._most = count
        super().set_thread_count(min(count, FIRST_THREADS))

    def add_task(self, task: Any) -> None:
        """Have one of them, or a new one, do it."""
        with self.lock:
            running = len(self.threads) - self.stop_count
            short = len(self.queue) >= running - self.active_count and running < self._most
        if short:
            try:
                super().set_thread_count(running + 1)
            except RuntimeError as error:  # the task waits for one of those that there are
                log.warning("no thread", extra={"running": running, "reason": str(error)})
        super().add_task(task)

    def start_new_thread(self, target: Callable[[int], object], thread_no: int) -> None:
        """Start one, or forget that it was counted already. Raises RuntimeError."""
        try:
            super().start_new_thread(target, thread_no)
        except BaseException:
            self.threads.discard(thread_no)
            raise


def _most_at_once(config: Config) -> int:
    """So many jobs may run at the same time."""
    parallel = {name: each.parallel(MOST_TOLD) for name, each in config.consumers.items()}
    return max(
        (
            parallel[name] + sum(parallel[other] for other in each.can_run_with)
            for name, each in config.consumers.items()
        ),
        default=1,
    )


def set_defaults(config: Config) -> None:
    """Make waitress serve the broker properly by default: a thread for every place in the queue
    and some to spare, clients that leave noticed, poll instead of select."""
    outside = AUDIO_THREADS + MOUNT_THREADS + MOST_WAITERS
    threads = config.scheduler.max_queue + _most_at_once(config) + outside + CONTROL_THREADS
    connections = threads + SPARE_CONNECTIONS
    # Private marker types tell waitress a default from an explicit flag: keep them.
    Adjustments.host = type(Adjustments.host)(config.listen.rpartition(":")[0])
    Adjustments.listen = [config.listen]
    Adjustments.threads = threads
    Adjustments.connection_limit = connections
    Adjustments.asyncore_use_poll = True
    Adjustments.channel_request_lookahead = 1
    Adjustments.max_request_body_size = config.max_body_mib * 1024 * 1024
    Adjustments.max_request_header_size = config.max_header_kib * 1024
    Adjustments.clear_untrusted_proxy_headers = False  # end-to-end headers go through
    Adjustments.ident = "gpumanager"
    Adjustments.log_socket_errors = False
    making: Any = waitress.server
    making.ThreadedTaskDispatcher = GrowingDispatcher  # what `create_server` makes
    making.Adjustments = _with_ports(config)
    BaseWSGIServer.channel_class = Connection
    _raise_descriptor_limit(2 * (connections + config.max_websockets) + SPARE_DESCRIPTORS)


class CannotListen(Exception):
    """One of the config's `ports` cannot be had. `address` is which, `taken`: somebody else has
    it."""

    def __init__(self, address: str, error: OSError) -> None:
        super().__init__(f"cannot listen on {address}: {error.strerror or error}")
        self.address = address
        self.taken = error.errno == errno.EADDRINUSE


def check_ports(config: Config) -> None:
    """See that the config's `ports` can be had, before anything is started. Raises CannotListen."""
    for address in config.addresses[1:]:
        wanted: Any = Adjustments(listen=address).listen
        for family, kind, _, where in wanted:
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(where)
                    probe.listen()  # with SO_REUSEADDR only this tells
                except OSError as error:
                    raise CannotListen(address, error) from None


def _with_ports(config: Config) -> type[Adjustments]:
    """What `create_server` reads its settings into: whatever those are, the config's `ports` are
    listened on beside the broker's own address."""

    class WithPorts(Adjustments):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            if config.ports and not self.unix_socket:
                listen: Any = self.listen
                listen += Adjustments(listen=" ".join(config.addresses[1:])).listen

    return WithPorts


def pending_output(environ: WSGIEnvironment) -> Callable[[], int]:
    """How many bytes of this connection the server still holds for its client; 0 where the
    server does not tell."""
    channel = _channel(environ)
    if channel is None:
        return lambda: 0
    return lambda: int(channel.total_outbufs_len)


def _channel(environ: WSGIEnvironment) -> Any:
    """Waitress's connection object, by way of the one method of it that it hands out."""
    return getattr(environ.get("waitress.client_disconnected"), "__self__", None)


def _raise_descriptor_limit(wanted: int) -> None:
    """A connection each for clients and consumers: raise the soft limit as far as allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def run(app: Any, when_listening: Callable[[], object]) -> None:
    """Serve `app` with the defaults set before, until the process is told to end;
    `when_listening` is called once clients can connect.

    Raises OSError if the address cannot be had.
    """
    making = waitress.server.create_server(app)
    when_listening()
    making.print_listen("Serving on http://{}:{}")
    making.run()


def can_switch(environ: WSGIEnvironment) -> bool:
    """Whether the server can give a connection away, for another protocol to be spoken on it."""
    return isinstance(_channel(environ), Connection)


def close_after_answer(environ: WSGIEnvironment) -> None:
    """Have the answer say that the connection is closed after it, before its head is sent."""
    channel = _channel(environ)
    if channel is not None and channel.requests:
        channel.requests[0].headers["CONNECTION"] = "close"


def end_answer(environ: WSGIEnvironment) -> None:
    """An answer broke off: close the connection as soon as what there is of it is sent, though the
    request's thread goes on. It must not look like the answer's end."""
    channel = _channel(environ)
    if channel is not None:
        if environ.get("SERVER_PROTOCOL") == "HTTP/1.0":
            channel.end_with_reset()
        channel.close_when_flushed = True
        channel.server.pull_trigger()


def unsent_bytes(environ: WSGIEnvironment) -> Callable[[], int]:
    """How much the server that `environ` came from still holds for all its clients."""
    channel = _channel(environ)
    if channel is None:
        return lambda: 0
    everything = channel._map  # that of all its addresses
    return lambda: sum(
        int(getattr(each, "total_outbufs_len", 0)) for each in list(everything.values())
    )
