"""The OpenAPI 3.1 description of the broker, from openapi.yaml, which says how it is written. What
the code says already is filled in: the errors, the events, and the lists of words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from gpumanager import errors
from gpumanager.config import KINDS, Config
from gpumanager.model import Outcome
from gpumanager.telemetry.events import EVENTS, FIELDS, PRIVATE, Event, Level, fields_of
from gpumanager.web import examples
from gpumanager.web.protocols import protocol_of

LISTS: dict[str, Iterable[Any]] = {
    "$outcomes": get_args(Outcome),
    "$levels": get_args(Level),
}
BROKERS_OWN = ("load", "unload", "restore", "idle-unload")
"""What waits in the queue beside jobs."""
_FOR_ADMINS = "Where keys are in use, it needs one with the role `admin`."
_SECURITY: dict[str, list[Any]] = {
    "admin": [{"bearer": ["admin"]}, {"header": ["admin"]}],
    "client": [{"bearer": []}, {"header": []}],
    "nobody": [],
}


def describe(config: Config, version: str, *, keys: bool) -> dict[str, Any]:
    """The description. `keys`: whether clients have to show one."""
    written = _written()
    kinds = tuple(dict.fromkeys((*KINDS, *config.routing)))
    lists = {
        **LISTS,
        "$kinds": kinds,
        "$queued": (*kinds, *BROKERS_OWN),
        "$events": [_event(each) for each in EVENTS.values()],
        "$codes": sorted(
            {each.code for each in _errors(["everywhere", "job", "named", "NotFound"])}
        ),
    }
    own = {f"/v1/{kind}": f"Run a job of the kind {kind}" for kind in kinds}
    job = written["paths"][f"/v1/{KINDS[0]}"]["post"]
    of_kinds = {path: {"post": {**job, "summary": summary}} for path, summary in own.items()}
    paths = {
        path.replace("{audio_path_prefix}", config.audio_path_prefix): {
            method: _operation(path, each, lists, keys=keys) for method, each in methods.items()
        }
        for path, methods in {**of_kinds, **written["paths"]}.items()
    }
    examples.add_to(paths)
    schemas = {name: _full(each, lists) for name, each in written["schemas"].items()}
    document = {
        "openapi": written["openapi"],
        "info": {**written["info"], "version": version},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if keys:
        document["components"]["securitySchemes"] = written["securitySchemes"]
        document["security"] = _SECURITY["client"]
    return document


@cache
def _written() -> Any:
    return yaml.safe_load(files("gpumanager.web").joinpath("openapi.yaml").read_text("utf-8"))


def _operation(
    path: str, written: Mapping[str, Any], lists: Mapping[str, Iterable[Any]], *, keys: bool
) -> dict[str, Any]:
    operation = {**written}
    role, names = operation.pop("role", "client"), operation.pop("errors", [])
    if role == "admin":
        operation["description"] = f"{operation.get('description', '')} {_FOR_ADMINS}".lstrip()
    if keys and role != "client":
        operation["security"] = _SECURITY[role]
    if "parameters" in operation:
        operation["parameters"] = [_full(each, lists) for each in operation["parameters"]]
    operation["responses"] = {
        **_refusals(names, protocol_of(path).schema, forwarding="default" in written["responses"]),
        **{
            str(status): _answer(each, written["summary"], lists)
            for status, each in written["responses"].items()
        },
    }
    return operation


def _answer(
    written: dict[str, Any], summary: str, lists: Mapping[str, Iterable[Any]]
) -> dict[str, Any]:
    if "schema" not in written:
        return written
    return _json(written.get("description", summary), _full(written["schema"], lists))


def _full(written: Any, lists: Mapping[str, Iterable[Any]]) -> Any:
    """A schema, or what holds some, with nothing left out."""
    if isinstance(written, str):
        return list(lists[written]) if written in lists else written
    if isinstance(written, list):
        return [_full(each, lists) for each in written]
    if not isinstance(written, dict):
        return written
    full: dict[str, Any] = {}
    for key, each in written.items():
        if key == "properties":
            full["type"] = "object"
            both = {**each, **written.get("optional", {})}
            full[key] = {name: _full(of, lists) for name, of in both.items()}
            full["required"] = sorted(each)
        elif key != "optional":
            full[key] = f"#/components/schemas/{each}" if key == "$ref" else _full(each, lists)
    return full


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _errors(names: Iterable[str]) -> Iterator[type[errors.BrokerError]]:
    """The errors by the names of their classes, or of lists of them."""
    for name in names:
        if name in _written()["errors"]:
            yield from _errors(_written()["errors"][name])
        else:
            yield getattr(errors, name)


def _refusals(names: Iterable[str], schema: str, *, forwarding: bool) -> dict[str, Any]:
    """The broker's own answers by status. Where a consumer's answer is handed on (`forwarding`),
    it may use any of them for its own ends."""
    codes: dict[int, list[str]] = {}
    for error in _errors(("everywhere", *names)):
        codes.setdefault(error.status, []).append(error.code)
    answers: dict[str, Any] = {}
    for status in sorted(codes):
        words = ", ".join(f"`{code}`" for code in dict.fromkeys(codes[status]))
        body = {"$ref": f"#/components/schemas/{schema}"}
        if forwarding:
            either = {"anyOf": [body, {"description": "The consumer's own"}]}
            answer = _json(f"The broker's {words}, or the consumer's own", either)
            answer["content"]["*/*"] = {"schema": {}}
        else:
            answer = _json(f"The broker's {words}", body)
        answers[str(status)] = answer
    return answers


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
    return {"type": {str: "string", int: "integer", float: "number", bool: "boolean"}[hint]}
