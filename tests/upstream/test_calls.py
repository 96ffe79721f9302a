"""The broker's own calls, with mocked consumers: what is believed, accepted, refused."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import responses
import yaml

from gpumanager.config import Lost, parse_config
from gpumanager.errors import BrokerError, ConsumerTimeout, ConsumerUnreachable
from gpumanager.model import ProbeReport
from tests.support.calls import CallsOf

URL = "http://127.0.0.1:8766"


@pytest.fixture
def mocked() -> Iterator[responses.RequestsMock]:
    with responses.RequestsMock() as mock:
        yield mock


def calls(**consumer: Any) -> CallsOf:
    config = {"consumers": {"mvoice": {"url": URL, **consumer}}}
    return CallsOf(parse_config(yaml.safe_dump(config)))


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
    assert calls(**OLLAMA).probe("mvoice") == ProbeReport(
        True, 5632, items=("llama3:8b", "qwen:0.5b")
    )


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


def test_a_model_that_cannot_be_unloaded_does_not_keep_the_others(
    mocked: responses.RequestsMock, caplog: pytest.LogCaptureFixture
) -> None:
    mocked.get(f"{URL}/api/ps", json=TWO_MODELS)
    missing = {"error": "model 'llama3:8b' not found"}  # it was deleted
    mocked.post(f"{URL}/api/generate", status=404, json=missing)
    mocked.post(f"{URL}/api/generate", json={"done_reason": "unload"})
    calls(**OLLAMA).unload("mvoice")
    assert len(mocked.calls) == 3
    (said,) = [vars(each) for each in caplog.records if each.message == "model not unloaded"]
    assert (said["model"], said["consumer"]) == ("llama3:8b", "mvoice")


def test_if_no_model_can_be_unloaded_that_is_a_failure(mocked: responses.RequestsMock) -> None:
    mocked.get(f"{URL}/api/ps", json=TWO_MODELS)
    mocked.post(f"{URL}/api/generate", status=404)
    with pytest.raises(ConsumerUnreachable, match="answered 404 to POST /api/generate"):
        calls(**OLLAMA).unload("mvoice")
    assert len(mocked.calls) == 3


def test_a_server_that_is_gone_is_not_asked_for_each(mocked: responses.RequestsMock) -> None:
    mocked.get(f"{URL}/api/ps", json=TWO_MODELS)
    refused = requests.exceptions.ConnectionError(ConnectionRefusedError(111, "refused"))
    mocked.post(f"{URL}/api/generate", body=refused)
    with pytest.raises(ConsumerUnreachable):
        calls(**OLLAMA).unload("mvoice")
    assert len(mocked.calls) == 2


# -- the wider vocabulary ------------------------------------------------------------------------

BUSY = {"path": "/p", "busy": {"path": "/progress", "expr": "jobs > `0`"}}


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpumanager.upstream.calls.BUSY_POLL_S", 0.01)


def test_a_refusal_for_being_busy_is_tried_again(
    mocked: responses.RequestsMock, hasty: None
) -> None:
    for status in (409, 409, 200):
        mocked.post(f"{URL}/unload", status=status)
    calls(unload={"path": "/unload", "when_busy": "refuses"}).unload("mvoice")
    assert len(mocked.calls) == 3


def test_a_server_that_is_gone_is_not_asked_again(mocked: responses.RequestsMock) -> None:
    refused = requests.exceptions.ConnectionError(ConnectionRefusedError(111, "refused"))
    mocked.post(f"{URL}/unload", body=refused)
    with pytest.raises(ConsumerUnreachable):
        calls(unload={"path": "/unload", "when_busy": "refuses"}).unload("mvoice")
    assert len(mocked.calls) == 1


def test_a_status_may_say_that_nothing_is_loaded(mocked: responses.RequestsMock) -> None:
    mocked.get(f"{URL}/model", status=503)
    probing = calls(probe={"path": "/model", "loaded": "id != null", "absent": [503]})
    assert probing.probe("mvoice") == ProbeReport(loaded=False)


@pytest.mark.parametrize(("answer", "good"), [('{"ok": true}', True), ("{}", False), ("", False)])
def test_an_answer_may_have_to_say_yes(
    mocked: responses.RequestsMock, answer: str, good: bool
) -> None:
    mocked.post(f"{URL}/load", body=answer)
    loading = calls(load={"path": "/load", "expect": "ok"})
    if good:
        loading.load("mvoice")
        return
    with pytest.raises(ConsumerUnreachable, match="did not say 'ok' to POST /load"):
        loading.load("mvoice")


@pytest.mark.parametrize(
    ("answer", "status", "settled"),
    [('{"models": []}', 200, True), ('{"models": [1]}', 200, False), ("", 500, False)],
)
def test_settled_is_what_the_consumer_says(
    mocked: responses.RequestsMock, answer: str, status: int, settled: bool
) -> None:
    mocked.get(f"{URL}/ps", body=answer, status=status)
    asked = calls(settled={"path": "/ps", "until": "length(models) == `0`"})
    assert asked.settled("mvoice") is settled
    assert calls(health="/health").settled("mvoice")  # nothing to ask


def test_a_consumer_without_health_may_be_asked_by_its_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        asked = calls(health={"tcp": f"127.0.0.1:{port}"})
        assert asked.probe("mvoice") == ProbeReport()
    with pytest.raises(ConsumerUnreachable, match="does not listen on") as refused:
        asked.probe("mvoice")
    assert refused.value.nothing_listens


def test_a_port_that_does_not_answer_is_a_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", never)
    with pytest.raises(ConsumerTimeout, match=r"no connection to 127\.0\.0\.1:9"):
        calls(health={"tcp": "127.0.0.1:9"}).probe("mvoice")


def test_what_went_to_the_cpu(mocked: responses.RequestsMock) -> None:
    mocked.get(f"{URL}/ps", json={"models": [{"name": "a", "v": 1, "s": 2}, {"name": "b"}]})
    probing = calls(probe={"path": "/ps", "on_cpu": "models[?v < s].name"})
    assert probing.probe("mvoice").on_cpu == ("a",)


def test_an_unknown_list_of_jobs_leaves_them_in_work(mocked: responses.RequestsMock) -> None:
    lost = Lost.model_validate({"path": "/queue", "listed": "ids"})
    mocked.get(f"{URL}/queue", json={"error": "odd"})
    assert calls(health="/h").job_listed("mvoice", lost, "j1")


@pytest.mark.parametrize("which", ["load", "warm"])
def test_a_call_for_a_model_names_it(mocked: responses.RequestsMock, which: str) -> None:
    mocked.post(f"{URL}/m/a%2Fb")
    made = calls(model="a/b", **{which: {"path": "/m/{model}", "json": {"name": "{model}"}}})
    getattr(made, which)("mvoice")
    assert json.loads(mocked.calls[0].request.body or b"") == {"name": "a/b"}


def test_warm_needs_its_call() -> None:
    with pytest.raises(ConsumerUnreachable, match="no warm call"):
        calls().warm("mvoice")
