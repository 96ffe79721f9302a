"""Writes the reference pages from what they describe, so that they cannot fall behind it:
`python -m docs.reference`, from the repository's root.

- config.md from the config's models,
- presets.md from the presets' files and what setup knows of the servers,
- http.md from the OpenAPI description and the error classes,
- events.md from the declared events,
- connect.md from what `connect` says.

A test fails while a page is not what this writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import MISSING
from importlib.resources import files
from inspect import getdoc
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from docs.connecting import connect_page
from gpumanager import __version__
from gpumanager.config import calls, parse_config, presets, schema
from gpumanager.config.jsonschema import config_schema
from gpumanager.setup.services import known_services
from gpumanager.telemetry.events import EVENTS, FIELDS, PRIVATE, fields_of
from gpumanager.web import examples
from gpumanager.web.openapi import describe

HERE = Path(__file__).parent
WRITTEN = "<!-- Written by `python -m docs.reference`; change what it describes instead. -->\n"

TITLES = {
    "Config": "The file",
    "GpuConfig": "`gpu`",
    "SchedulerConfig": "`scheduler`",
    "JobsConfig": "`jobs`",
    "AuthConfig": "`auth`",
    "LogConfig": "`log`",
    "EventsConfig": "`events`",
    "SetupConfig": "`setup`",
    "ConsumerConfig": "`consumers.NAME`",
    "Route": "`consumers.NAME.paths.KIND`, `routes.ROUTE`",
    "ModelEntry": "one of `consumers.NAME.models`",
    "ModelList": "`consumers.NAME.list_models`",
    "Timeouts": "`consumers.NAME.timeouts`",
    "Health": "`consumers.NAME.health`",
    "Probe": "`consumers.NAME.probe`",
    "Session": "`consumers.NAME.session`",
    "Busy": "`consumers.NAME.probe.busy`",
    "LoadCall": "`consumers.NAME.load`, `warm` and `trim`, and a call in `on_disconnect`",
    "UnloadCall": "`consumers.NAME.unload`",
    "Settled": "`consumers.NAME.settled`",
    "Slots": "`consumers.NAME.slots`",
    "EvictionMethod": "one of `consumers.NAME.evict`",
    "Done": "`consumers.NAME.done`",
    "Match": "`consumers.NAME.done.match`",
    "StopCall": "one of `consumers.NAME.stops`",
    "CallMatch": "one of `consumers.NAME.gpu_work` and `not_gpu_work`",
    "Poll": "`consumers.NAME.done.poll`",
    "Lost": "`consumers.NAME.done.lost`",
    "OutOfMemory": "`consumers.NAME.oom`",
}


def pages() -> dict[str, str]:
    """The text of every page by its file's name."""
    return {
        "config.md": config_page(),
        "presets.md": presets_page(),
        "http.md": http_page(),
        "events.md": events_page(),
        "connect.md": connect_page(WRITTEN),
    }


# -- the config ----------------------------------------------------------------------------------


def config_page() -> str:
    """Every key of the config, with its default and what it may hold."""
    parts = [
        WRITTEN,
        "# The config, key by key\n",
        "The config is one YAML file: the one that `--config` names, else `GPUMANAGER_CONFIG`, "
        "else `config/consumers.yaml`. "
        "Seconds are a number, or one with a unit: `500ms`, `90s`, `15m`, `2h`, `1d`. "
        "Memory is in MiB. An unknown key is a fault. `gpumanager check FILE` prints all faults at "
        "once. "
        "Editors complete and check it with the modeline in "
        "[the example](../config/consumers.yaml), or with what `gpumanager schema` prints. "
        "`gpumanager reload` or SIGHUP applies a changed file.\n",
    ]
    definitions = config_schema()
    for name in TITLES:
        model: type[BaseModel] = getattr(schema, name, None) or getattr(calls, name)
        shape = definitions if name == "Config" else definitions["$defs"][name]
        parts += [f"## {TITLES[name]}\n", _said(model), *_table(model, shape)]
    return "\n".join(parts)


def _said(model: type[BaseModel]) -> str:
    text = re.sub(r"^    ", "  ", getdoc(model) or "", flags=re.MULTILINE)
    return text + "\n"


def _table(model: type[BaseModel], shape: dict[str, Any]) -> Iterator[str]:
    yield "| Key | Default | May be | What |"
    yield "|---|---|---|---|"
    for name, field in model.model_fields.items():
        key = field.alias or name
        default = (
            "required"
            if field.is_required()
            else _default(field.get_default(call_default_factory=True))
        )
        of_key = shape["properties"][key]
        yield f"| `{key}` | {default} | {_may_be(of_key)} | {of_key['description']} |"
    yield ""


