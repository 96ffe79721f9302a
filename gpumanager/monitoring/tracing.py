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

from gpumanager.events import Event

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
FLUSH_MS = 2000
_PHASES = ("line", "prepare", "run")


class Tracing:
    """Makes the spans of a job when it is over; the SDK sends them, from a thread of its own.

    A listener of the events: `take_note`. Its `provider` says where they go.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("gpumanager")
        self._propagator = TraceContextTextMapPropagator()

    def take_note(self, event: Event) -> None:
        """Make the spans, if a job is over: the whole, its time in line, until room was made,
        and on the GPU."""
        if event.name != "job":
            return
        from opentelemetry import trace

        fields = event.fields
        end = int(event.at.timestamp() * 1e9)
        lasted = [int(fields[name] * 1e6) for name in ("wait_ms", "prepare_ms", "run_ms")]
        carrier = {"traceparent": fields["traceparent"]} if "traceparent" in fields else {}
        begin = end - sum(lasted)
        whole = self._tracer.start_span(
            f"{fields['consumer']} {fields['kind']}",
            context=self._propagator.extract(carrier),
            kind=trace.SpanKind.SERVER,
            attributes=_attributes(fields),
            start_time=begin,
        )
        within = trace.set_span_in_context(whole)
        for phase, took in zip(_PHASES, lasted, strict=True):
            self._tracer.start_span(phase, context=within, start_time=begin).end(begin + took)
            begin += took
        if "failure" in fields or fields.get("status", 0) >= 500:
            whole.set_status(trace.StatusCode.ERROR, fields.get("failure"))
        whole.end(end)

    def close(self) -> None:
        """Send what was not sent, for at most FLUSH_MS, and end the SDK's thread."""
        self._provider.force_flush(FLUSH_MS)
        self._provider.shutdown()


def _attributes(fields: Mapping[str, object]) -> dict[str, str | int | float]:
    named = {
        "gpumanager.consumer": fields.get("consumer"),
        "gpumanager.kind": fields.get("kind"),
        "gpumanager.ticket": fields.get("ticket"),
        "gpumanager.request_id": fields.get("request_id"),
        "http.response.status_code": fields.get("status"),
        "error.type": fields.get("failure"),
    }
    return {name: value for name, value in named.items() if isinstance(value, str | int | float)}


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
