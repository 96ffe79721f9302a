"""Mounts: a consumer's whole HTTP face, below `/consumers/{name}/` or on a port of its own.

The config says which of its calls are GPU work and take their turn. The client goes on as if it
spoke with the consumer: redirects and cookies are mended to lead back through the mount.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from flask import Response

from gpumanager.config import Config, ConsumerConfig
from gpumanager.consumers.admission import Admission
from gpumanager.errors import NotFound
from gpumanager.jobs.owners import Owners
from gpumanager.jobs.routing import Choice, Router
from gpumanager.jobs.runner import JobRunner
from gpumanager.telemetry.events import CallUnclassified, Emit
from gpumanager.upstream.exchange import Exchange
from gpumanager.upstream.proxy import Inbound, Proxy
from gpumanager.web.deferring import Deferring
from gpumanager.web.forwarding import Forwarder
from gpumanager.web.inbound import inbound_of, preferred_wait, raw_path
from gpumanager.web.record import record_of
from gpumanager.web.relay import RelayedResponse
from gpumanager.web.roles import CHANGE_NOTHING, SAFE_METHODS, check_role
from gpumanager.web.security import is_same_origin, refuse_other_sites
from gpumanager.web.stops import checked
from gpumanager.web.ways import ModelRequest
from gpumanager.web.websockets import WebSockets

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

PREFIX = "/consumers/"

_MOST_SEEN = 200
"""Unclassified calls that are told of, once each."""

_LONGEST_PATH = 100

_NEEDLESS = re.compile("%(2[DE]|3[0-9]|[46][1-9A-F]|[57][0-9A]|5F|7E)", re.IGNORECASE)
"""What need not be percent-encoded, and means the same if it is: letters, digits, `-._~`."""

_COOKIE_PATH = re.compile(r"(;\s*path\s*=\s*)(/[^;]*)", re.IGNORECASE)
_COOKIE_DOMAIN = re.compile(r";\s*domain\s*=[^;]*", re.IGNORECASE)

Headers = list[tuple[str, str]]


class Mounts:
    """The views of all mounts. Safe from any thread."""

    def __init__(
        self,
        config: Config,
        admission: Admission,
        proxy: Proxy,
        router: Router,
        jobs: JobRunner,
        forward: Forwarder,
        websockets: WebSockets,
        owners: Owners,
        deferring: Deferring,
        emit: Emit,
    ) -> None:
        self._deferring = deferring
        self._config = config
        self._ports = config.ports  # a change needs a restart
        self._admission = admission
        self._proxy = proxy
        self._router = router
        self._jobs = jobs
        self._forward = forward
        self._websockets = websockets
        self._owners = owners
        self._emit = emit
        self._seen: set[tuple[str, str, str]] = set()

    def find(self, environ: WSGIEnvironment) -> Callable[[WSGIEnvironment], WSGIApplication] | None:
        """The view of a request that came to a port of its own, or below a mount; None for any
        other."""
        if self._ports:
            own = self._ports.get(_port(environ))
            if own is not None:
                return lambda environ: self._answer(environ, own, "/")
        path = environ["PATH_INFO"]
        if not path.startswith(PREFIX):
            return None
        name, slash, _ = path[len(PREFIX) :].partition("/")
        if not slash:
            return lambda environ: _to_its_root(environ, self._consumer(name), path)
        return lambda environ: self._answer(environ, name, f"{PREFIX}{name}/")

    def _consumer(self, name: str) -> ConsumerConfig:
        """Raises NotFound."""
        consumer = self._config.consumers.get(name)
        if consumer is None:
            known = ", ".join(self._config.consumers) or "none"
            raise NotFound(f"there is no consumer '{name[:64]}'; there are: {known}")
        return consumer

    def _answer(self, environ: WSGIEnvironment, name: str, root: str) -> WSGIApplication:
        consumer, record = self._consumer(name), record_of(environ)
        method, path = environ["REQUEST_METHOD"], _plain(raw_path(environ, root)[len(root) - 1 :])
        inbound = _as_its_own(inbound_of(environ), environ, consumer, root)
        inbound = checked(record, name, consumer, path, inbound, self._owners)
        work = consumer.is_gpu_work(method, path)
        stops = any(call.matches(method, path) for call in consumer.stops)
        if not work and not stops and path not in CHANGE_NOTHING:
            check_role(record, "mount", ())  # it could unload a model, or delete one
        if work is None:
            self._note(name, method, path)
            work = method not in SAFE_METHODS  # these are none unless the config says so
        if work:
            refuse_other_sites(environ)  # a page could have a GET run by an image of it
            if self._deferring.wanted(environ):
                return self._deferring.accept(environ, self._kind(name), name)
            answer = self._run(environ, name, inbound, path)
        elif self._websockets.wanted(environ):
            answer = self._websockets.answer(environ, name, path, inbound)
        else:
            answer = self._forward(environ, name, path, inbound, endless=True)
        return _Mended(answer, consumer, root)

    def _run(self, environ: WSGIEnvironment, name: str, inbound: Inbound, path: str) -> Response:
        kind = self._kind(name)

        def prepare(choice: Choice, consumer: ConsumerConfig) -> Exchange:
            self._admission.check(choice.consumer)
            return self._proxy.prepare(choice.consumer, inbound, path, settings=consumer)

        max_wait = preferred_wait(environ.get("HTTP_PREFER", ""))
        record = record_of(environ)
        request = ModelRequest(inbound, path, strict=False)

        def choose() -> Choice:
            return request.said_of(Choice(kind, name), self._router)

        return RelayedResponse(self._jobs.run(record, choose, prepare, max_wait))

    def _kind(self, name: str) -> str:
        """What jobs of the consumer are taken for, where no route says it."""
        routing = self._config.routing
        return next((each for each in routing if name in self._config.candidates(each)), "mount")

    def _note(self, name: str, method: str, path: str) -> None:
        """Tell of a call that the config says nothing of, once; those that change nothing are
        mostly a page's own files."""
        call = name, method, path[:_LONGEST_PATH]
        if method not in SAFE_METHODS and call not in self._seen and len(self._seen) < _MOST_SEEN:
            self._seen.add(call)
            self._emit(CallUnclassified(consumer=name, method=method, path=call[2]))