def _default(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "see there"
    if value is None:
        return "none"
    if value in ((), {}):
        return "empty"
    if isinstance(value, float):
        return f"`{value:g}`"
    if isinstance(value, tuple) and len(value) > 6:
        return f"{len(value)} of them, in `gpumanager schema`"
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def _may_be(shape: dict[str, Any]) -> str:
    return " or ".join(dict.fromkeys(word for word in _words(shape) if word != "none"))


_KINDS_OF_TEXT = {
    "uri": "a URL",
    "path": "a path, starting with `/`",
    "http-method": "an HTTP method",
    "jmespath": "a [JMESPath](https://jmespath.org) expression",
    "regex": "a regular expression",
    "absolute-file": "a file, by its absolute path",
    "file": "a file",
    "host-port": "`HOST:PORT`",
    "hostname": "a host name",
    "callback-host": "a host, with its port if it is not the usual one",
    "systemd-unit": "the name of a systemd unit",
    "container": "the name or id of a container",
    "consumer": "a consumer's name",
    "route": "a route",
    "new-name": "a name",
}


def _words(shape: dict[str, Any]) -> Iterator[str]:
    """What a JSON Schema allows, in words."""
    bounds = _bounds(shape)
    if shape.get("format") in _KINDS_OF_TEXT:
        yield _KINDS_OF_TEXT[shape["format"]]
    elif "$ref" in shape:
        name = shape["$ref"].rpartition("/")[2]
        yield f"a mapping: [{name}](#{_anchor(TITLES[name])})"
    elif "enum" in shape:
        yield ", ".join(f"`{each}`" for each in shape["enum"])
    elif "const" in shape:
        yield (
            f"`{json.dumps(shape['const'])}`"
            if not isinstance(shape["const"], str)
            else f"`{shape['const']}`"
        )
    elif any("pattern" in each for each in shape.get("anyOf", ())):
        yield f"seconds{bounds}"
    elif (listed := _one_or_more(shape)) is not None:
        yield f"one, or a list of: {_may_be(listed)}"
    elif "anyOf" in shape or "oneOf" in shape:
        for each in shape.get("anyOf") or shape["oneOf"]:
            yield from (word + bounds for word in _words(each))
    elif shape.get("type") == "array":
        yield f"a list of: {_may_be(shape['items'])}" if shape.get("items") else "a list"
    elif shape.get("type") == "object" and "additionalProperties" in shape:
        keys = shape.get("propertyNames", {}).get("enum")
        of = ", ".join(f"`{key}`" for key in keys) if keys else "names"
        yield f"a mapping of {of} to {_may_be(shape['additionalProperties'])}"
    elif "type" in shape:
        plain = {"integer": "an integer", "number": "a number", "boolean": "`true`, `false`"}
        plain |= {"string": "a text", "null": "none", "object": "a mapping"}
        yield plain[shape["type"]] + bounds
    else:
        yield "anything that JSON can express"


def _one_or_more(shape: dict[str, Any]) -> dict[str, Any] | None:
    """The shape of a single one, where it may stand for a list of it."""
    choices = shape.get("anyOf", ())
    lists = [each["items"] for each in choices if each.get("type") == "array"]
    lists += [
        each["items"]
        for outer in choices
        for each in outer.get("anyOf", ())
        if each.get("type") == "array"
    ]
    return next((each for each in lists if each in choices), None)


def _bounds(shape: dict[str, Any]) -> str:
    words = {"minimum": "≥", "exclusiveMinimum": ">", "gt": ">", "ge": "≥"}
    words |= {"maximum": "≤", "exclusiveMaximum": "<", "le": "≤"}
    said = [f"{sign} {shape[word]:,.15g}" for word, sign in words.items() if word in shape]
    return f" ({', '.join(said)})" if said else ""


def _anchor(title: str) -> str:
    """As GitHub makes them."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


# -- the presets ---------------------------------------------------------------------------------


def presets_page() -> str:
    """A section for every preset."""
    services = {service.preset: service for service in known_services() if service.preset}
    parts = [
        WRITTEN,
        "# Presets\n",
        "`preset: NAME` fills in what is known of a server; any key that you set wins. They are "
        "data files, each tested on recorded answers of the server (`tests/config/answers`). "
        "They were written from the servers' source and documents. How these servers were chosen, "
        "and what to use instead of others: [vram.md](vram.md#which-servers-have-a-preset). What "
        "the keys mean: [config.md](config.md).\n",
    ]
    for name in presets.names():
        text = files("gpumanager.config").joinpath("presets", f"{name}.yaml").read_text("utf-8")
        head, rules = _split(text)
        example = (
            f'consumers:\n  {name}: {{preset: {name}, url: "http://127.0.0.1:{services[name].port}"'
        )
        config = parse_config(example + "}\n").consumers[name]
        kinds = ", ".join(f"`{kind}` → `{route.path}`" for kind, route in config.paths.items())
        drop_in = ", ".join(f"`{path}`" for path in config.routes or ())
        unloads = (
            "by a call" if config.unload else "not by a call: give it an eviction method (`evict`)"
        )
        parts += [
            f"## {name}\n",
            f"{head}\n",
            f"- Kinds of jobs: {kinds}",
            f"- Routes of OpenAI's, Anthropic's and Ollama's protocols: {drop_in or 'none'}",
            f"- Names of models: {_names_of_models(config)}",
            f"- Unloads: {unloads}",
            f"- With `max_parallel: auto`: {_slots(config)}",
            f"- Memory: {_memory_of_models(config)}",
            *(
                ["- Its jobs are answered at once; the GPU is held until they are over"]
                if config.done
                else []
            ),
            "",
            f"```yaml\n{example}, vram_resident_mib: 6000}}\n```\n",
            f"<details><summary>What it fills in</summary>\n\n```yaml\n{rules}```\n\n</details>\n",
        ]
    return "\n".join(parts)


def _names_of_models(config: schema.ConsumerConfig) -> str:
    listed = config.list_models
    known = "it lists none" if listed is None else f"those that it lists at `{listed.path}`"
    return known + (", and it takes any other" if config.any_model else "")


def _memory_of_models(config: schema.ConsumerConfig) -> str:
    if config.tells_models_apart:
        return "counted by model; one model can be unloaded alone"
    if config.request_model is not None:
        return f"counted as one; what a job needs may depend on its `{config.request_model}`"
    return "counted as one, whatever the model"


def _slots(config: schema.ConsumerConfig) -> str:
    if config.slots is None:
        return "a fault, as it does not tell how many jobs it works on at once"
    return f"as many jobs at once as it says at `{config.slots.path}`, 64 at most"


def _split(text: str) -> tuple[str, str]:
    """A preset's comment as a paragraph, and the rest."""
    lines = text.splitlines(keepends=True)
    count = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.lstrip("# ").strip() for line in lines[:count]), "".join(lines[count:])


