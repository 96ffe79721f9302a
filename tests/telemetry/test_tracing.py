"""OpenTelemetry spans of jobs: made of events, and sent to where the environment says."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from gpumanager.telemetry import tracing
from tests.support.broker import live_broker
from tests.support.events import AT, evicted, job, recorded
from tests.support.sockets import ScriptedConsumer, answer

sdk = pytest.importorskip("opentelemetry.sdk.trace")
export = pytest.importorskip("opentelemetry.sdk.trace.export")
memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
proto = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def spans() -> Iterator[tuple[tracing.Tracing, Any]]:
    exporter = memory.InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    tracer = tracing.Tracing(provider)
    yield tracer, exporter
    tracer.close()


def test_a_jobs_spans_hang_together(spans: tuple[tracing.Tracing, Any]) -> None:
    tracer, exporter = spans
    tracer.take_note(recorded(job(traceparent=f"00-{TRACE}-{PARENT}-01")))
    waited, prepare, run, whole = exporter.get_finished_spans()
    assert (waited.name, prepare.name, run.name) == ("queue", "prepare", "run")
    assert whole.name == "voice tts"
    assert f"{whole.context.trace_id:032x}" == TRACE
    assert f"{whole.parent.span_id:016x}" == PARENT
    assert {each.parent.span_id for each in (waited, prepare, run)} == {whole.context.span_id}
    assert run.end_time == whole.end_time == int(AT.timestamp() * 1e9)
    assert waited.start_time == whole.start_time
    lasted = [each.end_time - each.start_time for each in (waited, prepare, run, whole)]
    assert [ns // 1_000_000 for ns in lasted] == [1500, 250, 2000, 3750]
    assert whole.attributes["gpumanager.consumer"] == "voice"
    assert whole.attributes["http.response.status_code"] == 200
    assert whole.status.is_unset


def test_a_failed_job_is_marked_and_needs_no_parent(spans: tuple[tracing.Tracing, Any]) -> None:
    tracer, exporter = spans
    tracer.take_note(recorded(job(failure="consumer_timeout")))
    tracer.take_note(recorded(evicted()))
    whole = exporter.get_finished_spans()[-1]
    assert len(exporter.get_finished_spans()) == 4
    assert whole.parent is None
    assert not whole.status.is_ok
    assert whole.status.description == "consumer_timeout"


@pytest.mark.parametrize(
    "environ", [{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://h:1", "OTEL_SDK_DISABLED": "true"}]
)
def test_it_is_off_unless_asked_for(environ: dict[str, str]) -> None:
    assert tracing.from_environment(environ, "1") is None


def test_a_missing_extra_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with caplog.at_level(logging.WARNING):
        environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
        assert tracing.from_environment(environ, "1") is None
    (record,) = caplog.records
    assert "mgpumanager[otel]" in vars(record)["reason"]


def test_spans_reach_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            sent.append(proto.ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever, name="collector", daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "my-broker")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    try:
        with (
            ScriptedConsumer(lambda peer, _: peer.send(answer())) as consumer,
            live_broker(
                f"""
                routing: {{tts: it}}
                consumers: {{it: {{url: "{consumer.url}", paths: {{tts: /}}}}}}
                """
            ) as broker,
        ):
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            assert broker.post("/v1/tts", json={}, headers=headers).status_code == 200
            broker.await_idle()
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
    (resource,) = [each for request in sent for each in request.resource_spans]
    about = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert about["service.name"] == "my-broker"
    names = [span.name for scope in resource.scope_spans for span in scope.spans]
    assert sorted(names) == ["it tts", "prepare", "queue", "run"]
    assert {span.trace_id.hex() for scope in resource.scope_spans for span in scope.spans} == {
        TRACE
    }
