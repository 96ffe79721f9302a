"""`GET /metrics`, in Prometheus' text format: counters and histograms from the events as they
happen, gauges from what is so at the moment of the scrape."""

from __future__ import annotations

import threading
from collections import Counter as PerClient
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from gpumanager.config import Config
from gpumanager.errors import ClientGone
from gpumanager.model import Traffic
from gpumanager.telemetry.eventlog import Recorded
from gpumanager.telemetry.events import (
    CallbackSent,
    Event,
    Evicted,
    JobEnded,
    Loaded,
    OutOfMemory,
    OutOfMemoryHealed,
    Refused,
    Resumed,
    Trimmed,
)
from gpumanager.telemetry.modelmetrics import MIB, Models

PENDING = 500
"""Events that may wait to be counted."""

MOST_CLIENTS = 100
OTHER_CLIENTS = "(others)"

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series of its own for the start of every other one

_SECONDS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)

Snapshot = Callable[[], Mapping[str, Any]]


class Metrics:
    """Of one broker. `snapshot` is what `/v1/status` shows; `websockets` is what those of each
    consumer amount to. `by_client`: clients have keys, whose names are the operator's own and few,
    so that they may be labels."""

    def __init__(
        self,
        config: Config,
        snapshot: Snapshot,
        websockets: Callable[[], Mapping[str, Traffic]],
        version: str,
        *,
        by_client: bool = False,
    ) -> None:
        self._lock = threading.Lock()
        self._pending: deque[Event] = deque()
        self._registry = registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        Info("gpumanager_build", "The broker's version.", registry=registry).info(
            {"version": version}
        )
        registry.register(_Now(snapshot))
        registry.register(_WebSockets(websockets))
        self._models = Models(snapshot)
        registry.register(self._models)
        job = ["consumer", "kind"]

        def counter(name: str, text: str, labels: list[str]) -> Counter:
            return Counter(f"gpumanager_{name}", text, labels, registry=registry)

        def seconds(name: str, text: str, labels: list[str]) -> Histogram:
            return Histogram(
                f"gpumanager_{name}_seconds", text, labels, registry=registry, buckets=_SECONDS
            )

        self._jobs = counter("jobs", "Jobs that had the GPU and are over.", [*job, "outcome"])
        self._waits = seconds("job_wait", "Time in the queue of jobs that got the GPU.", job)
        self._runs = seconds("job_run", "Time that jobs held the GPU.", job)
        self._refusals = counter(
            "refusals", "Requests answered with an error of the broker's own.", ["consumer", "code"]
        )
        self._evictions = counter(
            "evictions", "Consumers unloaded to make room.", ["consumer", "outcome"]
        )
        self._trims = counter(
            "trims",
            "Consumers that were asked to give back what they can while they stay loaded.",
            ["consumer", "outcome"],
        )
        self._trimmed = counter("trimmed_bytes", "What they gave back.", ["consumer"])
        self._releases = seconds(
            "release", "Time until memory that was to be released was free.", ["consumer"]
        )
        self._loads = seconds("load", "Time that loading took.", ["consumer"])
        self._out_of_memory = counter(
            "out_of_memory", "Jobs that ran out of the card's memory.", ["consumer"]
        )
        self._healed = counter(
            "out_of_memory_healed", "Of those, done in a second run.", ["consumer"]
        )
        self._disconnects = counter(
            "disconnects",
            "Clients that left: while in the queue, while their job ran, or during its answer.",
            ["consumer", "phase"],
        )
        self._callbacks = counter(
            "callbacks",
            "Attempts to tell somebody that an asynchronous job is over.",
            ["outcome"],
        )
        self._clients = Clients(snapshot) if by_client else None
        for name in config.consumers:
            self._out_of_memory.labels(name)
            self._healed.labels(name)

    def take_note(self, recorded: Recorded) -> None:
        """Have an event counted in, by the next exposition at the latest: not at once, since
        this is called while a client waits for its answer."""
        self._pending.append(recorded.event)
        if len(self._pending) >= PENDING:
            self._count()

    def exposition(self, *, whole: bool = True) -> bytes:
        """The text; not `whole`: without what tells of single clients."""
        self._count()
        text = generate_latest(self._registry)
        if whole and self._clients is not None:
            text += generate_latest(self._clients.registry)
        return text

    def _count(self) -> None:
        with self._lock:
            while self._pending:
                self._take(self._pending.popleft())

    def _take(self, event: Event) -> None:
        self._models.take(event)
        match event:
            case JobEnded():
                self._take_job(event)
            case Refused(code=ClientGone.code):
                self._disconnects.labels(event.consumer or "", "queue").inc()
            case Refused():
                self._refusals.labels(event.consumer or "", event.code).inc()
            case Evicted():
                self._evictions.labels(event.consumer, event.outcome).inc()
                self._releases.labels(event.consumer).observe(event.ms / 1000)
            case Trimmed():
                self._trims.labels(event.consumer, event.outcome).inc()
                self._trimmed.labels(event.consumer).inc(event.mib * MIB)
            case Loaded() | Resumed():
                self._loads.labels(event.consumer).observe(event.ms / 1000)
            case OutOfMemory():
                self._out_of_memory.labels(event.consumer).inc()
            case CallbackSent():
                self._callbacks.labels(event.told).inc()
            case OutOfMemoryHealed():
                self._healed.labels(event.consumer).inc()

    def _take_job(self, job: JobEnded) -> None:
        failed = job.status is not None and job.status >= 400
        outcome = job.failure or ("consumer_error" if failed else "done")
        if self._clients is not None:
            self._clients.had_the_gpu(job)
        self._jobs.labels(job.consumer, job.kind, outcome).inc()
        self._waits.labels(job.consumer, job.kind).observe(job.wait_ms / 1000)
        self._runs.labels(job.consumer, job.kind).observe(job.run_ms / 1000)
        if job.failure == ClientGone.code:
            self._disconnects.labels(job.consumer, "answer" if job.status else "run").inc()


