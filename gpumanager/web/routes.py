"""The routes. What they know of scheduling is its interface."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

from flask import Flask, Response, request

from gpumanager import errors
from gpumanager.clock import rfc3339
from gpumanager.config import KINDS, Config, ConsumerConfig, Kind
from gpumanager.consumers.admission import Admission
from gpumanager.gpu.history import MemorySample
from gpumanager.jobs.client import ClientWatch
from gpumanager.jobs.operations import Operations
from gpumanager.jobs.record import RequestRecord
from gpumanager.jobs.runner import Answer, JobRunner
from gpumanager.telemetry.eventlog import EventLog
from gpumanager.telemetry.metrics import CONTENT_TYPE as METRICS_TYPE
from gpumanager.telemetry.metrics import Metrics
from gpumanager.upstream.exchange import Exchange
from gpumanager.upstream.proxy import Inbound, Proxy, inbound_headers
from gpumanager.upstream.watcher import Watcher
from gpumanager.web import boundary, dashboard, roles, security
from gpumanager.web.boundary import json_response
from gpumanager.web.connection import ADMIT
from gpumanager.web.dispatch import Entrance, JobView
from gpumanager.web.openapi import describe
from gpumanager.web.record import record_of
from gpumanager.web.relay import RelayedResponse
from gpumanager.web.security import Keyring
from gpumanager.web.server import AUDIO_THREADS
from gpumanager.web.status import StatusView, sensed
from gpumanager.web.timeline import chrome_trace

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

ROOT_TEXT = (
    "gpumanager: GET /v1/status shows the live state, POST /v1/{tts,stt,llm,image} runs a job\n"
)

MOST_EVENTS = 1000
"""In one answer."""

HISTORY_S = 3600
"""How far back the history goes."""

_SENDABLE = re.compile(r"[!-~]*")
"""What may stand in a request line."""

_DECODINGS = 3
"""How often a path may be percent-encoded over before it is refused unread."""


@dataclass(frozen=True, slots=True)
class Services:
    """What the routes need."""

    config: Config
    admission: Admission
    proxy: Proxy
    jobs: JobRunner
    operations: Operations
    status: StatusView
    watcher: Watcher
    keyring: Keyring
    version: str
    events: EventLog
    metrics: Metrics
    history: Callable[[float | None], Iterable[MemorySample]]
    drain: Callable[[], None]
    reload: Callable[[], Mapping[str, Any]]
    draining: Callable[[], bool]
    cancel: Callable[[int, errors.BrokerError], bool]


def create_app(services: Services) -> Flask:
    """The Flask application with its entrance, without the guard around it."""
    app = Flask("gpumanager", static_folder=None)
    app.url_map.merge_slashes = False
    app.url_map.strict_slashes = True
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    boundary.install(app)
    checks = security.Checks(services.keyring, services.config.allowed_hosts)
    app.extensions[ADMIT] = checks.admit
    jobs = {f"/v1/{kind}": _job_view(services, kind) for kind in KINDS}
    security.install(app, checks, for_clients={"cancel"})
    for path in jobs:
        # Its POST never comes here; any other method gets Flask's 405.
        app.add_url_rule(path, endpoint=path, methods=["POST"])
    _control_routes(app, services)
    _operator_routes(app, services)
    _record_routes(app, services)
    _audio_routes(app, services)
    app.wsgi_app = Entrance(app.wsgi_app, jobs, checks)  # type: ignore[method-assign]
    return app


def _job_view(services: Services, kind: Kind) -> JobView:
    def job(environ: WSGIEnvironment) -> Response:
        def prepare(name: str, consumer: ConsumerConfig) -> Exchange:
            route = consumer.paths.get(kind)
            if route is None:
                raise errors.NoConsumer(f"consumer {name} lacks paths.{kind}", consumer=name)
            services.admission.check(name)
            return services.proxy.prepare(name, _inbound(environ), route.path, route.method)

        max_wait = preferred_wait(environ.get("HTTP_PREFER", ""))
        answer = services.jobs.run(record_of(environ), kind, prepare, max_wait)
        return RelayedResponse(answer)

    return job


def _control_routes(app: Flask, services: Services) -> None:
    @app.get("/v1/status")
    def status() -> Response:
        return json_response(services.status.snapshot(_record().whose))

    @cache
    def description() -> dict[str, Any]:
        """Made when somebody asks for it first: to read its file would delay each start."""
        return describe(services.config, services.version, keys=bool(services.keyring))

    @app.get("/openapi.json")
    def openapi() -> Response:
        return json_response(description())

    @app.get("/v1/queue")
    def queue() -> Response:
        return json_response({"queue": services.status.queue(_record().whose)})

    @app.delete("/v1/queue/<int:ticket>")
    def cancel(ticket: int) -> Response:
        try:
            roles.check_owner(_record(), ticket, services.status.key_of(ticket))
        except KeyError:
            raise _no_ticket(ticket) from None
        who = "the operator" if _record().whose is None else "its own client"
        if not services.cancel(ticket, errors.Cancelled(f"{who} cancelled the job")):
            raise _no_ticket(ticket)
        return json_response({"ticket": ticket, "state": "cancelled"})

    @app.get("/healthz")
    def healthz() -> Response:
        if services.draining():
            return json_response({"status": "draining"}, 503)
        return json_response({"status": "ok"})

    @app.get("/")
    def root() -> Response:
        if dashboard.wanted():
            return dashboard.response()
        return Response(ROOT_TEXT, content_type="text/plain; charset=utf-8")

    @app.get(f"{dashboard.PREFIX}<name>")
    def dashboard_file(name: str) -> Response:
        return dashboard.file(name)


def _record() -> RequestRecord:
    return record_of(request.environ)


def _no_ticket(ticket: int) -> errors.NotFound:
    return errors.NotFound(f"there is no ticket {ticket} in the queue")


def _record_routes(app: Flask, services: Services) -> None:
    events = services.events

    @app.get("/v1/events")
    def happened() -> Response:
        since = _query_number("since", 0)
        limit = _query_number("limit", MOST_EVENTS, most=MOST_EVENTS)
        found = events.since(since, limit)
        return json_response(
            {
                "boot": events.boot,
                "last": found.last,
                "missed": found.missed,
                "events": [
                    event.as_json() for event in roles.visible(found.events, _record().whose)
                ],
            }
        )

    @app.get("/v1/history")
    def history() -> Response:
        seconds = _query_number("seconds", 0, most=HISTORY_S) or None
        return json_response(
            {
                "samples": [
                    {
                        "time": rfc3339(sample.at),
                        "total_mib": sample.total_mib,
                        "used_mib": sample.used_mib,
                        "held_mib": dict(sample.held_mib),
                        **sensed(sample),
                    }
                    for sample in services.history(seconds)
                ]
            }
        )

    @app.get("/v1/trace")
    def trace() -> Response:
        return json_response(chrome_trace(roles.visible(events.since(0).events, _record().whose)))

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(
            services.metrics.exposition(whole=_record().whose is None), content_type=METRICS_TYPE
        )


def _query_number(name: str, default: int, *, most: int = 2**53) -> int:
    """A number in the query. Raises BadRequest for anything else."""
    given = request.args.get(name)
    if given is None:
        return default
    if not re.fullmatch(r"[0-9]{1,16}", given) or int(given) > most:
        raise errors.BadRequest(f"{name} must be a number from 0 to {most}")
    return int(given)


def _operator_routes(app: Flask, services: Services) -> None:
    operations = services.operations

    @app.get(f"/v1/plan/<any({', '.join(KINDS)}):kind>")
    def plan(kind: Kind) -> Response:
        return json_response(operations.plan(kind))

    @app.post("/v1/consumers/<name>/unload")
    def unload(name: str) -> Response:
        return json_response(operations.unload(_record(), name))

    @app.post("/v1/consumers/<name>/load")
    def load(name: str) -> Response:
        return json_response(operations.load(_record(), name))

    @app.delete("/v1/consumers/<name>/learned")
    def forget(name: str) -> Response:
        return json_response(operations.forget(name))

    @app.post("/v1/consumers/<name>/pin")
    def pin(name: str) -> Response:
        return json_response(operations.pin(name, True))

    @app.delete("/v1/consumers/<name>/pin")
    def unpin(name: str) -> Response:
        return json_response(operations.pin(name, False))

    @app.post("/v1/drain")
    def drain() -> Response:
        # Nobody ends a broker by accident, or another than the one that was meant.
        if request.args.get("boot") != services.events.boot:
            raise errors.BadRequest("boot must be that of this run, as GET /v1/events gives it")
        services.drain()
        return json_response({"status": "draining"}, 202)

    @app.post("/v1/reload")
    def reload() -> Response:
        return json_response(services.reload())


def _audio_routes(app: Flask, services: Services) -> None:
    prefix, name = services.config.audio_path_prefix, services.config.audio_proxy
    places = threading.BoundedSemaphore(AUDIO_THREADS)

    @app.get(f"{prefix}<path:name_of_file>")
    def audio(name_of_file: str) -> Response:  # noqa: ARG001  # the raw path is what counts
        if name is None:
            raise errors.NoAudioProxy("audio_proxy is not configured")
        record = record_of(request.environ)
        record.consumer = name
        path = _raw_path(prefix)
        if not places.acquire(blocking=False):
            raise errors.QueueFull(
                f"{AUDIO_THREADS} fetches of audio are under way", consumer=name, retry_after=1
            )
        record.stack.callback(places.release)
        exchange = services.proxy.prepare(name, _inbound(request.environ), path)
        record.stack.callback(exchange.close)
        client = ClientWatch(record, services.watcher)
        record.stack.callback(client.stop)
        client.when_gone(lambda: exchange.abort(errors.ClientGone("the client left")))
        exchange.send()
        return RelayedResponse(Answer(exchange, on_end=lambda: None))


def preferred_wait(header: str) -> float | None:
    """The seconds of `Prefer: wait=N` (RFC 7240), the first if there are several; None where
    there is none, or it is malformed, which that RFC says to ignore."""
    for preference in header.split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        seconds = value.strip().strip('"')
        if name.strip().lower() == "wait":
            return float(seconds) if re.fullmatch(r"[0-9]{1,9}", seconds) else None
    return None


def _inbound(environ: WSGIEnvironment) -> Inbound:
    length = environ.get("CONTENT_LENGTH")
    query = environ.get("QUERY_STRING", "")
    if not _SENDABLE.fullmatch(query):
        raise errors.BadRequest("the query holds characters that must be percent-encoded")
    return Inbound(
        method=environ["REQUEST_METHOD"],
        query=query,
        headers=inbound_headers(environ),
        body=environ["wsgi.input"] if length else None,
        length=int(length) if length else None,
        request_id=record_of(environ).request_id,
    )


def _raw_path(prefix: str) -> str:
    """The request's path as the client wrote it, if it names something below `prefix`.

    Raises BadRequest for a path that could lead out of it in any encoding.
    """
    environ = request.environ
    target = environ.get("REQUEST_URI") or quote(environ["PATH_INFO"].encode("latin-1"))
    if "://" in target.partition("?")[0]:
        target = urlsplit(target).path
    path = target.partition("?")[0].partition("#")[0]
    decoded = path
    try:
        for _ in range(_DECODINGS):
            decoded, before = unquote(decoded, errors="strict"), decoded
            if decoded == before:
                break
        else:
            raise errors.BadRequest("the path is percent-encoded too often")
    except UnicodeDecodeError:
        raise errors.BadRequest("the path is not UTF-8") from None
    # Some servers cut parameters off a segment first, as in `..;x`.
    segments = {part.partition(";")[0] for part in decoded.replace("\\", "/").split("/")}
    if not path.startswith(prefix) or not {".", ".."}.isdisjoint(segments):
        raise errors.BadRequest("the path leads out of the audio directory")
    if not decoded.isprintable():
        raise errors.BadRequest("the path holds characters that cannot be printed")
    return path
