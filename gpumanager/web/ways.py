"""The ways in for jobs: which requests are jobs, of which kind, and in whose protocol.

Each way parses what it must, chooses the consumer, and has `jobs` do the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from flask import Response

from gpumanager.config import KINDS, Config, ConsumerConfig, Route, expressions
from gpumanager.consumers.admission import Admission
from gpumanager.errors import BadRequest, MethodNotAllowed, NoConsumer
from gpumanager.jobs.routing import Choice, Router
from gpumanager.jobs.runner import JobRunner
from gpumanager.model import model_key
from gpumanager.upstream.exchange import Exchange
from gpumanager.upstream.proxy import Inbound, Proxy
from gpumanager.web.deferring import Deferring
from gpumanager.web.inbound import inbound_of, preferred_wait
from gpumanager.web.modelfield import (
    LONGEST_NAME,
    ModelField,
    find_model,
    read_json,
    with_model,
)
from gpumanager.web.record import record_of
from gpumanager.web.relay import RelayedResponse
from gpumanager.web.unloading import only_unloads

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

JobView = Callable[["WSGIEnvironment"], Response]


@dataclass(frozen=True, slots=True)
class Way:
    """A path that takes jobs by POST: of the first of `kinds` that is routed. A consumer serves a
    `drop_in` way at the path that its `routes` give, any other at the one that its `paths` give for
    the kind."""

    path: str
    kinds: tuple[str, ...]
    drop_in: bool = True

    def route(self, kind: str, consumer: ConsumerConfig) -> Route | None:
        """Where the consumer takes such a job; None if it does not."""
        if not self.drop_in:
            return consumer.paths.get(kind)
        if self.path == f"/v1/{kind}" and kind in consumer.paths:
            return consumer.paths[kind]
        return consumer.route_for(self.path)


LONGEST_CONTEXT = 100_000_000
"""Tokens: what asks for more is no figure to count with."""

OLLAMA_CHAT = "/api/chat"
LLM, EMBED = ("llm",), ("embed", "llm")

DROP_IN = (
    Way("/v1/chat/completions", LLM),
    Way("/v1/completions", LLM),
    Way("/v1/responses", LLM),
    Way("/v1/messages", LLM),
    Way("/v1/messages/count_tokens", LLM),
    Way("/v1/embeddings", EMBED),
    Way("/v1/rerank", ("rerank",)),
    Way("/v1/audio/speech", ("tts",)),
    Way("/v1/audio/transcriptions", ("stt",)),
    Way("/v1/audio/translations", ("stt",)),
    Way("/v1/images/generations", ("image",)),
    Way("/v1/images/edits", ("image",)),
    Way("/v1/images/variations", ("image",)),
    Way(OLLAMA_CHAT, LLM),
    Way("/api/generate", LLM),
    Way("/api/embed", EMBED),
    Way("/api/embeddings", EMBED),
)
"""OpenAI's, Anthropic's and Ollama's."""


def drop_in_routes(config: Config, name: str) -> list[str]:
    """The drop-in routes on which a consumer may get jobs: those of kinds that are routed to it,
    as far as it serves them."""
    consumer, found = config.consumers[name], []
    for way in DROP_IN:
        kind = next((each for each in way.kinds if config.candidates(each)), None)
        if kind is not None and name in config.candidates(kind) and way.route(kind, consumer):
            found.append(way.path)
    return found


