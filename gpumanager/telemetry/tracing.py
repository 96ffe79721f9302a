"""OpenTelemetry spans of jobs, an extra: `pip install 'mgpumanager[otel]'`.

It is switched on, pointed and tuned by OpenTelemetry's own environment variables: there is nothing
to configure twice. A job's span is a child of the client's, if it sent a `traceparent`; the header
itself goes on to the consumer unchanged.

Source: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/ and, for
`traceparent`, https://www.w3.org/TR/trace-context/.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from gpumanager.telemetry.eventlog import Recorded
from gpumanager.telemetry.events import JobEnded

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
FLUSH_MS = 2000
_PHASES = ("queue", "prepare", "run")


class Tracing:
    """Makes the spans of a job when it is over; the SDK sends them, from a thread of its own.

    A listener of the events: `take_note`. Its `provider` says where they go.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("gpumanager")
        self._propagator = TraceContextTextMapPropagator()

    def take_note(self, recorded: Recorded) -> None:
        """Make the spans, if a job is over: the whole, its time in the queue, until room was made,
        and on the GPU."""
        job = recorded.event
        if not isinstance(job, JobEnded):
            return
        from opentelemetry import trace

        end = int(recorded.at.timestamp() * 1e9)
        lasted = [int(ms * 1e6) for ms in (job.wait_ms, job.prepare_ms, job.run_ms)]
        carrier = {} if job.traceparent is None else {"traceparent": job.traceparent}
        begin = end - sum(lasted)
        whole = self._tracer.start_span(
            f"{job.consumer} {job.kind}",
            context=self._propagator.extract(carrier),
            kind=trace.SpanKind.SERVER,
            attributes=_attributes(job),
            start_time=begin,
        )
        within = trace.set_span_in_context(whole)
        for phase, took in zip(_PHASES, lasted, strict=True):
            self._tracer.start_span(phase, context=within, start_time=begin).end(begin + took)
            begin += took
        if job.failure is not None or (job.status or 0) >= 500:
            whole.set_status(trace.StatusCode.ERROR, job.failure)
        whole.end(end)

    def close(self) -> None:
        """Send what was not sent, for at most FLUSH_MS, and end the SDK's thread."""
        self._provider.force_flush(FLUSH_MS)
        self._provider.shutdown()


def _attributes(job: JobEnded) -> dict[str, str | int]:
    named: dict[str, str | int | None] = {
        "gpumanager.consumer": job.consumer,
        "gpumanager.kind": job.kind,
        "gpumanager.ticket": job.ticket,
        "gpumanager.request_id": job.request_id,
        "http.response.status_code": job.status,
        "error.type": job.failure,
    }
    return {name: value for name, value in named.items() if value is not None}


def from_environment(environ: Mapping[str, str], version: str) -> Tracing | None:
    """Tracing, if the environment names an endpoint, and the extra is installed; else None."""
    if not any(environ.get(name) for name in ENDPOINTS):
        return None
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.warning(
            "no traces",
            extra={"reason": f"{error}; pip install 'mgpumanager[otel]'"},
        )
        return None
    about = {"service.version": version}
    named = environ.get("OTEL_SERVICE_NAME") or "service.name=" in environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    if not named:  # what is given here would win over the environment
        about["service.name"] = "gpumanager"
    resource = Resource.create(about)
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)