class _Mended:
    """WSGI: an answer whose headers lead back through the mount."""

    def __init__(self, answer: Response, consumer: ConsumerConfig, root: str) -> None:
        self._answer = answer
        self._consumer = consumer
        self._root = root.rstrip("/")

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def start(status: str, headers: Headers, exc_info: object = None, /) -> object:
            mended = [(name, self._mended(name.lower(), value)) for name, value in headers]
            return start_response(status, mended, exc_info)  # type: ignore[arg-type]

        return self._answer(environ, start)  # type: ignore[arg-type]

    def _mended(self, name: str, value: str) -> str:
        if name in ("location", "content-location"):
            return self._through(value)
        if name == "set-cookie":
            without = _COOKIE_DOMAIN.sub("", value)  # that of the consumer's own host
            return _COOKIE_PATH.sub(lambda found: found[1] + self._below(found[2]), without)
        return value

    def _through(self, location: str) -> str:
        """A place of the consumer's as a place below the mount; any other as it is."""
        try:
            parts = urlsplit(location)
        except ValueError:  # no URL at all, and not ours to mend
            return location
        if parts.scheme and f"{parts.scheme}://{parts.netloc}" == self._consumer.base_url:
            return self._below(location[len(self._consumer.base_url) :] or "/")
        if parts.scheme or location.startswith("//") or not location.startswith("/"):
            return location
        return self._below(location)

    def _below(self, path: str) -> str:
        own = self._consumer.base_path
        if own and (path == own or path.startswith(f"{own}/")):
            path = path[len(own) :] or "/"
        return self._root + path


def _plain(path: str) -> str:
    """The same path (RFC 3986, 6.2.2.2), with no letter or digit percent-encoded: a call is told by
    its path, whoever wrote it how."""
    return _NEEDLESS.sub(lambda found: chr(int(found[1], 16)), path)


def _port(environ: WSGIEnvironment) -> int:
    try:
        return int(environ["SERVER_PORT"])
    except ValueError:
        return 0  # a Unix socket


def _to_its_root(environ: WSGIEnvironment, _: ConsumerConfig, path: str) -> Response:
    query = environ.get("QUERY_STRING", "")
    location = f"{path}/?{query}" if query else f"{path}/"
    response = Response(status=308, content_type="text/plain")
    response.autocorrect_location_header = False
    response.headers["Location"] = location
    return response


def _as_its_own(
    inbound: Inbound, environ: WSGIEnvironment, consumer: ConsumerConfig, root: str
) -> Inbound:
    """The request as one of the consumer's own pages would send it: servers that compare `Origin`
    with `Host` get their own in both. What the client called the broker goes along in the usual
    headers, for servers that write links with it."""
    host = environ.get("HTTP_HOST", "")
    headers, given = [], set()
    for name, value in inbound.headers:
        lower = name.lower()
        given.add(lower)
        own = lower == "origin" and is_same_origin(value, host)
        headers.append((name, consumer.base_url if own else value))
    forwarded = {
        "X-Forwarded-Host": host,
        "X-Forwarded-Proto": environ.get("wsgi.url_scheme", "http"),
        "X-Forwarded-Prefix": root.rstrip("/"),
    }
    headers += [
        (name, value) for name, value in forwarded.items() if value and name.lower() not in given
    ]
    return replace(inbound, headers=headers)
