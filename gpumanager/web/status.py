"""`GET /v1/status`: the snapshot, with the field names of the original façade."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from gpumanager.clock import Clock, rfc3339, wall_time
from gpumanager.config import Config
from gpumanager.consumers.breaker import Breakers
from gpumanager.consumers.footprint import Figure
from gpumanager.consumers.learning import Figures
from gpumanager.consumers.registry import Registry
from gpumanager.consumers.snapshot import Snapshot
from gpumanager.gpu.accounting import Balance, Held
from gpumanager.gpu.history import MemorySample
from gpumanager.gpu.inventory import believable, holders, left, model_shares
from gpumanager.jobs.shortage import MemoryFailures
from gpumanager.model import Growth, MemoryReading, QueueEntry, resident_name
from gpumanager.scheduling.interface import Scheduler
from gpumanager.telemetry.usage import Usage
from gpumanager.web.roles import NAMELESS
from gpumanager.web.ways import drop_in_routes

_MOST_SHARES = 20


class StatusView:
    """Draws up the snapshot. Times are RFC 3339; those not known yet are left out."""

    def __init__(
        self,
        registry: Registry,
        scheduler: Scheduler,
        breakers: Breakers,
        memory_failures: Callable[[], MemoryFailures],
        usage: Usage,
        async_jobs: Callable[[], Mapping[str, int]],
        clock: Clock,
        version: str,
        config_file: str | None = None,
    ) -> None:
        self._registry = registry
        self._scheduler = scheduler
        self._memory_failures = memory_failures
        self._breakers = breakers
        self._usage = usage
        self._async_jobs = async_jobs
        self._clock = clock
        self._version = version
        self._config_file = config_file

    def snapshot(self, whose: str | None = None) -> dict[str, Any]:
        """The whole answer, ready for JSON. `whose`: as for `queue`."""
        snapshot = believable(self._registry.now)
        config, holds = snapshot.config, holders(snapshot)
        return {
            "listen": config.listen,
            "time": rfc3339(self._clock.now()),
            "role": "admin" if whose is None else "client",
            "version": self._version,
            "config_file": self._config_file,
            "gpu": self._gpu(snapshot, left(snapshot, holds)),
            "routing": dict(config.routing),
            "consumers": [
                self._consumer(snapshot, name, holds[name]) for name in sorted(config.consumers)
            ],
            "scheduler": self._stats(config, whose),
            "jobs": dict(self._async_jobs()),
            "queue": self.queue(whose),
        }

    def queue(self, whose: str | None = None) -> list[dict[str, Any]]:
        """Who runs, then who waits, in their order. With `whose`, the name of a key, all other
        keys' jobs are nameless."""
        return [
            {**self._entry(entry), **({} if whose in (None, entry.job.key) else NAMELESS)}
            for entry in self._scheduler.queue()
        ]

    def key_of(self, ticket: int) -> str | None:
        """The key of the job with that ticket. Raises KeyError if there is none in the queue."""
        return {entry.ticket: entry.job.key for entry in self._scheduler.queue()}[ticket]

    def _gpu(self, snapshot: Snapshot, figures: Balance) -> dict[str, Any]:
        gpu, config = snapshot.gpu, snapshot.config.gpu
        view: dict[str, Any] = {
            "total_mib": figures.total_mib,
            "used_mib": figures.used_mib,
            "free_mib": figures.free_mib,
            "reserved_mib": config.reserved_mib,
            "source": figures.source,
            "device": config.device,
        }
        if gpu.sampled_at is not None:
            view["last_sample"] = self._time(gpu.sampled_at)
        if gpu.reading is not None and gpu.reading.name is not None:
            view["name"] = gpu.reading.name
        if gpu.reading is not None:
            view |= sensed(gpu.reading)
            view["memory"] = gpu.reading.memory
            if gpu.reading.on_gpu_mib is not None:
                view["on_gpu_mib"] = gpu.reading.on_gpu_mib
        if gpu.reading is not None and (holdings := gpu.reading.holdings) is not None:
            view["attribution"] = {"source": "totals" if holdings.reason else "processes"}
            if holdings.reason:
                view["attribution"]["reason"] = holdings.reason
            view["foreign"] = [
                {"pid": each.pid, "name": each.name, "mib": each.mib} for each in holdings.foreign
            ]
        if gpu.err:
            view["err"] = gpu.err + _CONSEQUENCE.get(figures.source, "")
        return view

    def _consumer(self, snapshot: Snapshot, name: str, holds: Held) -> dict[str, Any]:
        consumer, state = snapshot.consumers[name], snapshot.states[name]
        view: dict[str, Any] = {
            "name": name,
            "url": consumer.url,
            "healthy": state.healthy is True,
            "probed": state.healthy is not None,
            "breaker": self._breakers.state(name),
            "loaded": state.loaded,
            "gpu_resident_mib": holds.mib,
            "resident_source": holds.source,
            **_attribution(snapshot.gpu.reading, name),
            "vram_budget_mib": consumer.vram_resident_mib,
            "active": state.active,
            "total_requests": state.total_requests,
            "priority": consumer.priority,
            "can_coexist_with": list(consumer.can_coexist_with),
            "max_parallel": consumer.parallel(snapshot.slots.get(name)),
            "max_parallel_source": _parallel_source(snapshot, name),
            "routes": drop_in_routes(snapshot.config, name),
            "pinned": state.is_pinned(consumer.pinned),
            "learned": _learned(snapshot.figures(name), snapshot.needed(name)),
            "growth": _growth(state.growth, trims=consumer.trim is not None),
        }
        if state.assumed is not None:
            view["assumed"] = True
        if state.stopped_by is not None:
            view["stopped_by"] = state.stopped_by.method
        if state.quarantine:
            view["quarantine"] = state.quarantine
            view["quarantine_until"] = self._time(state.quarantine_until)
        if state.on_cpu:
            view["on_cpu"] = list(state.on_cpu)
        if consumer.counts_by_model:
            view["models"] = self._models(snapshot, name)
        if state.last_used is not None:
            view["last_used"] = self._time(state.last_used)
        if state.last_probe is not None:
            view["last_probe"] = self._time(state.last_probe)
        if why := state.last_error or self._breakers.reason(name):
            view["last_error"] = why
        if state.health_since is not None:
            view["health_since"] = self._time(state.health_since)
        if (opened_at := self._breakers.opened_at(name)) is not None:
            view["breaker_since"] = self._time(opened_at)
        return view

    def _models(self, snapshot: Snapshot, name: str) -> list[dict[str, Any]]:
        """Of one consumer: those that are loaded, the largest first; then the others that anything
        is known of."""
        consumer, state = snapshot.consumers[name], snapshot.states[name]
        shares = model_shares(snapshot, name)
        known = snapshot.known_models(name)
        views = []
        for model in sorted(known, key=lambda each: (-shares.get(each, -1), each)):
            its, resident = state.model(model), resident_name(name, model)
            view = {
                "name": model,
                "loaded": its.loaded,
                "held_mib": shares.get(model, 0),
                "active": its.active,
                "total_requests": its.total_requests,
                "pinned": consumer.pins(model, its.pinned),
                "learned": _learned(snapshot.figures(resident), snapshot.needed(resident)),
            }
            if its.context is not None:
                view["context"] = its.context
            if its.last_used is not None:
                view["last_used"] = self._time(its.last_used)
            views.append(view)
        return views

    def _stats(self, config: Config, whose: str | None) -> dict[str, Any]:
        stats, failures = self._scheduler.stats(), self._memory_failures()
        oldest = stats.oldest_queued
        return {
            "kind": config.scheduler.kind,
            "queue_depth": stats.queue_depth,
            "in_flight": stats.in_flight,
            "total_jobs": stats.total_jobs,
            "last_wait_ms": stats.last_wait_ms,
            "last_run_ms": stats.last_run_ms,
            "oldest_queued": None if oldest is None else rfc3339(oldest),
            "evictions": stats.evictions,
            "out_of_memory": {"seen": failures.seen, "healed": failures.healed},
            "longest_overtake": {
                "jobs": stats.longest_overtake,
                "ms": round(stats.longest_overtake_s * 1000),
            },
            "shares": [
                {
                    "requester": share.requester,
                    "gpu_ms": round(share.seconds * 1000),
                    "jobs": share.jobs,
                }
                for share in self._usage.shares(self._clock.now(), _MOST_SHARES, whose)
            ],
        }

    def _entry(self, entry: QueueEntry) -> dict[str, Any]:
        return {
            "ticket": entry.ticket,
            "consumer": entry.job.consumer,
            "kind": entry.job.kind,
            "client": entry.job.client,
            "request_id": entry.job.request_id,
            "requester": entry.job.requester,
            "urgency": entry.job.urgency,
            "state": entry.state,
            "since": self._time(entry.since),
            "age_ms": round((self._clock.monotonic() - entry.since) * 1000),
            "position": entry.position,
            "estimate_ms": math.ceil(entry.turn.wait_s * 1000),
            "evict_ms": round(entry.turn.evict_s * 1000),
            "load_ms": round(entry.turn.load_s * 1000),
            "run_ms": round(entry.turn.run_s * 1000),
            "overdue": entry.turn.overdue,
            **({} if entry.job.model is None else {"model": entry.job.model}),
        }

    def _time(self, instant: float) -> str:
        return rfc3339(wall_time(self._clock, instant))


