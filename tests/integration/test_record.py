"""What a broker tells of what has happened: events, trace, metrics."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gpumanager.clock import SystemClock
from gpumanager.keys import ApiKey
from gpumanager.telemetry import metrics
from tests.support.broker import LiveBroker, config_for, live_broker
from tests.support.events import job
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer
from tests.support.threads import Outcome, eventually


def events(broker: LiveBroker, name: str) -> list[dict[str, Any]]:
    return [e for e in broker.get("/v1/events").json()["events"] if e["event"] == name]


def metric(broker: LiveBroker, name: str, **labels: str) -> float | None:
    text = broker.get("/metrics").text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return float(sample.value)
    return None


@pytest.fixture
def consumer() -> Any:
    with ScriptedConsumer(lambda peer, _: peer.send(answer(b"{}"))) as consumer:
        yield consumer


def test_a_job_is_an_event_a_span_and_a_count(consumer: ScriptedConsumer) -> None:
    with live_broker(config_for(consumer.url)) as broker:
        request_id = broker.post("/v1/tts", data=b"{}").headers["X-Request-Id"]
        eventually(lambda: len(events(broker, "job")) == 1)
        (event,) = events(broker, "job")
        assert event["consumer"] == "mvoice"
        assert event["kind"] == "tts"
        assert event["status"] == 200
        assert event["request_id"] == request_id
        assert "failure" not in event
        spans = [row for row in broker.get("/v1/trace").json()["traceEvents"] if row["ph"] == "X"]
        assert [row["name"] for row in spans] == ["mvoice tts", "mvoice tts"]
        assert metric(broker, "gpumanager_jobs_total", consumer="mvoice", outcome="done") == 1
        assert metric(broker, "gpumanager_job_run_seconds_count", kind="tts") == 1
        assert metric(broker, "gpumanager_grants_total") == 1


def test_a_reader_asks_for_what_is_new(consumer: ScriptedConsumer) -> None:
    with live_broker(config_for(consumer.url)) as broker:
        first = broker.get("/v1/events").json()
        broker.post("/v1/tts", data=b"{}")
        eventually(lambda: len(events(broker, "job")) == 1)
        new = broker.get(f"/v1/events?since={first['last']}").json()
        assert [each["event"] for each in new["events"]] == ["job"]
        assert new["boot"] == first["boot"]
        assert broker.get("/v1/events?limit=1").json()["last"] == 1


@pytest.mark.parametrize("query", ["since=x", "since=-1", "limit=1001", "since=" + "9" * 20])
def test_a_bad_number_is_told(consumer: ScriptedConsumer, query: str) -> None:
    with live_broker(config_for(consumer.url)) as broker:
        refused = broker.get(f"/v1/events?{query}")
        assert refused.status_code == 400
        assert "must be a number" in refused.json()["message"]


def test_refusals_are_counted_by_code_and_kept_if_they_were_for_a_consumer() -> None:
    with live_broker(config_for("http://127.0.0.1:1")) as broker:
        broker.get("/nothing")
        assert broker.post("/v1/tts", data=b"{}").status_code == 502
        eventually(lambda: len(events(broker, "job")) == 1)
        assert events(broker, "job")[0]["failure"] == "consumer_unreachable"
        assert not events(broker, "refused")
        assert metric(broker, "gpumanager_refusals_total", code="not_found") == 1


@pytest.mark.parametrize("phase", ["queue", "run", "answer"])
def test_clients_that_leave_are_counted_by_phase(phase: str) -> None:
    go_on = threading.Event()
    running = threading.Event()

    def script(peer: Connection, _: Received) -> None:
        running.set()
        if phase == "answer":
            peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nbegin")
        go_on.wait(10)
        peer.send(answer(b"{}"))

    with ScriptedConsumer(script) as consumer, live_broker(config_for(consumer.url)) as broker:
        try:
            with broker.raw() as first:
                first.request("POST", "/v1/tts", b"{}")
                assert running.wait(10)
                if phase == "queue":
                    with broker.raw() as second:
                        second.request("POST", "/v1/tts", b"{}")
                        broker.await_waiting(1)
                    broker.await_waiting(0)
                elif phase == "answer":
                    first.until(b"begin")
            eventually(lambda: metric(broker, "gpumanager_disconnects_total", phase=phase) == 1)
        finally:
            go_on.set()
        broker.await_idle()


def test_the_gauges_say_what_the_status_says() -> None:
    go_on = threading.Event()

    def script(peer: Connection, _: Received) -> None:
        go_on.wait(10)
        peer.send(answer(b"{}"))

    config = {"gpu": {"total_mib": 8000}, "consumer": {"vram_resident_mib": 3000}}
    with (
        ScriptedConsumer(script) as consumer,
        live_broker(config_for(consumer.url, **config)) as broker,
    ):
        jobs = [Outcome(lambda: broker.post("/v1/tts", data=b"{}")) for _ in range(3)]
        try:
            broker.await_waiting(2)
            assert metric(broker, "gpumanager_queue_depth", consumer="mvoice", kind="tts") == 2
            assert metric(broker, "gpumanager_jobs_running") == 1
            mib = 1024 * 1024
            held = metric(broker, "gpumanager_gpu_memory_held_bytes", holder="mvoice")
            assert held == 3000 * mib
            assert metric(broker, "gpumanager_gpu_memory_total_bytes") == 8000 * mib
            assert metric(broker, "gpumanager_consumer_healthy", consumer="mvoice") is None
            assert metric(broker, "gpumanager_longest_overtake_jobs") == 0
        finally:
            go_on.set()
        for job in jobs:
            assert job.result().status_code == 200


def test_names_and_units_are_prometheus_own(consumer: ScriptedConsumer) -> None:
    """The rules of `promtool check metrics`, as far as they can be seen in the text."""
    with live_broker(config_for(consumer.url)) as broker:
        broker.post("/v1/tts", data=b"{}")
        text = broker.get("/metrics").text
    ours = [f for f in text_string_to_metric_families(text) if f.name.startswith("gpumanager_")]
    assert len(ours) > 20
    for family in ours:
        assert family.documentation.endswith("."), family.name
        assert family.type in ("counter", "gauge", "histogram", "info"), family.name
        words = family.name.split("_")
        assert not {"ms", "milliseconds", "mib", "mb", "kb", "gauge", "counter"} & set(words)
        assert ("seconds" in words) <= (words[-1] == "seconds"), family.name
        assert ("bytes" in words) <= (words[-1] == "bytes"), family.name
        for sample in family.samples:
            assert len(sample.labels) <= 3
            if family.type == "counter":
                assert sample.name.endswith(("_total", "_created")), sample.name


KEYS = [
    ApiKey("alice", "alice-has-a-long-key", role="client"),
    ApiKey("root", "root-has-a-long-key-too", role="admin"),
]
AS = {key.name: {"X-Api-Key": key.secret} for key in KEYS}


def test_where_keys_are_in_use_the_client_is_the_keys_name(
    held_consumer: ScriptedConsumer, release: threading.Event
) -> None:
    with live_broker(config_for(held_consumer.url), keys=KEYS) as broker:
        jobs = []
        for count, name in enumerate(("alice", "root"), start=1):
            headers = AS[name]
            post = partial(broker.post, "/v1/tts", data=b"{}", headers=headers)
            jobs.append(Outcome(post))
            broker.await_line(count)
        for path in ("/v1/queue", "/v1/status"):
            line = broker.get(path, headers=AS["root"]).json()["queue"]
            assert [entry["client"] for entry in line] == ["alice", "root"]

        def count_of(name: str, client: str, whose: str = "root") -> float | None:
            text = broker.get("/metrics", headers=AS[whose]).text
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    if sample.name == name and sample.labels.get("client") == client:
                        return float(sample.value)
            return None

        assert count_of("gpumanager_client_queue_depth", "root") == 1
        release.set()
        for job in jobs:
            job.result()
        broker.await_idle()
        assert count_of("gpumanager_client_queue_depth", "root") == 0
        for name in AS:
            assert count_of("gpumanager_client_jobs_total", name) == 1
            assert (count_of("gpumanager_client_run_seconds_total", name) or 0) > 0
            # A client's key does not tell who else there is.
            assert count_of("gpumanager_client_jobs_total", name, "alice") is None
        found = broker.get("/v1/events", headers=AS["root"]).json()["events"]
        ended = [each for each in found if each["event"] == "job"]
        assert [(e["client"], e["address"]) for e in ended] == [
            ("alice", "127.0.0.1"),
            ("root", "127.0.0.1"),
        ]


def test_without_keys_addresses_are_no_labels(consumer: ScriptedConsumer) -> None:
    with live_broker(config_for(consumer.url)) as broker:
        broker.post("/v1/tts", data=b"{}")
        eventually(lambda: events(broker, "job"))
        assert events(broker, "job")[0]["client"] == "127.0.0.1"
        text = broker.get("/metrics").text
    assert "gpumanager_client_" not in text
    assert "127.0.0.1" not in text


def test_clients_have_only_so_many_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MOST_CLIENTS", 2)
    clients = metrics.Clients(lambda: {"queue": []})
    for name in ("a", "b", "c", "d", "a"):
        clients.had_the_gpu(job(client=name, run_ms=500.0))
    text = generate_latest(clients.registry).decode()
    found = {
        sample.labels["client"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "gpumanager_client_jobs_total"
    }
    assert found == {"a": 2, "b": 1, "(others)": 2}


def test_what_is_polled_is_logged_at_debug_unless_it_fails(
    consumer: ScriptedConsumer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "gpumanager.access")
    paths = ["/healthz", "/metrics", "/v1/status", "/v1/queue", "/v1/events", "/v1/history"]
    with live_broker(config_for(consumer.url)) as broker:
        for path in (*paths, "/v1/plan/tts", "/v1/events?since=x", "/nowhere"):
            broker.get(path)
        broker.post("/v1/tts", data=b"{}")
        eventually(lambda: len([r for r in caplog.records if r.name == "gpumanager.access"]) == 10)
    said = {
        (vars(r)["path"], vars(r)["status"]): r.levelname
        for r in caplog.records
        if r.name == "gpumanager.access"
    }
    assert said == {
        **{(path, 200): "DEBUG" for path in paths},
        ("/v1/plan/tts", 200): "INFO",
        ("/v1/events", 400): "INFO",
        ("/nowhere", 404): "INFO",
        ("/v1/tts", 200): "INFO",
    }


def test_trace_context_goes_through(consumer: ScriptedConsumer) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with live_broker(config_for(consumer.url)) as broker:
        headers = {"traceparent": parent, "tracestate": "a=1"}
        broker.post("/v1/tts", data=b"{}", headers=headers)
    assert consumer.requests[0].header("traceparent") == parent
    assert consumer.requests[0].header("tracestate") == "a=1"


def test_ending_the_broker_takes_its_boot_id(consumer: ScriptedConsumer) -> None:
    with live_broker(config_for(consumer.url)) as broker:
        ended = threading.Event()
        broker.broker.lifecycle.end = ended.set  # type: ignore[method-assign]
        refused = broker.post("/v1/drain?boot=other")
        assert refused.status_code == 400
        assert not ended.is_set()
        boot = broker.get("/v1/events").json()["boot"]
        assert broker.post(f"/v1/drain?boot={boot}").status_code == 202
        assert ended.is_set()


def test_the_clock_of_events_is_the_walls(consumer: ScriptedConsumer) -> None:
    with live_broker(config_for(consumer.url)) as broker:
        event = broker.get("/v1/events").json()["events"][0]
    assert event["event"] == "started"
    assert event["time"][:10] == SystemClock().now().date().isoformat()
