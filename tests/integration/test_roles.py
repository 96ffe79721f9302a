"""What a key may do by its role, against a real broker."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import requests

from gpumanager.config import parse_config
from gpumanager.keys import ApiKey
from gpumanager.serving import prepare
from gpumanager.web import server
from tests.support.broker import LiveBroker, config_for, live_broker
from tests.support.sockets import ScriptedConsumer
from tests.support.threads import Outcome

KEYS = [
    ApiKey("alice", "alice-has-a-long-key", role="client"),
    ApiKey("bob", "bob-has-a-long-key-too", role="client"),
    ApiKey("root", "root-has-a-long-key-too", role="admin"),
    ApiKey("old", "old-has-a-key-from-before", role=None),
]
AS = {key.name: {"X-Api-Key": key.secret} for key in KEYS}


@pytest.fixture
def broker(held_consumer: ScriptedConsumer) -> Iterator[LiveBroker]:
    consumer = {"load": "/load", "unload": "/unload"}
    with live_broker(config_for(held_consumer.url, consumer=consumer), keys=KEYS) as running:
        yield running


@pytest.fixture
def jobs(broker: LiveBroker, release: threading.Event) -> Iterator[list[Outcome[Any]]]:
    """Alice's job runs, bob's waits behind it."""
    outcomes = []
    for count, name in enumerate(("alice", "bob"), start=1):
        headers = {**AS[name], "X-Request-Id": f"of-{name}"}
        outcomes.append(Outcome(partial(broker.post, "/v1/tts", headers=headers)))
        broker.await_line(count)
    yield outcomes
    release.set()
    for outcome in outcomes:
        outcome.result()


def call(broker: LiveBroker, name: str, method: str, path: str) -> requests.Response:
    return requests.request(method, broker.url + path, headers=AS[name], timeout=10)


def tickets(broker: LiveBroker) -> list[int]:
    return [entry.ticket for entry in broker.broker.card.scheduler.queue()]


OPERATIONS = [
    ("POST", "/v1/consumers/mvoice/load"),
    ("POST", "/v1/consumers/mvoice/unload"),
    ("POST", "/v1/consumers/nobody/unload"),
    ("POST", "/v1/reload"),
    ("POST", "/v1/drain"),
]


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_a_client_may_not_operate(
    broker: LiveBroker, held_consumer: ScriptedConsumer, method: str, path: str
) -> None:
    refused = call(broker, "alice", method, path)
    assert refused.status_code == 403
    assert refused.json() == {
        "error": "forbidden",
        "message": "key 'alice' has the role client, which may run jobs and cancel its own; "
        "this wants a key with the role admin",
        "retryable": False,
    }
    assert held_consumer.requests == []


@pytest.mark.parametrize("name", ["root", "old"])
def test_an_admin_and_a_key_from_before_there_were_roles_may(
    broker: LiveBroker, release: threading.Event, name: str
) -> None:
    release.set()
    assert call(broker, name, "POST", "/v1/consumers/mvoice/load").status_code == 200
    assert call(broker, name, "POST", "/v1/consumers/mvoice/unload").status_code == 200
    # It gets as far as what is wrong with the request itself.
    assert call(broker, name, "POST", "/v1/reload").json()["error"] == "bad_request"
    assert call(broker, name, "POST", "/v1/drain").json()["error"] == "bad_request"


def test_a_route_that_changes_something_is_an_admins_unless_it_says_otherwise(
    broker: LiveBroker,
) -> None:
    """One that is added later must not be open to clients by oversight."""
    safe = {"GET", "HEAD", "OPTIONS"}
    for_clients = {"cancel", "cancel_job", "show"}
    for rule in broker.broker.flask.url_map.iter_rules():
        for method in set(rule.methods or ()) - safe:
            if rule.endpoint not in for_clients:
                path = rule.rule.replace("<name>", "mvoice")
                assert call(broker, "alice", method, path).status_code == 403, path


def test_a_client_sees_its_own_jobs_whole_and_of_others_not_who(
    broker: LiveBroker, jobs: list[Outcome[Any]]
) -> None:
    for path in ("/v1/queue", "/v1/status"):
        seen = {name: call(broker, name, "GET", path).json()["queue"] for name in AS}
        own = [(entry["client"], entry["request_id"]) for entry in seen["alice"]]
        assert own[0][0] != "-"
        assert own[0][1] == "of-alice"
        assert own[1] == ("-", "-")
        assert [entry["request_id"] for entry in seen["bob"]] == ["-", "of-bob"]
        assert [entry["request_id"] for entry in seen["root"]] == ["of-alice", "of-bob"]
        assert [entry["request_id"] for entry in seen["old"]] == ["of-alice", "of-bob"]
        assert {entry["state"] for entry in seen["alice"]} == {"running", "waiting"}


def test_a_client_cancels_its_own_only(broker: LiveBroker, jobs: list[Outcome[Any]]) -> None:
    first, second = tickets(broker)
    refused = call(broker, "alice", "DELETE", f"/v1/queue/{second}")
    assert refused.status_code == 403
    assert f"ticket {second} is not a job of key 'alice'" in refused.json()["message"]
    assert call(broker, "alice", "DELETE", "/v1/queue/999").status_code == 404
    assert tickets(broker) == [first, second]

    assert call(broker, "bob", "DELETE", f"/v1/queue/{second}").status_code == 200
    gone = jobs[1].result()
    assert (gone.status_code, gone.json()["error"]) == (503, "cancelled")
    assert "its own client cancelled" in gone.json()["message"]
    assert call(broker, "root", "DELETE", f"/v1/queue/{first}").status_code == 200
    assert "the operator cancelled" in jobs[0].result().json()["message"]


def test_events_and_the_trace_do_not_tell_a_client_who_others_are(
    broker: LiveBroker, jobs: list[Outcome[Any]], release: threading.Event
) -> None:
    release.set()
    for outcome in jobs:
        assert outcome.result().status_code == 200
    broker.await_idle()
    for path in ("/v1/events", "/v1/trace"):
        own, all_of_them = (call(broker, name, "GET", path).text for name in ("alice", "root"))
        assert "of-alice" in own
        assert "bob" not in own
        assert "of-alice" in all_of_them
        assert "of-bob" in all_of_them
    events = call(broker, "alice", "GET", "/v1/events").json()["events"]
    of_others = [e for e in events if e["event"] == "job" and "request_id" not in e]
    assert [set(e) & {"client", "key", "path"} for e in of_others] == [set()]
    assert of_others[0]["run_ms"] > 0


def test_the_description_says_what_wants_an_admin(broker: LiveBroker) -> None:
    paths = call(broker, "alice", "GET", "/openapi.json").json()["paths"]
    admin = [{"bearer": ["admin"]}, {"header": ["admin"]}]
    wants = {
        path for path, item in paths.items() for op in item.values() if op.get("security") == admin
    }
    assert wants == {
        "/v1/consumers/{consumer}/learned",
        "/v1/consumers/{consumer}/load",
        "/v1/consumers/{consumer}/pin",
        "/v1/consumers/{consumer}/unload",
        "/v1/drain",
        "/v1/reload",
        "/api/pull",
        "/api/push",
        "/api/create",
        "/api/copy",
        "/api/delete",
        "/api/blobs/{digest}",
    }


def test_the_start_names_keys_without_a_role(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "0123456789abcdef"
    monkeypatch.setenv(
        "GPUMANAGER_API_KEYS", f"a {secret}a; b {secret}b role=client; c {secret}c max_queued=1"
    )
    monkeypatch.setattr(server, "set_defaults", lambda config: None)
    monkeypatch.setattr("gpumanager.telemetry.logs.configure", lambda settings: None)
    monkeypatch.setattr("gpumanager.lifecycle.Lifecycle.install_signal_handlers", lambda *_: None)
    prepare(parse_config("{}")).stop()
    (said,) = [r for r in caplog.records if r.message == "keys without a role are admins"]
    assert getattr(said, "keys") == "a c"  # noqa: B009  # an extra, unknown to mypy
    assert secret not in caplog.text