def sensed(what: MemoryReading | MemorySample) -> dict[str, Any]:
    """What the card's sensors said, as far as it has any."""
    said = {
        "utilization_percent": what.utilization_percent,
        "power_w": None if what.power_w is None else round(what.power_w, 1),
        "temperature_c": what.temperature_c,
    }
    if isinstance(what, MemoryReading) and what.power_limit_w is not None:
        said["power_limit_w"] = round(what.power_limit_w, 1)
    return {name: value for name, value in said.items() if value is not None}


_CONSEQUENCE = {
    "ledger": "; the ledger of declared figures decides",
    "unknown": "; without gpu.total_mib nothing is decided by memory",
}


def _attribution(reading: MemoryReading | None, name: str) -> dict[str, str]:
    """Whether the memory of this consumer's processes is known (`processes`), or the card's totals
    have to do; nothing where the card is not measured at all."""
    if reading is None or reading.holdings is None:
        return {}
    known = reading.measured_mib(name) is not None
    return {"attribution": "processes" if known else "totals"}


def _parallel_source(snapshot: Snapshot, name: str) -> str:
    """Who says how many of its jobs run at once; `unknown`: its server has not, so far."""
    if snapshot.consumers[name].max_parallel != "auto":
        return "config"
    return "server" if name in snapshot.slots else "unknown"