class Ways:
    """The views of all ways in. `views` holds those that are always there, by path."""

    def __init__(
        self,
        config: Config,
        router: Router,
        admission: Admission,
        proxy: Proxy,
        jobs: JobRunner,
        deferring: Deferring,
    ) -> None:
        self._config = config
        self._deferring = deferring
        self._router = router
        self._admission = admission
        self._proxy = proxy
        self._jobs = jobs
        own = [Way(f"/v1/{kind}", (kind,), drop_in=False) for kind in KINDS]
        self.views: dict[str, JobView] = {way.path: self._view(way) for way in (*own, *DROP_IN)}
        self._named: dict[str, JobView] = {}

    def find(self, path: str) -> JobView | None:
        """The view of a path that takes jobs now, None if it takes none: one of `views`, or
        `/v1/{kind}` of a kind that the operator named."""
        view = self.views.get(path)
        if view is not None:
            return view
        kind = path[4:]
        if not path.startswith("/v1/") or not self._config.candidates(kind):
            return None
        if kind not in self._named:
            self._named[kind] = self._view(Way(path, (kind,), drop_in=False))
        return self._named[kind]

    def _view(self, way: Way) -> JobView:
        def job(environ: WSGIEnvironment) -> Response:
            if environ["REQUEST_METHOD"] != "POST":
                message = f"{environ['REQUEST_METHOD']} is not allowed here; allowed: POST"
                raise MethodNotAllowed(message, allow=["POST"])
            request = ModelRequest(inbound_of(environ), way.path, strict=way.drop_in)

            def choose() -> Choice:
                choice = self._router.choose(
                    way.kinds, request.model, lambda kind, it: way.route(kind, it) is not None
                )
                return request.said_of(choice, self._router)

            def served_by(choice: Choice, consumer: ConsumerConfig) -> Route:
                name, route = choice.consumer, way.route(choice.kind, consumer)
                if route is None:
                    lacks = f"routes.{way.path}" if way.drop_in else f"paths.{choice.kind}"
                    raise NoConsumer(f"consumer {name} lacks {lacks}", consumer=name)
                return route

            def prepare(choice: Choice, consumer: ConsumerConfig) -> Exchange:
                name, route = choice.consumer, served_by(choice, consumer)
                self._admission.check(name)
                inbound = request.served_as(choice.served_as)
                return self._proxy.prepare(name, inbound, route.path, route.method, consumer)

            if self._deferring.wanted(environ):
                choice = choose()
                served_by(choice, self._router.consumer(choice.consumer))
                model = choice.called or choice.model
                return self._deferring.accept(environ, choice.kind, choice.consumer, model)
            max_wait = preferred_wait(environ.get("HTTP_PREFER", ""))
            answer = self._jobs.run(record_of(environ), choose, prepare, max_wait)
            return RelayedResponse(answer)

        return job


class ModelRequest:
    """A request whose model is looked for when somebody asks, once. `strict`: where it cannot be
    told, the request is refused; else it counts as naming none."""

    def __init__(self, inbound: Inbound, path: str, *, strict: bool) -> None:
        self.only_unloads = only_unloads(path, inbound)
        self._inbound = inbound
        self._strict = strict
        self._field: ModelField | None = None

    def said_of(self, choice: Choice, router: Router) -> Choice:
        """The choice, with what the request says of the memory that it needs."""
        consumer = router.consumer(choice.consumer)
        if self.only_unloads:
            choice = replace(choice, makes_room=False)
        if not consumer.counts_by_model:
            return choice
        model = choice.served_as or self._works_with(consumer)
        if model is None:
            return choice
        if consumer.tells_models_apart:
            choice = replace(choice, called=model_key(model))
        counted_as = router.counted_as(choice.consumer, model)
        if counted_as is None:
            return choice
        return replace(choice, model=counted_as, context=self._context(consumer))

    def _works_with(self, consumer: ConsumerConfig) -> str | None:
        """The model that its consumer has to have loaded for it. Where that cannot be told, the
        consumer decides what it makes of the request."""
        if consumer.request_model is not None and (said := self._said) is not None:
            found = expressions.search(consumer.request_model, said)
            return found if isinstance(found, str) and 0 < len(found) <= LONGEST_NAME else None
        try:
            return self.model()
        except BadRequest:
            return None

    def _context(self, consumer: ConsumerConfig) -> int | None:
        if consumer.request_context is None:
            return None
        found = expressions.search(consumer.request_context, self._said)
        if isinstance(found, bool) or not isinstance(found, int):
            return None
        return found if 0 < found <= LONGEST_CONTEXT else None

    @cached_property
    def _said(self) -> object:
        return read_json(self._inbound)

    def model(self) -> str | None:
        if self._field is None:
            try:
                self._field = find_model(self._inbound)
            except BadRequest:
                if self._strict:
                    raise
                self._field = ModelField(None)
        return self._field.model

    def served_as(self, name: str | None) -> Inbound:
        """The request, with another name for its model if there is one."""
        if name is None or self._field is None or name == self._field.model:
            return self._inbound
        return with_model(self._inbound, self._field, name)
