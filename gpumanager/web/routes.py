"""The routes. What they know of scheduling is its interface."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, request

from gpumanager import errors
from gpumanager.asyncjobs.service import AsyncJobs
from gpumanager.clock import rfc3339
from gpumanager.config import KINDS, Config
from gpumanager.gpu.history import MemorySample
from gpumanager.jobs.operations import Operations
from gpumanager.jobs.record import RequestRecord
from gpumanager.jobs.routing import Router
from gpumanager.model import model_key
from gpumanager.telemetry.eventlog import EventLog
from gpumanager.telemetry.metrics import CONTENT_TYPE as METRICS_TYPE
from gpumanager.telemetry.metrics import Metrics
from gpumanager.web import boundary, dashboard, jobroutes, models, roles, security
from gpumanager.web.boundary import json_response
from gpumanager.web.connection import ADMIT
from gpumanager.web.dispatch import Dispatch, View
from gpumanager.web.forwarding import Forwarder
from gpumanager.web.inbound import raw_path
from gpumanager.web.jobview import JobView
from gpumanager.web.modelfield import LONGEST_NAME
from gpumanager.web.mounts import Mounts
from gpumanager.web.openapi import describe
from gpumanager.web.record import record_of
from gpumanager.web.security import Keyring
from gpumanager.web.status import StatusView, sensed
from gpumanager.web.timeline import chrome_trace
from gpumanager.web.ways import LONGEST_CONTEXT, Ways

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

if TYPE_CHECKING:
    pass

ROOT_TEXT = (
    "gpumanager: GET /v1/status shows the live state, POST /v1/{tts,stt,llm,image} runs a job\n"
)

MOST_EVENTS = 1000
"""In one answer."""

HISTORY_S = 3600
"""How far back the history goes."""


@dataclass(frozen=True, slots=True)
class Services:
    """What the routes call: one of each, made by `app`."""

    config: Config
    ways: Ways
    mounts: Mounts
    router: Router
    models: models.ModelLists
    forward: Forwarder
    fetch: Forwarder
    operations: Operations
    status: StatusView
    keyring: Keyring
    version: str
    events: EventLog
    metrics: Metrics
    history: Callable[[float | None], Iterable[MemorySample]]
    drain: Callable[[], None]
    reload: Callable[[], Mapping[str, Any]]
    draining: Callable[[], bool]
    cancel: Callable[[int, errors.BrokerError], bool]
    jobs: AsyncJobs
    job_view: JobView


def create_app(services: Services) -> Flask:
    """The Flask application and the dispatch before it, without the guard around it."""
    app = Flask("gpumanager", static_folder=None)
    app.url_map.merge_slashes = False
    app.url_map.strict_slashes = True
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    boundary.install(app)
    checks = security.Checks(services.keyring, services.config.allowed_hosts)
    app.extensions[ADMIT] = checks.admit
    security.install(app, checks, for_clients={"cancel", jobroutes.CANCEL, models.SHOW})
    _control_routes(app, services)
    _operator_routes(app, services)
    _record_routes(app, services)
    _audio_routes(app, services)
    jobroutes.install(app, services.jobs, services.job_view)
    models.install(app, services.models, services.router, services.forward)
    app.wsgi_app = Dispatch(app.wsgi_app, _find(services), checks)  # type: ignore[method-assign]
    return app


def _find(services: Services) -> Callable[[WSGIEnvironment], View | None]:
    below, jobs = services.mounts.find, services.ways.find

    def find(environ: WSGIEnvironment) -> View | None:
        return below(environ) or jobs(environ["PATH_INFO"])

    return find


def _control_routes(app: Flask, services: Services) -> None:
    @app.get("/v1/status")
    def status() -> Response:
        return json_response(services.status.snapshot(_record().whose))

    @lru_cache(maxsize=1)
    def description(_: tuple[str, ...]) -> dict[str, Any]:
        """Made when somebody asks for it first, to read its file would delay each start; and anew
        when a reload has changed the kinds."""
        return describe(services.config, services.version, keys=bool(services.keyring))

    @app.get("/openapi.json")
    def openapi() -> Response:
        return json_response(description(tuple(services.config.routing)))

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

    @app.get("/v1/plan/<kind>")
    def plan(kind: str) -> Response:
        if kind not in (*KINDS, *services.config.routing):
            kinds = ", ".join(dict.fromkeys((*KINDS, *services.config.routing)))
            raise errors.NotFound(f"there is no kind '{kind[:32]}'; there are {kinds}")
        return json_response(operations.plan(kind, _model(), _context()))

    @app.post("/v1/consumers/<name>/unload")
    def unload(name: str) -> Response:
        return json_response(operations.unload(_record(), name, _model()))

    @app.post("/v1/consumers/<name>/load")
    def load(name: str) -> Response:
        return json_response(operations.load(_record(), name, _model()))

    @app.delete("/v1/consumers/<name>/learned")
    def forget(name: str) -> Response:
        return json_response(operations.forget(name, _model()))

    @app.post("/v1/consumers/<name>/pin")
    def pin(name: str) -> Response:
        return json_response(operations.pin(name, True, _model()))

    @app.delete("/v1/consumers/<name>/pin")
    def unpin(name: str) -> Response:
        return json_response(operations.pin(name, False, _model()))

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

    @app.get(f"{prefix}<path:name_of_file>")
    def audio(name_of_file: str) -> Response:  # noqa: ARG001  # the raw path is what counts
        if name is None:
            raise errors.NoAudioProxy("audio_proxy is not configured")
        record_of(request.environ).consumer = name
        return services.fetch(request.environ, name, raw_path(request.environ, prefix))


def _model() -> str | None:
    """The model that an operator means, None for all of a consumer."""
    name = request.args.get("model")
    if name is None:
        return None
    if not 0 < len(name) <= LONGEST_NAME:
        raise errors.BadRequest(f"model must be a name of 1 to {LONGEST_NAME} characters")
    return model_key(name)


def _context() -> int | None:
    given = request.args.get("context")
    if given is None:
        return None
    if not given.isdecimal() or not 0 < int(given[:12]) <= LONGEST_CONTEXT or len(given) > 12:
        raise errors.BadRequest("context must be a number of tokens")
    return int(given)