# -- HTTP ----------------------------------------------------------------------------------------


def http_page() -> str:
    """Every route, its parameters and the broker's own answers."""
    document = describe(parse_config("{}"), __version__, keys=False)
    parts = [
        WRITTEN,
        "# The HTTP API\n",
        "`/openapi.json` of a running broker has the same as OpenAPI 3.1, with the schemas of all "
        "answers. Every answer carries `X-Request-Id`, and a job's answer "
        "`Server-Timing: queue;dur=…, evict;dur=…, upstream;dur=…` (ms). Errors that the broker "
        "makes are JSON, `{error, message, consumer, retryable}`; what each means and what to do: "
        "[operations.md](operations.md). Where keys are configured everything but `/healthz` wants "
        "one, as `Authorization: Bearer KEY` or `X-Api-Key: KEY`, or as a browser's password; what "
        "a key may do by its role: [SECURITY.md](../SECURITY.md).\n",
    ]
    jobs = [f"/v1/{kind}" for kind in schema.KINDS]
    for path, methods in document["paths"].items():
        if path in jobs[1:]:
            continue  # they differ in their names only
        for method, operation in methods.items():
            of = ", ".join(jobs) if path in jobs else path
            summary = "Run a job of a kind" if path in jobs else operation["summary"]
            parts += [f"## {method.upper()} {of}\n", summary + ".\n"]
            if "description" in operation:
                parts.append(operation["description"] + "\n")
            parts += [_parameter(each) for each in operation.get("parameters", ())]
            parts += [
                f"- {status}: {answer['description']}"
                for status, answer in sorted(operation["responses"].items())
            ]
            parts += ["", *_example_answers(operation["responses"])]
    parts += ["## Errors\n", *_example_errors()]
    parts += ["## Fields\n"]
    for name, shape in document["components"]["schemas"].items():
        if shape.get("properties"):
            parts.append(f"### {name}\n")
            parts += [shape["description"] + "\n"] if "description" in shape else []
            parts += ["| Field | Type | Always there |", "|---|---|---|"]
            for key, each in shape["properties"].items():
                there = "yes" if key in shape.get("required", ()) else "no"
                parts.append(f"| `{key}` | {_type(each)} | {there} |")
            parts.append("")
    return "\n".join(parts)


