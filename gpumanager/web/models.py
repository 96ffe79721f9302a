"""The lists of models, merged from all consumers, as OpenAI's, Anthropic's and Ollama's clients
want them; and Ollama's other calls, which are no GPU work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, request

from gpumanager.config import ConsumerConfig, ModelEntry
from gpumanager.consumers.footprint import Figure
from gpumanager.consumers.registry import Registry
from gpumanager.consumers.snapshot import Snapshot
from gpumanager.errors import ModelNotFound, NoConsumer
from gpumanager.jobs.routing import Catalogue, Router, not_found
from gpumanager.model import model_key, resident_name
from gpumanager.upstream.proxy import Inbound
from gpumanager.web.boundary import json_response
from gpumanager.web.forwarding import Forwarder
from gpumanager.web.inbound import inbound_of, raw_path
from gpumanager.web.roles import CHANGE_NOTHING
from gpumanager.web.ways import OLLAMA_CHAT, ModelRequest

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

OLLAMAS_OWN = (
    ("GET", "/api/version"),
    ("GET", "/api/ps"),
    ("POST", "/api/show"),
    ("POST", "/api/pull"),
    ("POST", "/api/push"),
    ("POST", "/api/create"),
    ("POST", "/api/copy"),
    ("DELETE", "/api/delete"),
    ("HEAD", "/api/blobs/<digest>"),
    ("POST", "/api/blobs/<digest>"),
)
"""Calls of Ollama's that no model has to be on the card for."""

_NAMES_MODEL = frozenset({"/api/show", "/api/push", "/api/delete"})


@dataclass(frozen=True, slots=True)
class Offered:
    """A model, who serves it, for which kinds of job, whether it is loaded, and how much of the
    card it needs, as far as that is declared or was seen."""

    name: str
    consumer: str
    kinds: tuple[str, ...]
    loaded: bool
    vram: Figure | None = None


class ModelLists:
    """What all routed consumers offer."""

    def __init__(self, registry: Registry, catalogue: Catalogue) -> None:
        self._registry = registry
        self._catalogue = catalogue

    def offered(self) -> list[Offered]:
        """Every model once, that of the first consumer that has it."""
        found: dict[str, Offered] = {}
        for each in self._all():
            found.setdefault(each.name, each)
        return list(found.values())

    def of(self, name: str) -> Offered:
        """One model, also one that only a pattern of the config names, unless that lets every name
        through. Raises ModelNotFound."""
        offered = self.offered()
        for each in offered:
            if name in (each.name, each.name.removesuffix(":latest")):
                return each
        for server in self._servers():
            for entry in server.config.models or ():
                if entry.name.strip("*?") and fnmatchcase(name, entry.name):
                    return server.offers(name, entry)
        raise not_found(name, [each.name for each in offered])

    def details(self, offered: Offered) -> Mapping[str, Any]:
        """What the consumer itself says of a model."""
        consumer = self._registry.now.config.consumers.get(offered.consumer)
        if consumer is None or not _lists(consumer):
            return {}
        listed = self._catalogue.listed(offered.consumer)
        return {} if listed is None else listed.details.get(offered.name, {})

    def _servers(self) -> Iterator[_Server]:
        snapshot = self._registry.now
        config = snapshot.config
        kinds: dict[str, list[str]] = {}
        for kind in config.routing:
            for name in config.candidates(kind):
                kinds.setdefault(name, []).append(kind)
        for name, its in kinds.items():
            yield _Server(name, snapshot, tuple(its))

    def _all(self) -> Iterator[Offered]:
        for server in self._servers():
            declared = server.config.models
            for entry in declared or ():
                if not _is_pattern(entry):
                    yield server.offers(entry.name, entry)
            listed = self._catalogue.listed(server.name) if _lists(server.config) else None
            for name in () if listed is None else listed.names:
                if declared is None:
                    yield server.offers(name)
                    continue
                for entry in declared:
                    if entry.served_as is None and fnmatchcase(name, entry.name):
                        yield server.offers(name, entry)


@dataclass(frozen=True, slots=True)
class _Server:
    """A consumer that jobs of `kinds` go to."""

    name: str
    snapshot: Snapshot
    kinds: tuple[str, ...]

    @property
    def config(self) -> ConsumerConfig:
        """Its settings."""
        return self.snapshot.config.consumers[self.name]

    def offers(self, model: str, entry: ModelEntry | None = None) -> Offered:
        """A model of its, as the config has it in `entry`."""
        served = model if entry is None else entry.served_as or model
        vram = self._vram(served)
        if entry is not None and entry.vram_mib is not None:
            vram = Figure(entry.vram_mib, "declared")
        return Offered(model, self.name, self.kinds, self._has_loaded(served), vram)

    def _has_loaded(self, served: str) -> bool:
        state, probe = self.snapshot.states[self.name], self.config.probe
        if state.stopped_by is not None or not state.loaded:
            return False
        if self.config.tells_models_apart:
            return state.has_loaded(model_key(served))
        if probe is None or probe.items is None:
            return True
        return served in state.items or f"{served}:latest" in state.items

    def _vram(self, served: str) -> Figure | None:
        """What the config says that the model needs, else what was learned of it, else what its
        listed size lets expect."""
        key = model_key(served)
        declared, resident = self.config.declared_for(key), resident_name(self.name, key)
        if declared is not None:
            return Figure(declared.mib, "declared")
        needed = self.snapshot.needed(resident)
        known = not self.snapshot.figures(resident).needs.nothing
        return needed if known or needed.source == "listed" else None


