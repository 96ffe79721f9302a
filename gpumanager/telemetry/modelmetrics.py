"""What `/metrics` tells of single models. Their names come from clients and from consumers, so that
only few of them are labels, and only as long as there is something to say of them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gpumanager.telemetry.events import Event, Evicted, JobEnded, Loaded

MIB = 1024 * 1024

MOST_LABELLED = 20
"""Models of one consumer that have a label: those that are loaded, the largest first, then those
that were used last."""

OTHER_MODELS = "(others)"
"""All others that are loaded, together."""

MOST_COUNTED = 1000
"""Models whose loads and evictions are remembered; of more, those are forgotten that were not
loaded or evicted for longest."""

Of = tuple[str, str]
"""A consumer and its model."""


class Models(Collector):
    """Of one broker; `snapshot` is what `/v1/status` shows. Safe from any thread."""

    def __init__(self, snapshot: Callable[[], Mapping[str, Any]]) -> None:
        self._snapshot = snapshot
        self._lock = threading.Lock()
        self._loads: OrderedDict[Of, int] = OrderedDict()
        self._evictions: OrderedDict[Of, int] = OrderedDict()

    def take(self, event: Event) -> None:
        """Count an event in. A job that found its model not loaded has loaded it."""
        match event:
            case JobEnded(model=str() as model, cold=True, failure=None) if _worked(event):
                self._count(self._loads, (event.consumer, model))
            case Loaded(model=str() as model):
                self._count(self._loads, (event.consumer, model))
            case Evicted(model=str() as model):
                self._count(self._evictions, (event.consumer, model))

    def collect(self) -> Iterator[Metric]:
        labels = ["consumer", "model"]
        held = GaugeMetricFamily(
            "gpumanager_model_held_bytes",
            "What a model holds of the card's memory; (others) are those without a label.",
            labels=labels,
        )
        needed = GaugeMetricFamily(
            "gpumanager_model_needed_bytes", "What a job of a model needs of it.", labels=labels
        )
        loads = CounterMetricFamily(
            "gpumanager_model_loads",
            "Loads of a model: by the broker, or by a job that found it not loaded.",
            labels=labels,
        )
        evictions = CounterMetricFamily(
            "gpumanager_model_evictions", "Unloads of a model to make room.", labels=labels
        )
        for consumer in self._snapshot()["consumers"]:
            name, models = consumer["name"], _of_interest(consumer.get("models", ()))
            for model in models[:MOST_LABELLED]:
                of = (name, model["name"])
                held.add_metric(of, model["held_mib"] * MIB)
                needed.add_metric(of, model["learned"]["needed"]["mib"] * MIB)
                with self._lock:
                    loads.add_metric(of, self._loads.get(of, 0))
                    evictions.add_metric(of, self._evictions.get(of, 0))
            if rest := sum(model["held_mib"] for model in models[MOST_LABELLED:]):
                held.add_metric((name, OTHER_MODELS), rest * MIB)
        yield from (held, needed, loads, evictions)

    def _count(self, counts: OrderedDict[Of, int], of: Of) -> None:
        with self._lock:
            counts[of] = counts.pop(of, 0) + 1
            if len(counts) > MOST_COUNTED:
                counts.popitem(last=False)


def _worked(job: JobEnded) -> bool:
    return job.status is not None and job.status < 400


def _of_interest(models: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that were ever seen to hold memory, the loaded ones first. A name that a client made up
    never is."""
    seen = [each for each in models if each["held_mib"] or "peak_mib" in each["learned"]]
    seen.sort(key=lambda each: each.get("last_used", ""), reverse=True)
    return sorted(seen, key=lambda each: (not each["loaded"], -each["held_mib"]))