def _example_answers(answers: dict[str, Any]) -> Iterator[str]:
    """The answers that are no error, as they look."""
    for status, answer in sorted(answers.items()):
        for content in answer.get("content", {}).values():
            if "answer" in (found := content.get("examples", {})):
                yield f"An example of {status}:\n"
                yield f"```json\n{_laid_out(found['answer']['value'])}\n```\n"


def _example_errors() -> Iterator[str]:
    yield "An example of each error that the broker makes:\n"
    yield "| Status | Body |"
    yield "|---|---|"
    for (status, _), body in sorted(examples.refusals().items()):
        yield f"| {status} | `{json.dumps(body, ensure_ascii=False)}` |"
    yield ""


def _laid_out(value: Any, indent: str = "") -> str:
    """JSON with what fits on a line on one."""
    short = json.dumps(value, ensure_ascii=False)
    if len(indent + short) <= 100 or not isinstance(value, dict | list):
        return short
    inner = indent + "  "
    if isinstance(value, list):
        rows = [inner + _laid_out(each, inner) for each in value]
        return "[\n" + ",\n".join(rows) + f"\n{indent}]"
    rows = [f"{inner}{json.dumps(key)}: {_laid_out(each, inner)}" for key, each in value.items()]
    return "{\n" + ",\n".join(rows) + f"\n{indent}}}"


def _parameter(each: dict[str, Any]) -> str:
    said = each.get("description") or _type(each["schema"])
    return f"- `{each['name']}` ({each['in']}): {said}"


def _type(shape: dict[str, Any]) -> str:
    if "$ref" in shape:
        name = shape["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in shape or "const" in shape:
        return ", ".join(f"`{each}`" for each in shape.get("enum", [shape.get("const")]))
    if "anyOf" in shape:
        return " or ".join(_type(each) for each in shape["anyOf"])
    if shape.get("type") == "array":
        return f"list of {_type(shape['items'])}"
    if shape.get("type") == "object" and "properties" in shape:
        return "{" + ", ".join(f"`{key}`" for key in shape["properties"]) + "}"
    kind = shape.get("type", "any")
    kinds = kind if isinstance(kind, list) else [kind]
    time = " (RFC 3339)" if shape.get("format") == "date-time" else ""
    return " or ".join(str(each) for each in kinds) + time


# -- events --------------------------------------------------------------------------------------


def events_page() -> str:
    """Every event, and every field of one."""
    described = describe(parse_config("{}"), __version__, keys=False)["components"]["schemas"]
    parts = [
        WRITTEN,
        "# Events\n",
        "What the broker tells of: in `/v1/events`, in `events.file`, in `gpumanager events` and "
        "on the dashboard, and, under the logger `gpumanager.events`, in the log. "
        "`/metrics`, `/v1/trace` and OpenTelemetry's spans are made from the same. In JSON each "
        "is a flat object: `number`, which rises by one, `time`, `event`, `level`, and the fields "
        "below. "
        "Those in parentheses are left out where there is nothing to say. Where a reader has "
        "missed events that are kept no more, `events.file` and `gpumanager events --json` have "
        '`{"event": "missed", "count": …}` in their place.\n',
        "| Event | Level | When | Fields | In the log as |",
        "|---|---|---|---|---|",
    ]
    types: dict[str, str] = {}
    for event, shape in zip(EVENTS.values(), described["Event"]["oneOf"], strict=True):
        del shape["properties"]["event"]
        types |= {name: _type(each) for name, each in shape["properties"].items()}
        fields = ", ".join(
            f"(`{name}`)" if each.default is not MISSING else f"`{name}`"
            for name, each in fields_of(event).items()
        )
        logged = "the request's own line" if event.message is None else f"`{event.message}`"
        cells = (f"`{event.name}`", event.usual_level, shape["description"], fields, logged)
        parts.append(f"| {' | '.join(cells)} |")
    parts += [
        "\n## Fields\n",
        "The same name says the same in every event. A key with the role `client` sees "
        f"{', '.join(f'`{name}`' for name in sorted(PRIVATE))} in events of its own jobs only.\n",
        "| Field | Type | What |",
        "|---|---|---|",
        *(f"| `{name}` | {types[name]} | {said} |" for name, said in FIELDS.items()),
        "",
    ]
    return "\n".join(parts)


def main() -> None:
    """Write them."""
    for name, text in pages().items():
        (HERE / name).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
