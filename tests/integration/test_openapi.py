"""The description is true: schemathesis sends what it allows, and what it does not, to a live
broker, and holds every answer against it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis import checks as standard

from gpumanager.config import Config, parse_config
from gpumanager.errors import BrokerError
from gpumanager.web import dashboard
from gpumanager.web.openapi import describe
from tests.support.broker import LiveBroker, config_for, live_broker
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer

EXAMPLES = int(os.environ.get("OPENAPI_EXAMPLES", "25"))
"""Per operation; more of them for a long hunt."""

CHECKS = [
    standard.status_code_conformance,
    standard.content_type_conformance,
    standard.response_schema_conformance,
    standard.unsupported_method,
]


def consumer_says(connection: Connection, received: Received) -> None:
    status = "404 Not Found" if b"/audio/" in received.line else "200 OK"
    connection.send(answer(b'{"mine": true}', status))


@pytest.fixture(scope="module")
def broker() -> Iterator[LiveBroker]:
    with (
        ScriptedConsumer(consumer_says) as consumer,
        live_broker(config_for(consumer.url)) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def described(broker: LiveBroker) -> Any:
    return schemathesis.openapi.from_url(f"{broker.url}/openapi.json")


OPERATIONS = sorted(
    (method.upper(), path)
    for path, methods in describe(Config(), "0", keys=False)["paths"].items()
    for method in methods
)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        *((method, path, GenerationMode.POSITIVE) for method, path in OPERATIONS),
        # The one operation with something it does not allow.
        ("DELETE", "/v1/queue/{ticket}", GenerationMode.NEGATIVE),
    ],
)
def test_every_answer_is_described(
    described: Any, method: str, path: str, mode: GenerationMode
) -> None:
    operation = described[path][method]

    @settings(
        max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        response = case.call()
        assert response.status_code != 500
        case.validate_response(response, checks=CHECKS)

    run()


def test_it_leaves_nothing_behind(broker: LiveBroker) -> None:
    broker.await_idle()


def test_every_error_there_is_is_described(broker: LiveBroker) -> None:
    text = broker.get("/openapi.json").text
    for error in BrokerError.__subclasses__():
        if error.status not in (405, 499):  # every other method; nobody reads a 499
            assert f"`{error.code}`" in text


def test_the_operators_own_kinds_are_described() -> None:
    text = 'routing: {video: a, rerank: a}\nconsumers: {a: {url: "http://127.0.0.1:1"}}'
    paths = describe(parse_config(text), "1", keys=False)["paths"]
    assert paths["/v1/video"]["post"]["summary"] == "Run a job of the kind video"
    assert (
        paths["/v1/video"]["post"]["responses"].keys()
        == paths["/v1/tts"]["post"]["responses"].keys()
    )
    assert paths["/v1/rerank"]["post"]["summary"] == "Rank documents again"


def test_every_route_there_is_is_described(broker: LiveBroker) -> None:
    served = {
        (method, re.sub("<[^>]+>", "{}", rule.rule))
        for rule in broker.broker.flask.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        if not rule.rule.startswith(dashboard.PREFIX)
    }
    served |= {("POST", path) for path in broker.broker.ways.views}
    served |= {(method, "/consumers/{}/{}") for method in ("GET", "POST")}
    assert served == {(method, re.sub("{[^}]+}", "{}", path)) for method, path in OPERATIONS}
