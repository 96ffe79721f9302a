"""Having the broker listen on the port where clients expect a server, which itself moves aside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from gpumanager.addresses import is_loopback
from gpumanager.config import Config, parse_config
from gpumanager.host.processes import ProcessTable
from gpumanager.setup.configfile import CannotAdd, Proposal, local_port
from gpumanager.setup.discovery import Found
from gpumanager.setup.moving import free_port, listens
from gpumanager.setup.yamledit import with_entries, with_value


@dataclass(frozen=True, slots=True)
class Place:
    """The port of a consumer's server: the broker is going to listen there, and the server on
    another one, `to`."""

    name: str
    found: Found
    to: int


def places(proposal: Proposal, found: Sequence[Found], *, all_consumers: bool) -> list[Place]:
    """Where the broker could listen in a server's place: that of a new consumer, and, with
    `all_consumers`, of one that the config has had before."""
    config = proposal.config
    names = {each.port: name for name, each in proposal.new.items()}
    if all_consumers:
        names |= {
            port: name
            for name, each in config.consumers.items()
            if (port := local_port(each.url)) is not None
        }
    taken = {config.port, *config.ports, *(each.port for each in found)}
    taken |= {port for each in config.consumers.values() if (port := local_port(each.url))}
    free = []
    for each in found:
        if each.port in names:
            to = free_port(each.port, taken)
            taken.add(to)
            free.append(Place(names[each.port], each, to))
    return free


def unfinished(config: Config, found: Sequence[Found]) -> list[Place]:
    """The servers that have not moved yet, although the config has the broker in their place."""
    left = []
    for each in found:
        name = config.ports.get(each.port)
        to = None if name is None else local_port(config.consumers[name].url)
        if name is not None and to is not None:
            left.append(Place(name, each, to))
    return left


def taken(proposal: Proposal, chosen: Sequence[Place]) -> Proposal:
    """The config with the broker in the chosen places. Raises CannotAdd."""
    if not chosen:
        return proposal
    after = proposal.after
    ports = {place.found.port: place.name for place in chosen}
    rows = [f"{place.found.port}: {place.name}    # it listens on {place.to}" for place in chosen]
    urls = {
        place.name: _at_port(proposal.config.consumers[place.name].url, place.to)
        for place in chosen
    }
    try:
        for name, url in urls.items():
            after = with_value(after, ("consumers", name, "url"), url)
        after = with_entries(after, "ports", ports, rows)
    except ValueError as error:
        lines = ["ports:", *(f"  {row}" for row in rows), "consumers:"]
        for name, url in urls.items():
            lines += [f"  {name}:", f"    url: {url}"]
        raise CannotAdd(str(error), "\n".join(lines)) from None
    return replace(proposal, after=after, config=parse_config(after))


def held_by_broker(config: Config, table: ProcessTable) -> set[int]:
    """Those of the config's `ports` where the broker listens already: what answers there is the
    server that moved aside."""
    listeners = table.listeners()

    def programs(port: int) -> set[int]:
        return {pid for (_, at), pids in listeners.items() if at == port for pid in pids}

    own = programs(config.port)
    return {
        port
        for port, name in config.ports.items()
        if own & programs(port)
        or ((to := local_port(config.consumers[name].url)) is not None and listens(to))
    }


def reached_from_outside(
    place: Place, config: Config, listeners: Mapping[tuple[str, int], object]
) -> bool:
    """Whether other machines or containers reach the server, and will not reach the broker."""
    hosts = [host for host, port in listeners if port == place.found.port]
    return is_loopback(config.host) and not all(is_loopback(host) for host in hosts)


def _at_port(url: str, port: int) -> str:
    parts = urlsplit(url)
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    return parts._replace(netloc=f"{host}:{port}").geturl()
