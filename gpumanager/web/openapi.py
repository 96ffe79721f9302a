"""The OpenAPI 3.1 description of the broker, made from the config and the error classes, so that
it cannot fall behind them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gpumanager import errors
from gpumanager.config import KINDS, Config
from gpumanager.events import EVENTS, FIELDS, PRIVATE, Event, Level, fields_of
from gpumanager.model import Outcome
from gpumanager.web import examples

_KIND_WORDS = {
    "tts": "text to speech",
    "stt": "speech to text",
    "llm": "a language model",
    "image": "images",
}

_EVERYWHERE: tuple[type[errors.BrokerError], ...] = (
    errors.BadRequest,
    errors.Unauthorized,
    errors.Forbidden,
    errors.RequestTimeout,
    errors.HeadersTooLarge,
    errors.InternalError,
)
_FORWARDING: tuple[type[errors.BrokerError], ...] = (
    errors.PayloadTooLarge,
    errors.ConsumerUnreachable,
    errors.ConsumerTimeout,
    errors.QueueFull,
)
_JOB: tuple[type[errors.BrokerError], ...] = (
    *_FORWARDING,
    errors.NoConsumer,
    errors.ConsumerUnhealthy,
    errors.QueueTimeout,
    errors.InsufficientVram,
    errors.ShuttingDown,
    errors.Cancelled,
    errors.SchedulerError,
)

_JSON = "application/json"
_FOR_ADMINS = "Where keys are in use, it needs one with the role `admin`."
_OF_OTHERS = (
    "With a key of the role `client`, `client` and `request_id` of other clients' jobs are `-`."
)
_TIME = {"type": "string", "format": "date-time"}
_COUNT = {"type": "integer", "minimum": 0}
_FLAG = {"type": "boolean"}
_SENSORS = {
    "utilization_percent": _COUNT,
    "power_w": {"type": "number", "minimum": 0},
    "temperature_c": {"type": "integer"},
}


def describe(config: Config, version: str, *, keys: bool) -> dict[str, Any]:
    """The description. `keys`: whether clients have to show one."""
    paths: dict[str, Any] = {f"/v1/{kind}": {"post": _job(kind)} for kind in KINDS}
    paths["/v1/status"] = {"get": _read("The present state", "Status", _OF_OTHERS)}
    paths["/v1/queue"] = {
        "get": _read("The queue: the running job, then the waiting ones", "Queue", _OF_OTHERS)
    }
    paths["/v1/queue/{ticket}"] = {"delete": _cancel()}
    kind = _path_parameter("kind", {"enum": list(KINDS)})
    consumer = _path_parameter("consumer", {"type": "string"})
    paths["/v1/plan/{kind}"] = {"get": _plan(kind)}
    paths["/v1/consumers/{consumer}/unload"] = {
        "post": _move("Unload a consumer", "Unloaded", consumer)
    }
    paths["/v1/consumers/{consumer}/load"] = {"post": _move("Load a consumer", "Loaded", consumer)}
    paths["/v1/consumers/{consumer}/learned"] = {"delete": _forget(consumer)}
    paths["/v1/consumers/{consumer}/pin"] = {
        "post": _pin("Never evict a consumer, nor unload it for being idle", consumer),
        "delete": _pin("Let a consumer be evicted again", consumer),
    }
    paths["/v1/events"] = {"get": _events()}
    paths["/v1/history"] = {
        "get": {
            **_read("How much of the card each consumer held in the last hour", "History"),
            "parameters": [
                {
                    "name": "seconds",
                    "in": "query",
                    "description": "Only the samples of the last so many seconds; 0 for all",
                    "schema": {**_COUNT, "maximum": 3600},
                }
            ],
        }
    }
    paths["/v1/trace"] = {
        "get": _read("The events as a trace for chrome://tracing or Perfetto", "Trace")
    }
    paths["/metrics"] = {
        "get": {
            "summary": "Metrics for Prometheus",
            "responses": {
                "200": {
                    "description": "Text exposition format",
                    "content": {"text/plain": {"schema": {"type": "string"}}},
                },
                **_errors([]),
            },
        }
    }
    paths["/v1/drain"] = {
        "post": {
            "summary": "Refuse new jobs, finish running ones, and end the broker",
            "description": _FOR_ADMINS,
            "parameters": [
                {
                    "name": "boot",
                    "in": "query",
                    "required": True,
                    "description": "The `boot` of `/v1/events`, so that no other broker is ended",
                    "schema": {"type": "string"},
                }
            ],
            "responses": {"202": _json("It drains", _ref("Draining")), **_errors([])},
        }
    }
    paths["/v1/reload"] = {
        "post": {
            "summary": "Read the config again and apply what changed",
            "description": _FOR_ADMINS,
            "responses": {"200": _json("What changed", _ref("Changes")), **_errors([])},
        }
    }
    paths[config.audio_path_prefix + "{file}"] = {"get": _audio()}
    paths["/healthz"] = {"get": _health()}
    paths["/openapi.json"] = {
        "get": {
            "summary": "This description",
            "responses": {"200": _json("OpenAPI 3.1", {"type": "object"}), **_errors([])},
        }
    }
    paths["/"] = {
        "get": {
            "summary": "One line of text; the dashboard for a browser",
            "responses": {
                **_errors([]),
                "200": {
                    "description": "What there is",
                    "content": {
                        "text/plain": {"schema": {"type": "string"}},
                        "text/html": {"schema": {"type": "string"}},
                    },
                },
            },
        }
    }
    examples.add_to(paths)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "gpumanager",
            "version": version,
            "summary": "One URL, one queue and one lock in front of AI services on one GPU",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "paths": paths,
        "components": {"schemas": _schemas()},
    }
    if keys:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
        }
        document["security"] = [{"bearer": []}, {"header": []}]
        paths["/healthz"]["get"]["security"] = []
        for operation in (each for path in paths.values() for each in path.values()):
            if _FOR_ADMINS in operation.get("description", ""):
                operation["security"] = [{"bearer": ["admin"]}, {"header": ["admin"]}]
    return document


def _job(kind: str) -> dict[str, Any]:
    return {
        "summary": f"Run a job of {_KIND_WORDS[kind]}",
        "description": "The broker forwards the request to the routed consumer under the GPU's "
        "lock; query, headers and body go through unchanged, and so does the answer, whatever its "
        "status.",
        "parameters": [
            {
                "name": "Prefer",
                "in": "header",
                "description": "`wait=N`: the longest wait in the queue, in seconds (RFC 7240)",
                "schema": {"type": "string"},
            }
        ],
        "requestBody": {"content": {"*/*": {"schema": {}}}},
        "responses": {"default": _any("The consumer's own answer"), **_errors(_JOB)},
    }


def _audio() -> dict[str, Any]:
    return {
        "summary": "Rendered audio, from the consumer that rendered it",
        "parameters": [
            {"name": "file", "in": "path", "required": True, "schema": {"type": "string"}}
        ],
        "responses": {
            "default": _any("The consumer's own answer"),
            **_errors([*_FORWARDING, errors.NotFound, errors.NoAudioProxy]),
        },
    }


def _read(summary: str, schema: str, description: str = "") -> dict[str, Any]:
    return {
        "summary": summary,
        **({"description": description} if description else {}),
        "responses": {"200": _json(summary, _ref(schema)), **_errors([])},
    }


def _path_parameter(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _plan(kind: dict[str, Any]) -> dict[str, Any]:
    summary = "Whether a job that came now would fit, and which consumers would be unloaded for it"
    return {
        "summary": summary,
        "parameters": [kind],
        "responses": {
            "200": _json(summary, _ref("Plan")),
            **_errors([errors.NotFound, errors.NoConsumer]),
        },
    }


def _move(summary: str, schema: str, consumer: dict[str, Any]) -> dict[str, Any]:
    return {
        "summary": summary,
        "description": f"Waits in the queue like a job. {_FOR_ADMINS}",
        "parameters": [consumer],
        "responses": {
            "200": _json("It was done", _ref(schema)),
            **_errors([errors.NotFound, errors.ConsumerTimeout, *_JOB], forwarding=False),
        },
    }


def _forget(consumer: dict[str, Any]) -> dict[str, Any]:
    needed = _object({"consumer": {"type": "string"}, "needed": _ref("Figure")})
    return {
        "summary": "Forget what was learned of a consumer",
        "description": "What it needs, what it keeps after an unload, and its times are learned "
        f"again from the next jobs. {_FOR_ADMINS}",
        "parameters": [consumer],
        "responses": {"200": _json("It was done", needed), **_errors([errors.NotFound])},
    }


def _pin(summary: str, consumer: dict[str, Any]) -> dict[str, Any]:
    return {
        "summary": summary,
        "description": "Replaces `pinned` of the config until the broker ends or this is changed "
        f"again. To pin a consumer permanently, use the config. {_FOR_ADMINS}",
        "parameters": [consumer],
        "responses": {
            "200": _json("It was done", _object({"consumer": {"type": "string"}, "pinned": _FLAG})),
            **_errors([errors.NotFound]),
        },
    }


def _events() -> dict[str, Any]:
    number = {"type": "integer", "minimum": 0}
    limit = {**number, "maximum": 1000}
    return {
        "summary": "The latest events",
        "description": "To get later events, ask again with `since` set to `last`. `boot` "
        "changes when the broker restarts. With a key of the role `client`, events of other "
        "clients' jobs do not say whose they are.",
        "parameters": [
            {"name": "since", "in": "query", "schema": number},
            {"name": "limit", "in": "query", "schema": limit},
        ],
        "responses": {"200": _json("Events in their order", _ref("Events")), **_errors([])},
    }


def _cancel() -> dict[str, Any]:
    done = {
        "type": "object",
        "properties": {"ticket": _COUNT, "state": {"const": "cancelled"}},
        "required": ["ticket", "state"],
    }
    ticket = {"type": "integer", "minimum": 0}
    return {
        "summary": "Cancel a waiting or running job",
        "description": "A key with the role `client` may cancel its own jobs only.",
        "parameters": [{"name": "ticket", "in": "path", "required": True, "schema": ticket}],
        "responses": {"200": _json("It is cancelled", done), **_errors([errors.NotFound])},
    }


def _health() -> dict[str, Any]:
    def state(word: str) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {"status": {"const": word}},
            "required": ["status"],
        }

    return {
        "summary": "Whether the broker runs",
        "responses": {
            **_errors([]),
            "200": _json("It runs", state("ok")),
            "503": _json("It drains", state("draining")),
        },
    }


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {_JSON: {"schema": schema}}}


def _any(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"*/*": {"schema": {}}}}


def _errors(
    more: Iterable[type[errors.BrokerError]], *, forwarding: bool | None = None
) -> dict[str, Any]:
    """The broker's own answers by status. Where a consumer's answer is handed on (`forwarding`),
    it may use any of them for its own ends."""
    more = list(more)
    codes: dict[int, list[str]] = {}
    for error in (*_EVERYWHERE, *more):
        codes.setdefault(error.status, []).append(error.code)
    if forwarding is None:
        forwarding = errors.ConsumerUnreachable in more
    answers: dict[str, Any] = {}
    for status in sorted(codes):
        words = ", ".join(f"`{code}`" for code in dict.fromkeys(codes[status]))
        if forwarding:
            answer = _json(f"The broker's {words}, or the consumer's own", _ANYTHING_OR_ERROR)
            answer["content"]["*/*"] = {"schema": {}}
        else:
            answer = _json(f"The broker's {words}", _ref("Error"))
        answers[str(status)] = answer
    return answers


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


_ANYTHING_OR_ERROR = {"anyOf": [_ref("Error"), {"description": "The consumer's own"}]}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": sorted(required),
    }


def _event(event: type[Event]) -> dict[str, Any]:
    """What tells who somebody is, others may not see."""
    types = get_type_hints(event)
    fields = fields_of(event)
    properties = {name: {**_typed(types[name]), "description": FIELDS[name]} for name in fields}
    required = [
        name for name, each in fields.items() if each.default is MISSING and name not in PRIVATE
    ]
    return {
        "description": " ".join((event.__doc__ or "").split()),
        "properties": {"event": {"const": event.name}, **properties},
        "required": required,
    }


def _typed(hint: Any) -> dict[str, Any]:
    """The schema of an event's field; one that may be None is left out then."""
    choices = [each for each in get_args(hint) if each is not type(None)]
    if get_origin(hint) is Literal:
        return {"enum": choices}
    if get_origin(hint) is tuple:
        return {"type": "array", "items": _typed(choices[0])}
    if choices:
        return _typed(choices[0])
    return {"type": {str: "string", int: "integer", float: "number"}[hint]}


