"""The broker's own calls, with mocked consumers: what is believed, accepted, refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import responses
import yaml

from gpumanager.clock import SystemClock
from gpumanager.config import parse_config
from gpumanager.errors import BrokerError, ConsumerTimeout, ConsumerUnreachable
from gpumanager.model import ProbeReport
from gpumanager.upstream.calls import ControlCalls
from gpumanager.watcher import Watcher

URL = "http://127.0.0.1:8766"


@pytest.fixture
def mocked() -> Iterator[responses.RequestsMock]:
    with responses.RequestsMock() as mock:
        yield mock


def calls(**consumer: Any) -> ControlCalls:
    config = {"consumers": {"mvoice": {"url": URL, **consumer}}}
    return ControlCalls(parse_config(yaml.safe_dump(config)), Watcher(), SystemClock())


@pytest.mark.parametrize(
    ("body", "report"),
    [
        ('{"loaded": true, "gpu_resident_mib": 2800}', ProbeReport(True, 2800)),
        ('{"loaded": false, "gpu_resident_mib": 0}', ProbeReport(False, 0)),
        ('{"status": "ok"}', ProbeReport()),
        ('{"loaded": "yes", "gpu_resident_mib": "many"}', ProbeReport()),
        ('{"loaded": 1, "gpu_resident_mib": true}', ProbeReport()),
        ('{"gpu_resident_mib": -1}', ProbeReport()),
        ('{"gpu_resident_mib": NaN}', ProbeReport()),
        ('{"gpu_resident_mib": 1e999}', ProbeReport()),
        ('{"gpu_resident_mib": ' + "9" * 400 + "}", ProbeReport()),
        ("[" * 200_000, ProbeReport()),
        ("[1, 2]", ProbeReport()),
        ("OK", ProbeReport()),
        ("", ProbeReport()),
    ],
)
def test_what_a_health_answer_says_is_believed(
    mocked: responses.RequestsMock, body: str, report: ProbeReport
) -> None:
    mocked.get(f"{URL}/health", body=body)
    assert calls(health="/health").probe("mvoice") == report


@pytest.mark.parametrize("status", [301, 404, 500, 503])
def test_a_health_answer_that_is_not_good_is_a_failure(
    mocked: responses.RequestsMock, status: int
) -> None:
    mocked.get(f"{URL}/health", status=status)
    with pytest.raises(ConsumerUnreachable, match=f"mvoice answered {status} to GET /health"):
        calls(health="/health").probe("mvoice")


def test_a_call_may_accept_other_answers(mocked: responses.RequestsMock) -> None:
    mocked.get(f"{URL}/health", status=503)
    accepting = calls(health={"path": "/health", "ok": [200, 503]})
    assert accepting.probe("mvoice") == ProbeReport()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (requests.exceptions.ReadTimeout(), BrokerError),
        (requests.exceptions.ConnectionError(ConnectionRefusedError(111, "refused")), None),
        (requests.exceptions.ConnectionError(TimeoutError("timed out")), ConsumerTimeout),
        (requests.exceptions.InvalidSchema("odd"), ConsumerUnreachable),
    ],
)
def test_what_requests_raises_becomes_the_brokers_error(
    mocked: responses.RequestsMock, error: Exception, expected: type[BrokerError] | None
) -> None:
    mocked.get(f"{URL}/health", body=error)
    with pytest.raises(BrokerError) as raised:
        calls(health="/health").probe("mvoice")
    if expected is None:
        assert isinstance(raised.value, ConsumerUnreachable)
        assert raised.value.nothing_listens
    else:
        assert isinstance(raised.value, expected)
    assert "8766" not in raised.value.message


def test_load_and_unload_are_made_as_declared(mocked: responses.RequestsMock) -> None:
    mocked.post(f"{URL}/api/admin/load", json={"loaded": True})
    mocked.put(f"{URL}/free", status=204)
    made = calls(
        load="/api/admin/load",
        unload={
            "method": "PUT",
            "path": "/free",
            "json": {"unload_models": True},
            "headers": {"X-Admin": "1"},
        },
    )
    made.load("mvoice")
    made.unload("mvoice")
    load, unload = (call.request for call in mocked.calls)
    assert load.body is None
    assert json.loads(unload.body or b"") == {"unload_models": True}
    assert unload.headers["Content-Type"] == "application/json"
    assert unload.headers["X-Admin"] == "1"


@pytest.mark.parametrize("which", ["load", "unload"])
def test_a_call_that_is_not_declared_cannot_be_made(which: str) -> None:
    with pytest.raises(ConsumerUnreachable, match=f"no {which} call"):
        getattr(calls(), which)("mvoice")


def test_an_unload_that_answers_badly_is_a_failure(mocked: responses.RequestsMock) -> None:
    mocked.post(f"{URL}/unload", status=500)
    with pytest.raises(ConsumerUnreachable, match="answered 500 to POST /unload"):
        calls(unload="/unload").unload("mvoice")


def test_an_answer_without_end_is_not_read_without_end(mocked: responses.RequestsMock) -> None:
    mocked.get(f"{URL}/health", body=b"x" * (5 * 1024 * 1024))
    with pytest.raises(ConsumerUnreachable, match="without end"):
        calls(health="/health").probe("mvoice")


# -- probes with expressions ---------------------------------------------------------------------

OLLAMA = {
    "health": "/api/version",
    "probe": {
        "path": "/api/ps",
        "items": "models[].name",
        "loaded": "length(models) > `0`",
        "resident": "sum(models[].size_vram)",
        "unit": "B",
    },
    "unload": {
        "for_each": "items",
        "path": "/api/generate",
        "json": {"model": "{item}", "keep_alive": 0},
    },
}
TWO_MODELS = {
    "models": [
        {"name": "llama3:8b", "size_vram": 5 * 1024**3},
        {"name": "qwen:0.5b", "size_vram": 512 * 1024**2},
    ]
}


def test_a_probes_expressions_say_what_is_resident(mocked: responses.RequestsMock) -> None:
    mocked.get(f"{URL}/api/version", json={"version": "0.33.0"})
    mocked.get(f"{URL}/api/ps", json=TWO_MODELS)
    assert calls(**OLLAMA).probe("mvoice") == ProbeReport(True, 5632)


def test_a_probe_that_fails_leaves_a_healthy_consumer_healthy(
    mocked: responses.RequestsMock,
) -> None:
    mocked.get(f"{URL}/api/version", json={"version": "0.33.0"})
    mocked.get(f"{URL}/api/ps", body=requests.exceptions.ReadTimeout())
    assert calls(**OLLAMA).probe("mvoice") == ProbeReport()


def test_without_health_the_probe_is_the_health(mocked: responses.RequestsMock) -> None:
    mocked.get(f"{URL}/api/ps", status=500)
    with pytest.raises(ConsumerUnreachable):
        calls(probe=OLLAMA["probe"]).probe("mvoice")


def test_an_answer_of_another_shape_says_nothing(mocked: responses.RequestsMock) -> None:
    mocked.get(f"{URL}/api/version", json={"version": "0.33.0"})
    mocked.get(f"{URL}/api/ps", json={"error": "odd"})
    assert calls(**OLLAMA).probe("mvoice").resident_mib is None


def test_an_unload_for_each_of_nobody_knows_what_is_a_failure(
    mocked: responses.RequestsMock,
) -> None:
    mocked.get(f"{URL}/api/ps", json={"error": "odd"})
    with pytest.raises(ConsumerUnreachable, match="what to unload: /api/ps gave no list"):
        calls(**OLLAMA).unload("mvoice")


def test_unload_is_made_for_each_item(mocked: responses.RequestsMock) -> None:
    mocked.get(f"{URL}/api/ps", json=TWO_MODELS)
    mocked.post(f"{URL}/api/generate", json={"done_reason": "unload"})
    calls(**OLLAMA).unload("mvoice")
    bodies = [json.loads(c.request.body or b"") for c in mocked.calls if c.request.method == "POST"]
    assert bodies == [
        {"model": "llama3:8b", "keep_alive": 0},
        {"model": "qwen:0.5b", "keep_alive": 0},
    ]
