"""Where callbacks may go: the config lists the hosts, and some addresses are never called."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from gpumanager.addresses import is_loopback, meant, why_never
from gpumanager.config.values import host_entry

LONGEST_URL = 2048
MOST_ADDRESSES = 4
"""Of a host, that are tried one after another."""

_URL = re.compile(r"https?://[!-\[\]-~]+", re.ASCII | re.IGNORECASE)

Resolve = Callable[[str, int], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that may be called. `base` and `path` (with its query) are its two halves; `exact`: the
    config lists this very host, and not only all names below one."""

    host: str
    port: int
    base: str
    path: str
    exact: bool


class Targets:
    """Those that `hosts`, the entries of `jobs.callbacks`, allow. `resolve` gives the addresses of
    a host, and raises OSError."""

    def __init__(self, hosts: Iterable[str], resolve: Resolve | None = None) -> None:
        self._hosts = tuple(host_entry(each) for each in hosts)
        self._resolve = resolved if resolve is None else resolve

    def __bool__(self) -> bool:
        return bool(self._hosts)

    def target(self, url: str) -> Target:
        """What a URL leads to. Raises ValueError that says why it may not be called."""
        if len(url) > LONGEST_URL or not _URL.fullmatch(url):
            raise ValueError(
                f"must be an http or https URL of at most {LONGEST_URL} printable ASCII characters"
            )
        parts = urlsplit(url)
        scheme, host = parts.scheme.lower(), parts.hostname or ""
        if "@" in parts.netloc or "#" in url:
            raise ValueError("must have neither a user, nor a password, nor a fragment")
        try:
            usual = 443 if scheme == "https" else 80
            port = usual if parts.port is None else parts.port
        except ValueError:
            raise ValueError("has a port that is none") from None
        exact = self._listed(host, port, usual, below=False)
        if not exact and not self._listed(host, port, usual, below=True):
            raise ValueError(
                f"its host {host}:{port} is not listed in jobs.callbacks of the config"
            )
        path = parts.path or "/"
        if parts.query:
            path += f"?{parts.query}"
        return Target(host, port, f"{scheme}://{parts.netloc}", path, exact)

    def addresses(self, target: Target) -> list[str]:
        """Where to connect to: addresses that may be called, one at least. Raises OSError if the
        host has none, and ValueError if one of them may not be called."""
        found = list(dict.fromkeys(self._resolve(target.host, target.port)))
        for address in found:
            _check(address, target)
        if not found:
            raise OSError("its host has no address")
        return found[:MOST_ADDRESSES]

    def _listed(self, host: str, port: int, usual: int, *, below: bool) -> bool:
        for name, its_port in self._hosts:
            if port != (usual if its_port is None else its_port):
                continue
            if below and name.startswith("*.") and host.endswith(name[1:]) and host != name[1:]:
                return True
            if not below and host == name:
                return True
        return False


def _check(address: str, target: Target) -> None:
    """Raise ValueError if an address of the target's may not be called."""
    where = meant(address)
    if (never := why_never(address)) is not None:
        raise ValueError(f"its host has an address that is never called: {never}")
    if where.is_loopback and not (target.exact and is_loopback(target.host)):
        raise ValueError("its host has an address that is loopback, and is not listed as that")
    if not where.is_global and not where.is_loopback and not target.exact:
        raise ValueError("its host has a private address; for that, list the very host")


def resolved(host: str, port: int) -> list[str]:
    """The addresses of a host, as the system resolves it, for as long as that takes. Raises
    OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]
