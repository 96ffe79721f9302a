"""Consumers in containers: their processes listen in a network of their own, so whose a process on
the card is has to be found by its network namespace, or by what the container engine tells."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from gpumanager.addresses import host_and_port, is_loopback
from gpumanager.config import Config, ConsumerConfig
from gpumanager.host import engine
from gpumanager.host.errors import ReclaimFailed
from gpumanager.host.processes import ConsumerProcesses, Network, ProcessTable

log = logging.getLogger(__name__)

RESOLVE_WAIT_S = 0.5
"""The longest that a look-up waits for the resolver; what comes later counts for the next one."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a consumer listens: IP addresses and a port. `certain` where it is known to be on this
    machine; a name may as well be another machine's."""

    addresses: frozenset[str]
    port: int
    certain: bool

    def is_in(self, network: Network) -> bool:
        """Whether that is in a network namespace."""
        return self.port in network.ports and not self.addresses.isdisjoint(network.addresses)


@dataclass(frozen=True, slots=True)
class Contained:
    """What was found: the main process of a consumer's container, as the engine tells it, and
    the place in its container where it listens; by consumer."""

    main: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    places: Mapping[str, Place] = field(default_factory=dict)


class Resolver:
    """Resolves names on a thread of its own: the system's resolver has no time-out that could be
    set. One thread at most; it ends with its answers."""

    def __init__(
        self, look_up: Callable[[str], Iterable[str]] | None = None, wait_s: float = RESOLVE_WAIT_S
    ) -> None:
        self._look_up = _addresses if look_up is None else look_up
        self._wait_s = wait_s
        self._known: dict[str, frozenset[str]] = {}
        self._thread: threading.Thread | None = None

    def addresses(self, names: Collection[str]) -> Mapping[str, frozenset[str]]:
        """What is known of the names by now; a name that does not resolve has no address."""
        if names and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(
                target=self._resolve, args=(tuple(names),), name="resolver", daemon=True
            )
            self._thread.start()
            self._thread.join(self._wait_s)
        known = dict(self._known)
        return {name: known.get(name, frozenset()) for name in names}

    def _resolve(self, names: Iterable[str]) -> None:
        for name in names:
            self._known[name] = frozenset(self._look_up(name))


class ContainedConsumers:
    """Finds the consumers that no process of this network listens for. For one thread at a time."""

    def __init__(
        self,
        config: Config,
        consumers: ConsumerProcesses,
        table: ProcessTable,
        resolver: Resolver | None = None,
    ) -> None:
        self._config = config
        self._consumers = consumers
        self._table = table
        self._resolver = Resolver() if resolver is None else resolver
        self._refused: dict[str, str] = {}
        self._main: dict[str, tuple[str, int]] = {}

    def find(self, seen: Collection[str]) -> Contained:
        """Where those are that are not among the `seen`. Never raises for what the engine does."""
        hidden = {
            name: consumer for name, consumer in self._config.consumers.items() if name not in seen
        }
        if not hidden:
            return Contained()
        main = {
            name: pids
            for name, consumer in hidden.items()
            if (pids := self._main_process(name, consumer))
        }
        return Contained(main, self._places({n: c for n, c in hidden.items() if n not in main}))

    def _main_process(self, name: str, consumer: ConsumerConfig) -> tuple[int, ...]:
        """By the engine, where the config names the container."""
        container, socket_path = consumer.container_named
        if container is None:
            return ()
        known = self._main.get(name)
        if known is not None and known[0] == container and self._table.ancestry(known[1]):
            return (known[1],)  # it runs still: the engine need not be asked
        try:
            state = engine.inspect(container, socket_path).get("State")
        except ReclaimFailed as error:
            self._tell(name, str(error))
            return ()
        self._refused.pop(name, None)
        pid = state.get("Pid") if isinstance(state, Mapping) else None
        if not isinstance(pid, int) or pid <= 0 or not self._table.ancestry(pid):
            return ()  # it does not run, or not in this PID namespace
        self._main[name] = (container, pid)
        return (pid,)

    def _tell(self, name: str, reason: str) -> None:
        """Once for each reason: this is tried again and again."""
        if self._refused.get(name) != reason:
            self._refused[name] = reason
            log.warning("container not looked up", extra={"consumer": name, "reason": reason})

    def _places(self, hidden: Mapping[str, ConsumerConfig]) -> dict[str, Place]:
        found = {}
        for name, pids in self._consumers.fronts().items():
            if name in hidden and (place := self._behind(pids)) is not None:
                found[name] = place
        named = {
            name: leads_to
            for name, consumer in hidden.items()
            if name not in found and (leads_to := host_and_port(consumer.base_url))[0]
        }
        resolved = self._resolver.addresses({host for host, _ in named.values()})
        # In this process's own network whoever shares it would be taken for the consumer.
        own = self._table.network(os.getpid()).addresses
        for name, (host, port) in named.items():
            addresses = frozenset(map(_unmapped, resolved[host])) - own
            if addresses and not any(map(is_loopback, addresses)):
                found[name] = Place(addresses, port, certain=False)
        return found

    def _behind(self, fronts: Iterable[int]) -> Place | None:
        """Where docker-proxy forwards to, by its command line."""
        for pid in fronts:
            words = self._table.command(pid)
            options = dict(pairwise(words))
            address, port = options.get("-container-ip"), options.get("-container-port", "")
            if address and port.isdecimal():
                return Place(frozenset({address}), int(port), certain=True)
        return None


def _unmapped(address: str) -> str:
    """Without a zone, and as IPv4 where it is one in IPv6's clothes."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)


def _addresses(host: str) -> set[str]:
    try:
        rows = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return set()
    return {str(row[4][0]) for row in rows}