def _is_pattern(entry: ModelEntry) -> bool:
    return not set("*?[").isdisjoint(entry.name)


def _lists(consumer: ConsumerConfig) -> bool:
    """Whether what it lists itself counts: all of it, or what the config's patterns let through."""
    declared = consumer.models
    return declared is None or any(
        each.served_as is None and _is_pattern(each) for each in declared
    )


def install(app: Flask, lists: ModelLists, router: Router, forward: Forwarder) -> None:
    """Add the routes of the lists, and of Ollama's calls outside the lock, to `app`."""

    def openai(offered: Offered) -> dict[str, Any]:
        said = lists.details(offered)

        def text(key: str, default: str) -> str:
            given = said.get(key)
            return given if isinstance(given, str) else default

        view: dict[str, Any] = {
            "id": offered.name,
            "object": "model",
            "created": created if isinstance(created := said.get("created"), int) else 0,
            "owned_by": text("owned_by", offered.consumer),
            "type": "model",  # this and the next two are Anthropic's
            "display_name": text("display_name", offered.name),
            "created_at": text("created_at", "1970-01-01T00:00:00Z"),
            "consumer": offered.consumer,
            "kinds": list(offered.kinds),
            "loaded": offered.loaded,
        }
        if offered.vram is not None:
            view |= {"vram_mib": offered.vram.mib, "vram_source": offered.vram.source}
        return view

    @app.get("/v1/models")
    def models() -> Response:
        data = [openai(each) for each in lists.offered()]
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        ends = {"has_more": False, "first_id": first, "last_id": last}
        return json_response({"object": "list", "data": data, **ends})

    @app.get("/v1/models/<path:name>")
    def model(name: str) -> Response:
        return json_response(openai(lists.of(name)))

    @app.get("/api/tags")
    def tags() -> Response:
        return json_response({"models": [_tag(each, lists) for each in lists.offered()]})

    def ollamas(**given: str) -> Response:  # noqa: ARG001  # the raw path is what counts
        environ = request.environ
        name, inbound = _ollama(environ, router)
        return forward(environ, name, raw_path(environ, "/api/"), inbound, endless=True)

    for method, path in OLLAMAS_OWN:
        app.add_url_rule(
            path,
            endpoint=SHOW if path in CHANGE_NOTHING else f"{method} {path}",
            view_func=ollamas,
            methods=[method],
        )


SHOW = "show"
"""The endpoint that changes nothing although it is a POST."""


def _ollama(environ: WSGIEnvironment, router: Router) -> tuple[str, Inbound]:
    """The consumer that speaks Ollama's protocol, of several the one with the model, and the
    request as that one takes it. Raises NoConsumer, ModelNotFound, BadRequest."""
    inbound = inbound_of(environ)
    request = ModelRequest(inbound, environ["PATH_INFO"], strict=True)

    def model() -> str | None:
        return request.model() if environ["PATH_INFO"] in _NAMES_MODEL else None

    missing: ModelNotFound | None = None
    for kind in ("llm", "embed"):
        try:
            choice = router.choose((kind,), model, lambda _, it: it.serves(OLLAMA_CHAT))
        except NoConsumer:
            continue
        except ModelNotFound as error:
            missing = missing or error
            continue
        if router.consumer(choice.consumer).serves(OLLAMA_CHAT):
            return choice.consumer, request.served_as(choice.served_as)
    raise missing or NoConsumer("no consumer speaks Ollama's protocol")


def _tag(offered: Offered, lists: ModelLists) -> dict[str, Any]:
    """As Ollama lists it. What it does not say itself has the shape that its clients parse."""
    said = lists.details(offered)
    return {
        "name": offered.name,
        "model": offered.name,
        "modified_at": "1970-01-01T00:00:00Z",
        "size": 0,
        "digest": "",
        "details": {
            "parent_model": "",
            "format": "",
            "family": "",
            "families": None,
            "parameter_size": "",
            "quantization_level": "",
        },
        **(said if "digest" in said else {}),
        "consumer": offered.consumer,
        "loaded": offered.loaded,
    }