def _figure(figure: Figure) -> dict[str, Any]:
    """MiB, where they come from, and when that was found."""
    view: dict[str, Any] = {"mib": figure.mib, "source": figure.source}
    if figure.at is not None:
        view["at"] = _since_epoch(figure.at)
    return view


def _growth(growth: Growth, *, trims: bool) -> dict[str, Any]:
    """Whether what it holds at rest grows, since when, from what, and by how much; and, if it can
    be trimmed, what that is taken to leave."""
    view: dict[str, Any] = {
        "verdict": growth.verdict,
        "fresh_mib": growth.fresh_mib,
        "grown_mib": growth.grown_mib,
        "jobs": growth.jobs,
    }
    if growth.over:
        view["over"] = growth.over
    if growth.mib_per_job:
        view["mib_per_job"] = growth.mib_per_job
    if growth.mib_per_load:
        view["mib_per_load"] = growth.mib_per_load
    if trims and growth.trims_to_mib is not None:
        view["trims_to_mib"] = growth.trims_to_mib
    if growth.at is not None:
        view["since"] = _since_epoch(growth.at)
    return view


def _since_epoch(seconds: float) -> str:
    return rfc3339(datetime.fromtimestamp(seconds, UTC))


def _learned(figures: Figures, needed: Figure) -> dict[str, Any]:
    """What is known so far, times in ms."""
    view: dict[str, Any] = {"needed": _figure(needed)}
    if figures.peak is not None:
        view["peak_mib"] = figures.peak.mib
        view["peak"] = _figure(figures.peak)
    if figures.raised is not None:
        raised = figures.raised
        view["raised"] = {
            "mib": raised.mib,
            "at": _since_epoch(raised.at),
            "jobs_left": raised.patience - raised.good,
        }
    if figures.residue_mib is not None:
        view["residue_mib"] = figures.residue_mib
        view["residue"] = _figure(Figure(figures.residue_mib, "measured", figures.residue_at))
    times = {"load_ms": figures.load_s, "unload_ms": figures.unload_s, "run_ms": figures.run_s}
    for name, took in times.items():
        if took is not None:
            view[name] = {
                "p50": round(took.p50 * 1000),
                "p95": round(took.p95 * 1000),
                "count": took.count,
            }
    return view
