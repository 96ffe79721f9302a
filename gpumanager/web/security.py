"""Who may talk to the broker: keys, hosts and origins.

A browser on the operator's box can be made to send requests to loopback by any page it shows.
Two things tell those apart: a page of another origin says so in `Origin` or `Sec-Fetch-Site`, and
one that had its own name resolve to loopback (DNS rebinding) still sends its name as `Host`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from flask import Flask, Response, request

from gpumanager.addresses import is_loopback
from gpumanager.errors import BrokerError, Forbidden, Unauthorized
from gpumanager.jobs.record import RequestRecord
from gpumanager.keys import ApiKey, Role
from gpumanager.web import dashboard
from gpumanager.web.parsing import Admitted
from gpumanager.web.record import ADMITTED, LOCAL_ADDRESS, asks_websocket, record_of
from gpumanager.web.roles import SAFE_METHODS, check_role

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

CREDENTIAL_HEADERS = frozenset({"HTTP_AUTHORIZATION", "HTTP_X_API_KEY"})


@dataclass(frozen=True, slots=True)
class _Known:
    name: str
    digests: tuple[bytes, ...]
    role: Role
    urgency: int | None
    most_urgent: int


class Keyring:
    """The keys clients may show. Without any, everybody may do everything.

    `identify` compares digests in constant time, and all of them, so that its duration tells
    neither a key nor which one was nearly right.
    """

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._keys = tuple(
            _Known(
                k.name,
                _digests(k.secret),
                k.role or "admin",
                k.urgency,
                k.most_urgent,
            )
            for k in keys
        )
        self._named = {key.name: key for key in self._keys}

    def __bool__(self) -> bool:
        return bool(self._keys)

    def identify(self, environ: WSGIEnvironment) -> tuple[str, Role]:
        """Name and role of the key in `Authorization: Bearer …` or `X-Api-Key: …`, or of the one
        that is the password in `Authorization: Basic …`, as browsers send it.

        Raises Unauthorized.
        """
        shown = _credentials(environ)
        found: _Known | None = None
        for key in self._keys:
            for digest, secret in product(key.digests, shown):
                if hmac.compare_digest(digest, secret):
                    found = key
        if found is None:
            message = "the key is not known" if shown else "a key is required"
            message += ": Authorization: Bearer KEY, or X-Api-Key: KEY"
            raise Unauthorized(message, page=_is_page(environ))
        return found.name, found.role

    def urge(self, record: RequestRecord) -> None:
        """Note how urgent a request's key lets it be."""
        key = None if record.key is None else self._named.get(record.key)
        if key is not None:
            record.most_urgent = key.most_urgent
            if record.urgency is None:
                record.urgency = key.urgency


class Checks:
    """Whether a request may come in at all. `/healthz` needs no key, nor do the dashboard's own
    files, which are the same everywhere."""

    def __init__(self, keyring: Keyring, allowed_hosts: Iterable[str]) -> None:
        self._keyring = keyring
        self._keyed = bool(keyring)
        self._allowed = frozenset(allowed_hosts)

    def __call__(self, environ: WSGIEnvironment, *, opens: bool = False) -> None:
        """Raises Forbidden or Unauthorized; notes whose key it was, and its role. `opens`: some
        paths need no key."""
        admitted: Admitted | BrokerError | None = environ.get(ADMITTED)
        if isinstance(admitted, BrokerError):
            raise admitted
        if admitted is None:
            path = environ["PATH_INFO"]
            is_open = opens and (path == "/healthz" or path.startswith(dashboard.PREFIX))
            admitted = self.admit(environ, asks=not is_open)
        record = record_of(environ)
        record.key, record.role = admitted
        if record.key is not None:
            self._keyring.urge(record)
            for header in CREDENTIAL_HEADERS:  # no consumer ever sees the key
                environ.pop(header, None)

    def admit(self, environ: WSGIEnvironment, *, asks: bool = True) -> Admitted:
        """Whose request it is, by its head; `asks`: for a key, where there are any. Raises as
        above. For a request whose body is still to come this is asked first, and always for a key:
        nobody without one sends a body, not even to `/healthz`. What it returned stands then in
        the whole request's `environ`."""
        check_host(environ, self._allowed)
        check_origin(environ)
        return self._keyring.identify(environ) if asks and self._keyed else (None, "admin")


