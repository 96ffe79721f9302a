"""The servers that setup knows by their own answers, and who of them answers at a port."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from http import HTTPStatus
from importlib.resources import files
from typing import Any

import yaml

from gpumanager.config import expressions
from gpumanager.setup import DEMO_ROOT
from gpumanager.setup.asking import Asker, NoAnswer
from gpumanager.setup.brokers import RunningBroker, identified

MOST_FAILURES = 3
"""Paths that may stay without an answer, before a server is given up: one that asks the internet
for its list of models takes long there, and is known by another path."""

NOWHERE = "/no-server-has-this-path"
"""What says so little that it answers this, too, is not known by it."""

_TITLE = re.compile(rb"<title[^>]*>\s*([^<]{1,80}?)\s*</title>", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Service:
    """A kind of server that setup knows; see services.yaml."""

    service: str
    kind: str
    port: int
    ask: str
    text: str | None = None
    expr: str | None = None
    resident_mib: str | None = None
    preset: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    also: Mapping[str, str] | None = None
    older: Mapping[str, Any] | None = None
    job: Mapping[str, Any] | None = None
    moves: Mapping[str, str] = field(default_factory=dict)

    def agrees(self, answer: bytes) -> bool:
        """Whether what was answered to `also` is one's of this kind."""
        return bool(_search((self.also or {}).get("expr"), answer))

    def is_it(self, answer: bytes) -> bool:
        """Whether what was answered to `ask` is one's of this kind."""
        if self.text is not None:
            return re.search(self.text, answer.decode(errors="replace")) is not None
        return bool(_search(self.expr, answer))

    def reported_mib(self, answer: bytes) -> int | None:
        """What it says in its answer that it holds, where `resident_mib` tells how to see it."""
        found = _search(self.resident_mib, answer)
        return int(found) if isinstance(found, int | float) else None


def _search(expression: str | None, answer: bytes) -> Any:
    """A JMESPath expression's value for an answer; None without either, or if that is no JSON."""
    try:
        return expressions.search(expression, json.loads(answer.decode(errors="replace")))
    except (ValueError, RecursionError):
        return None


@cache
def known_services() -> tuple[Service, ...]:
    """All of services.yaml, in its order."""
    rows = yaml.safe_load(files("gpumanager.setup").joinpath("services.yaml").read_text("utf-8"))
    return tuple(Service(**row) for row in rows)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who answers at a port: at most one of a known server, a broker, a demo's speech service; or
    else somebody with `speaks_http`. `reported_mib` is what a server says it holds, if it does;
    `hint` what else it says of itself."""

    service: Service | None = None
    reported_mib: int | None = None
    broker: RunningBroker | None = None
    is_demo: bool = False
    speaks_http: bool = False
    hint: str = ""


def identify(url: str, port: int) -> Identity:
    """Who answers at `url`, whose port is `port`; every path is asked once at most."""
    with Asker(url) as asker:
        answers, root = _Answers(asker), b""
        try:
            status, root = answers.ask("/")
        except NoAnswer as error:
            if error.in_time:
                return Identity()
        else:
            if (broker := identified(url, port, status, root, None)) is not None:
                return Identity(broker=broker)
            if root.startswith(DEMO_ROOT.encode()):
                return Identity(is_demo=True)
        for service in known_services():
            if answers.failures >= MOST_FAILURES:
                break
            answer = answers.good(service.ask)
            if answer is None or not service.is_it(answer) or answers.are_anything(service):
                continue
            if service.also is None or answers.agree(service):
                return Identity(service, service.reported_mib(answer))
            if service.older is not None:
                older = replace(service, config={**service.config, **service.older})
                return Identity(older, service.reported_mib(answer))
        if answers.failures >= MOST_FAILURES and not root:
            return Identity()
        title = _TITLE.search(root)
        hint = title[1].decode(errors="replace") if title else asker.server
        return Identity(speaks_http=True, hint=" ".join(hint.split()))


class _Answers:
    """What one server answers."""

    def __init__(self, asker: Asker) -> None:
        self.failures = 0
        self._asker = asker
        self._seen: dict[str, tuple[int, bytes] | NoAnswer] = {}

    def ask(self, path: str) -> tuple[int, bytes]:
        """The status and the body at a path. Raises NoAnswer."""
        if path not in self._seen:
            try:
                self._seen[path] = self._asker.get(path)
            except NoAnswer as error:
                self._seen[path] = error
                self.failures += 1
        answer = self._seen[path]
        if isinstance(answer, NoAnswer):
            raise answer
        return answer

    def good(self, path: str) -> bytes | None:
        """The answer at a path, if it is a 200."""
        with suppress(NoAnswer):
            status, body = self.ask(path)
            return body if status == HTTPStatus.OK else None
        return None

    def agree(self, service: Service) -> bool:
        """Whether what looks like the service at one path does so at its second."""
        second = self.good((service.also or {})["ask"])
        return second is not None and service.agrees(second)

    def are_anything(self, service: Service) -> bool:
        """Whether what looks like the service does so at a path that it does not have."""
        anything = None if service.ask == "/" else self.good(NOWHERE)
        return anything is not None and service.is_it(anything)