class Clients(Collector):
    """What each client has and had, by the name of its key. The first `MOST_CLIENTS` that come
    have labels of their own, all others share one."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._lock = threading.Lock()
        self._known: set[str] = set()
        self.registry = CollectorRegistry(auto_describe=False)
        self._jobs = Counter(
            "gpumanager_client_jobs",
            "Jobs of a client's that had the GPU and are over.",
            ["client"],
            registry=self.registry,
        )
        self._held = Counter(
            "gpumanager_client_run_seconds",
            "Time that a client's jobs held the GPU.",
            ["client"],
            registry=self.registry,
        )
        self.registry.register(self)

    def had_the_gpu(self, job: JobEnded) -> None:
        """Count a job that is over."""
        client = self._label(job.client)
        self._jobs.labels(client).inc()
        self._held.labels(client).inc(job.run_ms / 1000)

    def collect(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily(
            "gpumanager_client_queue_depth", "Jobs of a client's in the queue.", labels=["client"]
        )
        line = self._snapshot()["queue"]
        counts: PerClient[str] = PerClient(
            self._label(entry["client"]) for entry in line if entry["state"] == "waiting"
        )
        for client in sorted(self._known):
            waiting.add_metric([client], counts[client])
        yield waiting

    def _label(self, client: str) -> str:
        with self._lock:
            if client in self._known:
                return client
            if len(self._known) < MOST_CLIENTS:
                self._known.add(client)
                return client
            self._known.add(OTHER_CLIENTS)
            return OTHER_CLIENTS


class _Now(Collector):
    """What is so at the moment of the scrape."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        status = self._snapshot()
        yield from self._line(status)
        yield self._async_jobs(status["jobs"])
        yield from self._card(status)
        yield from self._consumers(status["consumers"])

    def _line(self, status: Mapping[str, Any]) -> Iterator[Metric]:
        waiting = GaugeMetricFamily(
            "gpumanager_queue_depth", "Jobs in the queue.", labels=["consumer", "kind"]
        )
        routed = [
            (name, kind)
            for kind, to in status["routing"].items()
            for name in ([to] if isinstance(to, str) else to)
        ]
        counts = dict.fromkeys(routed, 0)
        for entry in status["queue"]:
            if entry["state"] == "waiting":
                place = entry["consumer"], entry["kind"]
                counts[place] = counts.get(place, 0) + 1
        for labels, count in counts.items():
            waiting.add_metric(labels, count)
        yield waiting
        scheduler = status["scheduler"]
        yield GaugeMetricFamily(
            "gpumanager_jobs_running", "Jobs that hold the GPU.", scheduler["in_flight"]
        )
        yield CounterMetricFamily(
            "gpumanager_grants", "Jobs that got the GPU.", scheduler["total_jobs"]
        )
        yield GaugeMetricFamily(
            "gpumanager_longest_overtake_jobs",
            "Most jobs that one job was overtaken by.",
            scheduler["longest_overtake"]["jobs"],
        )
        yield GaugeMetricFamily(
            "gpumanager_longest_overtake_seconds",
            "Longest between the first and the last time that one job was overtaken out of turn.",
            scheduler["longest_overtake"]["ms"] / 1000,
        )

    def _async_jobs(self, counts: Mapping[str, int]) -> Metric:
        jobs = GaugeMetricFamily(
            "gpumanager_async_jobs",
            "Asynchronous jobs that are kept, by their state.",
            labels=["state"],
        )
        for state, count in counts.items():
            jobs.add_metric([state], count)
        return jobs

    def _card(self, status: Mapping[str, Any]) -> Iterator[Metric]:
        gpu = status["gpu"]
        named = InfoMetricFamily("gpumanager_gpu", "The card, and whose its memory is.")
        named.add_metric([], {"name": gpu.get("name", ""), "memory": gpu.get("memory", "")})
        yield named
        yield GaugeMetricFamily(
            "gpumanager_gpu_memory_total_bytes", "The card's memory.", gpu["total_mib"] * MIB
        )
        yield GaugeMetricFamily(
            "gpumanager_gpu_memory_free_bytes", "Of it, free.", gpu["free_mib"] * MIB
        )
        held = GaugeMetricFamily(
            "gpumanager_gpu_memory_held_bytes",
            "Who holds the card's memory; `(foreign)` is nobody's the broker knows.",
            labels=["holder"],
        )
        rest = gpu["used_mib"]
        for consumer in status["consumers"]:
            held.add_metric([consumer["name"]], consumer["gpu_resident_mib"] * MIB)
            rest -= consumer["gpu_resident_mib"]
        held.add_metric(["(foreign)"], max(0, rest) * MIB)
        yield held
        yield GaugeMetricFamily(
            "gpumanager_gpu_measured",
            "Whether the card's memory is measured, not estimated.",
            float(gpu["source"] == "measured"),
        )

    def _consumers(self, consumers: list[Mapping[str, Any]]) -> Iterator[Metric]:
        healthy = GaugeMetricFamily(
            "gpumanager_consumer_healthy",
            "Whether the last probe was answered as it should be; absent before the first.",
            labels=["consumer"],
        )
        flags = {
            "loaded": "Whether its model is loaded.",
            "quarantined": "Whether it is asked to unload no more, since it gave nothing back.",
            "breaker_open": "Whether its jobs are refused after failures in a row.",
            "on_cpu": "Whether a model of it went to the CPU in part.",
            "leaks": "Whether what it holds at rest grows and does not level off.",
        }
        grown = GaugeMetricFamily(
            "gpumanager_consumer_grown_bytes",
            "What it holds more, at rest, than just after it was loaded.",
            labels=["consumer"],
        )
        families = {
            name: GaugeMetricFamily(f"gpumanager_consumer_{name}", text, labels=["consumer"])
            for name, text in flags.items()
        }
        for consumer in consumers:
            name = [consumer["name"]]
            if consumer["probed"]:
                healthy.add_metric(name, float(consumer["healthy"]))
            families["loaded"].add_metric(name, float(consumer["loaded"]))
            families["quarantined"].add_metric(name, float("quarantine" in consumer))
            families["breaker_open"].add_metric(name, float(consumer["breaker"] != "closed"))
            families["on_cpu"].add_metric(name, float("on_cpu" in consumer))
            growth = consumer["growth"]
            families["leaks"].add_metric(name, float(growth["verdict"] == "leaks"))
            grown.add_metric(name, growth.get("grown_mib", 0) * MIB)
        yield healthy
        yield grown
        yield from families.values()


class _WebSockets(Collector):
    """What goes through the broker over WebSockets, as it goes."""

    def __init__(self, traffic: Callable[[], Mapping[str, Traffic]]) -> None:
        self._traffic = traffic

    def collect(self) -> Iterator[Metric]:
        now = GaugeMetricFamily(
            "gpumanager_websockets_open",
            "WebSockets that are open to a consumer.",
            labels=["consumer"],
        )
        opened = CounterMetricFamily(
            "gpumanager_websockets", "WebSockets opened to a consumer.", labels=["consumer"]
        )
        size = CounterMetricFamily(
            "gpumanager_websocket_bytes",
            "Bytes over WebSockets, by who sent them.",
            labels=["consumer", "sender"],
        )
        for name, traffic in sorted(dict(self._traffic()).items()):
            now.add_metric([name], traffic.now)
            opened.add_metric([name], traffic.opened)
            size.add_metric([name, "client"], traffic.from_client)
            size.add_metric([name, "consumer"], traffic.from_consumer)
        yield from (now, opened, size)