def install(app: Flask, checks: Checks, for_clients: Collection[str]) -> None:
    """Check every request to `app` before its route is looked at. `for_clients` are the endpoints
    that change something and are open to keys with the role client, beside the jobs, which do not
    come here."""

    @app.before_request
    def check() -> Response | None:
        try:
            checks(request.environ, opens=True)
        except Unauthorized:
            if request.path == "/" and dashboard.wanted():
                return dashboard.response(401)  # the page asks for the key
            raise
        check_role(record_of(request.environ), request.endpoint, for_clients)
        return None


def check_host(environ: WSGIEnvironment, allowed: frozenset[str]) -> None:
    """Refuse a client on this machine whose `Host` is neither a name or address of the machine
    itself nor `allowed` (host names without ports, lower case). Raises Forbidden.

    A client is on this machine if it comes from loopback, or from the very address that it came
    to: a page can have its name resolve to the machine's address in the network, too.
    """
    client, own = environ.get("REMOTE_ADDR", ""), environ.get(LOCAL_ADDRESS)
    # `localhost` is what waitress calls whoever comes by a Unix socket: a reverse proxy.
    loopback = client != "localhost" and is_loopback(client)
    if not loopback and client != own:
        return
    host = environ.get("HTTP_HOST")
    if host is None:
        return  # HTTP/1.0; a browser always sends one
    name = _host_name(host)
    if name == "localhost.localdomain" or name in allowed or is_loopback(name):
        return
    if not loopback and _same_address(name, client):
        return
    raise Forbidden("this Host is not served to clients on this machine; allowed_hosts can name it")


def check_origin(environ: WSGIEnvironment) -> None:
    """Refuse what a page of another site has a browser send. Raises Forbidden. What only reads is
    let through, since no page of another origin sees the answer; but it would see all that comes
    over a WebSocket."""
    if environ["REQUEST_METHOD"] in SAFE_METHODS and not asks_websocket(environ):
        return
    refuse_other_sites(environ)


def refuse_other_sites(environ: WSGIEnvironment) -> None:
    """The same, whatever the method: for a GET that does something. Raises Forbidden."""
    site = environ.get("HTTP_SEC_FETCH_SITE", "none")
    origin = environ.get("HTTP_ORIGIN")
    if site not in ("none", "same-origin"):
        raise Forbidden("requests from pages of other sites are refused")
    if origin is not None and not is_same_origin(origin, environ.get("HTTP_HOST", "")):
        raise Forbidden("requests from pages of other origins are refused")


def _credentials(environ: Mapping[str, str]) -> list[bytes]:
    """Digests of the keys that are shown. The headers hold bytes, read as latin-1; what is blank
    in them is a space or a tab, not all that Unicode takes for it."""
    shown = []
    scheme, _, token = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    if scheme.lower() == "bearer":
        shown.append(token.strip(" \t"))
    shown.append(environ.get("HTTP_X_API_KEY", "").strip(" \t"))
    keys = [key.encode("latin-1", "replace") for key in shown]
    if scheme.lower() == "basic":
        with suppress(ValueError):
            keys.append(base64.b64decode(token.strip(" \t"), validate=True).partition(b":")[2])
    return [_digest(key) for key in keys if key]


def _is_page(environ: Mapping[str, str]) -> bool:
    """Whether a browser wants to show the answer, and can ask its user for a key."""
    return environ["REQUEST_METHOD"] == "GET" and "text/html" in environ.get("HTTP_ACCEPT", "")


def _same_address(name: str, address: str) -> bool:
    try:
        return ipaddress.ip_address(name) == ipaddress.ip_address(address)
    except ValueError:
        return False


def _digests(secret: str) -> tuple[bytes, ...]:
    """Of a key as clients send it: in UTF-8, or, as browsers and `requests` do where they can, in
    latin-1. The same for most keys."""
    forms = {secret.encode("utf-8", "surrogatepass")}
    with suppress(UnicodeEncodeError):
        forms.add(secret.encode("latin-1"))
    return tuple(_digest(form) for form in forms)


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def is_same_origin(origin: str, host: str) -> bool:
    """Whether an `Origin` is that of the pages that come from `host`, with its port."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()


@lru_cache(maxsize=1024)
def _host_name(host: str) -> str:
    """The name in a Host header, without port and brackets, lower case."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].rstrip(".").lower()