def _schemas() -> dict[str, Any]:
    text, flag = {"type": "string"}, {"type": "boolean"}
    times = _object(dict.fromkeys(("p50", "p95", "count"), _COUNT))
    error_codes = sorted({error.code for error in (*_EVERYWHERE, *_JOB)} | {"not_found"})
    return {
        "Error": _object(
            {"error": {"type": "string", "examples": error_codes}, "message": text},
            {"consumer": text, "retryable": flag},
        ),
        "Queue": _object({"queue": {"type": "array", "items": _ref("Entry")}}),
        "Entry": _object(
            {
                "ticket": _COUNT,
                "consumer": text,
                "kind": {"enum": [*KINDS, "load", "unload", "restore", "idle-unload"]},
                "client": text,
                "request_id": text,
                "state": {"enum": ["running", "waiting"]},
                "since": _TIME,
                "age_ms": _COUNT,
                "position": _COUNT,
                "estimate_ms": _COUNT,
                "evict_ms": _COUNT,
                "load_ms": _COUNT,
                "run_ms": _COUNT,
                "overdue": flag,
            }
        ),
        "Status": _object(
            {
                "listen": text,
                "time": _TIME,
                "role": {"enum": ["admin", "client"]},
                "version": text,
                "config_file": {"type": ["string", "null"]},
                "gpu": _ref("Gpu"),
                "routing": {"type": "object", "additionalProperties": text},
                "consumers": {"type": "array", "items": _ref("Consumer")},
                "scheduler": _ref("Scheduler"),
                "queue": {"type": "array", "items": _ref("Entry")},
            }
        ),
        "Gpu": _object(
            {
                "total_mib": _COUNT,
                "used_mib": _COUNT,
                "free_mib": _COUNT,
                "reserved_mib": _COUNT,
                "source": {"enum": ["measured", "ledger", "unknown"]},
                "device": {"type": ["string", "integer"]},
            },
            {
                "last_sample": _TIME,
                "name": text,
                **_SENSORS,
                "power_limit_w": _SENSORS["power_w"],
                "attribution": _object(
                    {"source": {"enum": ["processes", "totals"]}}, {"reason": text}
                ),
                "foreign": {
                    "type": "array",
                    "items": _object({"pid": _COUNT, "name": text, "mib": _COUNT}),
                },
                "err": text,
            },
        ),
        "Plan": _object(
            {
                "kind": {"enum": list(KINDS)},
                "consumer": text,
                "fits": flag,
                "fits_now": flag,
                **dict.fromkeys(("needed_mib", "held_mib", "free_mib", "reserved_mib"), _COUNT),
                "short_mib": _COUNT,
                "source": {"enum": ["measured", "ledger", "unknown"]},
                "victims": {
                    "type": "array",
                    "items": _object(
                        {"consumer": text, "mib": _COUNT, "why": text, "estimate_ms": _COUNT}
                    ),
                },
                "must_load": flag,
                "estimate_ms": _object(dict.fromkeys(("wait", "evict", "load", "run"), _COUNT)),
                "overdue": flag,
            }
        ),
        "Unloaded": _object(
            {
                "consumer": text,
                "outcome": {"enum": list(get_args(Outcome))},
                "mib": _COUNT,
                "ms": _COUNT,
            },
            {"taken_by": text},
        ),
        "Loaded": _object({"consumer": text, "loaded": flag, "ms": _COUNT}),
        "Events": _object(
            {
                "boot": text,
                "last": _COUNT,
                "missed": _COUNT,
                "events": {"type": "array", "items": _ref("Event")},
            }
        ),
        "Event": {
            **_object(
                {
                    "number": _COUNT,
                    "time": _TIME,
                    "event": text,
                    "level": {"enum": list(get_args(Level))},
                }
            ),
            "description": "What else there is of each event: [events.md](events.md).",
            "oneOf": [_event(each) for each in EVENTS.values()],
        },
        "History": _object({"samples": {"type": "array", "items": _ref("Sample")}}),
        "Sample": _object(
            {
                "time": _TIME,
                "total_mib": _COUNT,
                "used_mib": _COUNT,
                "held_mib": {"type": "object", "additionalProperties": _COUNT},
            },
            _SENSORS,
        ),
        "Trace": _object({"traceEvents": {"type": "array", "items": {"type": "object"}}}),
        "Draining": _object({"status": {"const": "draining"}}),
        "Changes": _object(
            {
                what: {"type": "array", "items": text}
                for what in ("added", "removed", "changed", "keys")
            }
        ),
        "Figure": _object(
            {
                "mib": _COUNT,
                "source": {"enum": ["declared", "measured", "reported", "out-of-memory"]},
            },
            {"at": _TIME},
        ),
        "Learned": _object(
            {"needed": _ref("Figure")},
            {
                "peak_mib": _COUNT,
                "peak": _ref("Figure"),
                "raised": _object({"mib": _COUNT, "at": _TIME, "jobs_left": _COUNT}),
                "residue_mib": _COUNT,
                "residue": _ref("Figure"),
                **dict.fromkeys(("load_ms", "unload_ms", "run_ms"), times),
            },
        ),
        "Consumer": _object(
            {
                "name": text,
                "url": text,
                "healthy": flag,
                "probed": flag,
                "breaker": {"enum": ["closed", "open", "trial"]},
                "loaded": flag,
                "gpu_resident_mib": _COUNT,
                "resident_source": {"enum": ["declared", "measured", "reported"]},
                "vram_budget_mib": _COUNT,
                "active": _COUNT,
                "total_requests": _COUNT,
                "priority": {"type": "integer"},
                "can_coexist_with": {"type": "array", "items": text},
                "pinned": flag,
                "learned": _ref("Learned"),
            },
            {
                "attribution": {"enum": ["processes", "totals"]},
                "assumed": {"const": True},
                "last_used": _TIME,
                "last_probe": _TIME,
                "last_error": text,
                "health_since": _TIME,
                "breaker_since": _TIME,
                "stopped_by": {"enum": ["unit", "container", "signal", "checkpoint"]},
                "quarantine": text,
                "quarantine_until": _TIME,
                "on_cpu": {"type": "array", "items": text},
            },
        ),
        "Scheduler": _object(
            {
                "kind": {"enum": ["locked", "passthrough"]},
                **dict.fromkeys(("queue_depth", "in_flight", "total_jobs", "evictions"), _COUNT),
                "last_wait_ms": _COUNT,
                "last_run_ms": _COUNT,
                "out_of_memory": _object({"seen": _COUNT, "healed": _COUNT}),
                "oldest_queued": {"anyOf": [_TIME, {"type": "null"}]},
            }
        ),
    }
